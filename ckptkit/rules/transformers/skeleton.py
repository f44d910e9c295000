"""A model of transformers without values: the names and shapes that its conversions are made for."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.text import first_line, nearest, quoted
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = ["Skeleton", "check_library", "check_model_type", "has_conversions", "quiet_library", "skeleton_of"]

# Of a model that a config.json describes; the largest published models have 8,000 layers and experts in all.
_MOST_MODULES = 200_000
# Settings for which the library makes a list before it makes a module. ImageNet-21k has 21,841 labels.
_LIMITS = ((re.compile(r".*layers?|depth"), 2_000), (re.compile(r"num_labels"), 100_000))
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
# What a configuration may name that is code, other weights, or another implementation of the same model.
_LEFT_OUT = re.compile(r"auto_map|_name_or_path|quantization_config|.*_implementation.*|use_kernels|_commit_hash")
_INSTALL = "pip install 'ckptkit[transformers]'"


def check_library() -> None:
    """Raise ``RuleError`` where transformers is missing, or is too old to have conversions."""
    try:
        from transformers import conversion_mapping, core_model_loading
    except ImportError as error:
        is_missing = importlib.util.find_spec("transformers") is None
        reason = "is not installed" if is_missing else f"is too old, or cannot be imported: {first_line(error)}"
        raise RuleError(
            f"--rules transformers: needs the library transformers, which {reason}", hint=_INSTALL
        ) from None
    names = ("apply_converters", "apply_renamings", "rename_source_key", "dot_natural_key")
    if not hasattr(conversion_mapping, "get_model_conversion_mapping") or not all(
        hasattr(core_model_loading, name) for name in names
    ):
        raise RuleError("--rules transformers: needs a newer version of the library transformers", hint=_INSTALL)


def check_model_type(name: str) -> None:
    """Raise ``RuleError`` for a name that is neither a model type nor a model class of transformers."""
    from transformers import CONFIG_MAPPING

    if name in CONFIG_MAPPING or _class_named(name) is not None:
        return
    near = nearest(name.lower(), list(CONFIG_MAPPING.keys()))
    raise RuleError(
        f"transformers has no model type {quoted(name)}",
        hint=f"did you mean transformers:{near}?" if near else "see model_type in config.json",
    )


def has_conversions(name: str) -> bool:
    """Return whether the library has conversions for a model type or model class."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return False
    return bool(get_checkpoint_conversion_mapping(name))


def _class_named(name: str) -> Any:
    """Return the model class with this name, or None; only classes of the library itself are found."""
    import transformers

    if not name.isidentifier() or name.startswith("_"):
        return None
    with contextlib.suppress(Exception):  # a module of the library may need a package that is not installed
        found = getattr(transformers, name, None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and getattr(found, "config_class", None) is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device.

    ``config`` is None where no configuration was given, so that its numbers are only the defaults. ``is_named`` says
    whether the names of the model are those of the model that the checkpoint is for.
    """

    model: Any
    config: Any
    is_named: bool
    shapes: Mapping[str, Shape]
    forms: Mapping[str, Shape]  # with a mark in place of each number, for layers that the configuration does not count

    def __contains__(self, name: str) -> bool:
        """Return whether the model has a parameter or buffer of this name, in any layer."""
        return name in self.shapes or _form(name) in self.forms

    def get(self, name: str) -> Shape | None:
        """Return the shape of a parameter or buffer of this name, in any layer, or None."""
        found = self.shapes.get(name)
        return self.forms.get(_form(name)) if found is None else found

    def shape(self, name: str) -> Shape | None:
        """Return the shape of a parameter, or None where the configuration does not say it."""
        return None if self.config is None else self.get(name)

    @property
    def class_name(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    @property
    def base_prefix(self) -> str:
        """The prefix of the model without its head."""
        return str(self.model.base_model_prefix)

    @property
    def ties(self) -> Mapping[str, str]:
        """The names of tied tensors that are not saved, and the name that is."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    @property
    def unsaved(self) -> Sequence[str]:
        """The names that ``save_pretrained`` leaves out."""
        return tuple(getattr(self.model, "_keys_to_ignore_on_save", None) or ())

    def transforms(self, *, is_load: bool) -> list[Any]:
        """Return the library's conversions, in the direction from the file to the model."""
        from transformers import conversion_mapping, core_model_loading

        transforms: list[Any] = conversion_mapping.get_model_conversion_mapping(self.model, add_legacy=is_load)
        if is_load:
            return transforms
        prefix_change = getattr(core_model_loading, "PrefixChange", ())
        # save_pretrained cannot know whether the file had the prefix, and leaves such names as they are.
        return [item for item in transforms if not isinstance(item, prefix_change)]


def _form(name: str) -> str:
    return _NUMBER.sub("#", name)


def skeleton_of(name: str, config: Mapping[str, Any] | None, classes: Sequence[str] = ()) -> Skeleton:
    """Return the skeleton of a model type or model class, with the numbers of a configuration, or with the defaults.

    ``classes`` names the classes of a live model, the first that the library has counts. Nothing but the library is
    imported, and values of the configuration that name code are left out. Raises ``RuleError`` where the library cannot
    build the model.
    """
    from transformers import CONFIG_MAPPING

    chosen = _class_named(name)
    settings = None if config is None else _matching(config, name if chosen is None else chosen.config_class.model_type)
    if settings is not None:
        architectures = settings.get("architectures")
        named = [*classes, *(architectures if isinstance(architectures, list) else ())]
    else:
        named = list(classes)
    config_class = CONFIG_MAPPING[name] if chosen is None else chosen.config_class
    candidates = [item for item in map(_class_named, filter(_is_text, named)) if item is not None]
    owner = next((item for item in candidates if item.config_class is config_class), None)
    model_class = chosen or owner or _default_class(config_class)
    _refuse_large(settings)
    with quiet_library(), _refusing(f"transformers cannot build {model_class.__name__}"), _offline():
        settings = None if settings is None else _without_code(settings)
        built = config_class() if settings is None else config_class.from_dict(settings)
        model = _built(model_class, built)
        state = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if hasattr(tensor, "shape")}
    forms: dict[str, Shape] = {}
    for key, shape in state.items():
        forms.setdefault(_form(key), shape)
    is_named = settings is not None and (chosen is not None or owner is not None)
    return Skeleton(model, None if settings is None else model.config, is_named, state, forms)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _matching(config: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    """Return the configuration, or the part of it, that has the model type; raise ``RuleError`` where none has."""
    waiting: list[Mapping[str, Any]] = [config]
    while waiting:
        table = waiting.pop(0)
        if table.get("model_type") == model_type:
            return table
        waiting += [value for value in table.values() if isinstance(value, Mapping)]
    raise RuleError(
        f"config.json says model_type {quoted(str(config.get('model_type')))}, not {quoted(model_type)}",
        hint="--rules transformers:auto takes the model type from config.json",
    )


def _refuse_large(settings: object) -> None:
    """Raise ``RuleError`` for a configuration with more layers or labels than any real model: it would take long."""
    if not isinstance(settings, Mapping):
        return
    for name, value in settings.items():
        for pattern, most in _LIMITS if isinstance(value, int) else ():
            if value > most and pattern.fullmatch(str(name)):
                raise RuleError(f"config.json says {quoted(str(name))} is {value:,}, and at most {most:,} are built")
        _refuse_large(value)


def _default_class(config_class: Any) -> Any:
    """Return the class that the library builds for a configuration: a language model first, or another."""
    from transformers.models.auto import modeling_auto

    tables = [
        f"MODEL_FOR_{task}_MAPPING_NAMES"
        for task in ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    ]
    tables += ["MODEL_MAPPING_NAMES", *(name for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES"))]
    for table in tables:
        found = getattr(modeling_auto, table, {}).get(config_class.model_type)
        for name in (found,) if isinstance(found, str) else found or ():
            model_class = _class_named(name)
            if model_class is not None and model_class.config_class is config_class:
                return model_class
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    for name, value in vars(module).items():
        is_model = isinstance(value, type) and getattr(value, "config_class", None) is config_class
        if is_model and not name.endswith("PreTrainedModel"):
            return value
    raise RuleError(f"transformers has no model for {quoted(config_class.model_type)}")


def _without_code(value: Any) -> Any:
    """Return a configuration without what names code, other weights, or another implementation."""
    if isinstance(value, Mapping):
        if list(value) == ["__float__"]:  # as the library writes infinity
            return float(value["__float__"])
        return {key: _without_code(item) for key, item in value.items() if not _LEFT_OUT.fullmatch(str(key))}
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    return value


def _built(model_class: Any, config: Any) -> Any:
    """Return the model on the meta device; raise ``RuleError`` where it has more modules than any real model."""
    import torch
    from torch.nn.modules.module import register_module_module_registration_hook

    from ckptkit.core.random_state import restored_random_state

    count = 0

    def limit(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise RuleError(f"its config.json describes more than {_MOST_MODULES:,} modules")

    handle = register_module_module_registration_hook(limit)
    try:
        with restored_random_state(), torch.device("meta"):
            return model_class(config)
    finally:
        handle.remove()


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Keep the library from printing advice about values, which a model without values does not need."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the library from asking the Hugging Face Hub, where a configuration names a backbone by its repository."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Raise ``RuleError`` for whatever the library raises in the block."""
    try:
        yield
    except RuleError:
        raise
    except Exception as error:
        if type(error).__name__ == "OfflineModeIsEnabled":
            raise RuleError(
                f"{what}: config.json names another repository, and nothing is downloaded",
                hint="write the configuration of the backbone into config.json, as backbone_config",
            ) from error
        # The library names the field in the first line, and says in the next what is wrong with it.
        reason = first_line(ValueError(" ".join(str(error).split()))).partition(": ")[2] or type(error).__name__
        raise RuleError(f"{what}: {reason}", hint="check config.json beside the checkpoint") from error
