"""Rules that make a GGUF file into a file of transformers: names, the order of rows, norms and experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptkit.core.checkpoint import Checkpoint, Configuration, TensorInfo
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.rules.model import Rules, Stage

__all__ = ["GGUF_PREFIX", "GgufStages", "gguf_rules"]

GGUF_PREFIX = "gguf:"
_AUTO = f"{GGUF_PREFIX}auto"


@dataclass(frozen=True, slots=True)
class GgufStages:
    """Stages that turn the names and tensors of a GGUF file into those of transformers, by its metadata."""

    def __str__(self) -> str:
        """Return the argument of ``--rules``."""
        return _AUTO

    def stages(
        self, infos: Mapping[str, TensorInfo | None], live: Configuration | None, checkpoint: Checkpoint | None
    ) -> tuple[list[Stage], list[str]]:
        """Return the stages for these keys, and notes for the user.

        Raises ``RuleError`` where the keys are not those of a GGUF file, where the names of its architecture are not
        known, and for a tensor that is not known of the architecture.
        """
        from ckptkit.core.patterns import literal
        from ckptkit.rules.gguf.architectures import ARCHITECTURES, Architecture
        from ckptkit.rules.gguf.steps import steps_of
        from ckptkit.rules.transformers.patterns import stage_of

        del live
        if checkpoint is None or "gguf" not in checkpoint.format:
            raise RuleError(
                f"--rules {self} needs a GGUF file: its metadata says which model it is",
                hint="rules of a merge are for what is merged into the base; to merge into a GGUF file, make it a "
                "model first: ckpt remap BASE -o OUT --rules gguf:auto --dequantize",
            )
        metadata: dict[str, object] = {}
        for entry in checkpoint.entries:  # the first of several shards has all metadata
            metadata.setdefault(entry.path, entry.value)
        name = metadata.get("general.architecture")
        row = ARCHITECTURES.get(name, Architecture()) if isinstance(name, str) else Architecture()
        if not row.names:
            raise RuleError(
                f"--rules {self}: the names of the architecture {quoted(str(name))} are not known",
                hint=f"find rules with ckpt align EXPECTED {shell_word(checkpoint.path)} -o rules.toml",
            )
        steps = steps_of(str(name), metadata, infos, f"--rules {self}")
        unknown = [key for key in infos if key not in {name for step in steps for name in step.inputs}]
        if unknown:
            raise RuleError(
                f"--rules {self}: {listed(unknown, 3)} {'is' if len(unknown) == 1 else 'are'} not known of the "
                f"architecture {quoted(str(name))}",
                hint=f"leave out what the model does not need: --drop {shell_word(literal(unknown[0]))}",
            )
        converted = sum(bool(step.operations) for step in steps)
        note = f"--rules {self}: {name}, {plural(len(steps), 'key')} renamed"
        if converted:
            note += f", {converted:,} of them converted by operations"
        return [stage_of(steps, infos, str(self))], [note]


def gguf_rules(text: str) -> Rules:
    """Return the rules that ``gguf:auto`` stands for. Raises ``RuleError`` for any other text."""
    if text != _AUTO:
        raise RuleError(f"{quoted(text)} is not valid", hint=f"write {_AUTO}: the file says its architecture")
    return Rules((Stage(made=GgufStages()),))
