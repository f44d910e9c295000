"""Rules made from the conversions of transformers: models hold some tensors in other ways than their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint import Checkpoint, Configuration, TensorInfo
from ckptkit.core.text import plural, quoted
from ckptkit.errors import RuleError
from ckptkit.rules.model import Rules, Stage

if TYPE_CHECKING:
    from ckptkit.rules.transformers.steps import Step

__all__ = ["LIBRARY_PREFIX", "LibraryStages", "library_rules"]

LIBRARY_PREFIX = "transformers:"
_AUTO, _REVERSE = "auto", "reverse"


@dataclass(frozen=True, slots=True)
class LibraryStages:
    """Stages that the library's conversions give for the keys of a checkpoint.

    ``model_type`` is a model type or a model class, or ``auto``. With ``is_reverse``, the names of the model become
    those of the file. ``config`` is the configuration beside the checkpoint, or None.
    """

    model_type: str
    is_reverse: bool = False
    config: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        """Return the argument of ``--rules``."""
        return f"{LIBRARY_PREFIX}{self.model_type}{f':{_REVERSE}' if self.is_reverse else ''}"

    def stages(
        self, infos: Mapping[str, TensorInfo | None], live: Configuration | None, checkpoint: Checkpoint | None = None
    ) -> tuple[list[Stage], list[str]]:
        """Return the stages for these keys, and notes for the user.

        ``live`` describes the live model that is on one side; it replaces the configuration beside the checkpoint.
        Raises ``RuleError`` where the model type is not known, for an operation that rules do not have, and where the
        library cannot build the model.
        """
        del checkpoint
        from ckptkit.core.config_files import read_settings
        from ckptkit.rules.transformers.names import copies_of_tied, steps_from_disk, steps_to_disk
        from ckptkit.rules.transformers.patterns import stage_of
        from ckptkit.rules.transformers.skeleton import check_library, check_model_type, skeleton_of
        from ckptkit.rules.transformers.steps import in_levels

        check_library()
        config = self.config
        classes: tuple[str, ...] = ()
        live_config = None if live is None else read_settings(live.value, "config.json")
        is_same = live_config is not None and self.model_type in (_AUTO, live_config.get("model_type"))
        if live is not None and (is_same or self.model_type in live.classes):
            config, classes = live_config, live.classes
        name = self.model_type
        if name == _AUTO:
            name = _model_type(config, self)
        check_model_type(name)
        skeleton = skeleton_of(name, config, classes)
        steps = (steps_to_disk if self.is_reverse else steps_from_disk)(infos, skeleton)
        names = list(infos)
        stages = []
        for level in in_levels(steps):
            stages.append(stage_of(level, names, str(self)))
            names = _names_after(level, names)
        copies = [] if self.is_reverse else copies_of_tied(names, skeleton)
        if copies:
            stages.append(stage_of(copies, names, str(self)))
        count = len({name for step in steps for name in step.inputs if name in infos})
        converted = len({name for step in steps if step.operations for name in step.inputs if name in infos})
        note = f"--rules {self}: {count:,} of {plural(len(infos), 'key')} renamed or converted"
        if converted:
            note += f", {converted:,} of them by operations"
        if skeleton.is_named and not any(name in skeleton for name in (infos if self.is_reverse else names)):
            note += f"; no key is one of {skeleton.class_name}"
        return stages, [note]


def _names_after(steps: Sequence[Step], names: Iterable[str]) -> list[str]:
    taken = {name for step in steps for name in step.inputs}
    return [*(name for name in names if name not in taken), *(name for step in steps for name in step.outputs)]


def _model_type(config: Mapping[str, Any] | None, given: LibraryStages) -> str:
    found = None if config is None else config.get("model_type")
    if not isinstance(found, str) or not found:
        reason = "there is no config.json beside the checkpoint" if config is None else "config.json has no model_type"
        example = replace(given, model_type="mixtral")
        raise RuleError(
            f"--rules {given}: {reason}",
            hint=f"name the model type, such as --rules {example}",
            call=f'name the model type, such as rules="{example}"',
        )
    return found


def library_rules(text: str, config: object = None) -> Rules:
    """Return the rules that ``transformers:MODEL_TYPE``, ``transformers:auto`` or the reverse of one stands for.

    ``config`` is the configuration beside the checkpoint, as in ``load_rules``. Raises ``RuleError`` where the library
    is missing, and for an unknown model type.
    """
    from ckptkit.core.config_files import read_settings
    from ckptkit.rules.transformers.skeleton import check_library, check_model_type

    name, colon, direction = text.removeprefix(LIBRARY_PREFIX).partition(":")
    if not name or (colon and direction != _REVERSE):
        raise RuleError(
            f"{quoted(text)} is not valid",
            hint="write transformers:MODEL_TYPE or transformers:auto, and :reverse after it for the names on disk",
        )
    check_library()
    if name != _AUTO:
        check_model_type(name)
    settings = None if config is None else read_settings(config, "config.json")
    stages = LibraryStages(name, bool(colon), settings)
    return Rules((Stage(made=stages),))
