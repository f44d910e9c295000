"""Presets: well-known param-group specs with settings, one TOML file each in this folder."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.resources import files
from itertools import takewhile
from typing import Any

from ckptkit.core.arguments import require_type
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import did_you_mean, quoted
from ckptkit.core.torch_types import Module
from ckptkit.errors import CkptkitError, GroupsError
from ckptkit.inputs import CheckpointLike, opened_model
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.presets.from_model import COMPUTED_SETTINGS, PresetContext
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.spec import ParamGroupSpec

__all__ = ["param_group_phases", "param_group_preset", "param_group_preset_names", "preset_summary"]

_SUFFIX = ".toml"
_REQUIRED = "?"
_UNSET: tuple[object, ...] = ("", [], {})
_NEEDS_MODEL = {"model": True, "made": False}  # prefixes of computed settings, and whether they need a model


def param_group_preset_names() -> tuple[str, ...]:
    """Return the names of all param-group presets, sorted.

    Example:
        >>> "no-decay" in ckptkit.param_group_preset_names()
        True
    """
    names = (item.name for item in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def preset_summary(name: str) -> str:
    """Return the comment at the top of a preset: what it does, its source, and its differences from the source."""
    lines = takewhile(lambda line: line.startswith("#"), _read(name).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def param_group_preset(name: str, model: CheckpointLike | None = None, **settings: Any) -> ParamGroupSpec:
    """Return the spec of a preset: ``param_group_preset("timm-layer-decay", model, lr=1e-3, layer_decay=0.65)``.

    ``name`` is one of ``param_group_preset_names()``; ``settings`` are those in the file of the preset. ``model`` is a
    live ``torch.nn.Module``, or a path, a Checkpoint or a mapping of tensors where names and shapes are enough. Most
    presets need no model.

    Warns (``UserWarning``) where a preset differs from its source for this model. Raises ``GroupsError`` for an unknown
    preset or setting, for a required setting without a value, and for a model that the preset does not support.

    Example:
        >>> spec = param_group_preset("no-decay", "fixtures/lenet_10class.pth", lr=0.1)
        >>> spec.defaults["lr"]
        0.1
    """
    require_type(name, str, "name", "a str")
    table = tomllib.loads(_read(name))
    known = table.pop("settings")
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise GroupsError(
            f"preset {quoted(name)} has no setting {quoted(unknown[0])}",
            hint=f"its settings are {', '.join(sorted(known))}",
        )
    with nullcontext() if model is None else opened_model(model) as found:
        try:
            return parse_spec(_fill(table, _compute_settings({**known, **settings}, found)))
        except CkptkitError as error:
            if error.path is not None:  # the fault is in a file that a setting names
                raise
            raise GroupsError(f"preset {quoted(name)}: {error.reason}", hint=error.hint) from None


def param_group_phases(name: str, model: CheckpointLike, **settings: Any) -> tuple[ParamGroupSpec, ...]:
    """Return the specs of every phase of a preset such as ``gradual-unfreezing``, first to last.

    Call ``model.requires_grad_(True)`` before the groups of the next phase are built: a phase freezes parameters.
    ``model`` is what ``param_group_preset`` accepts. Raises ``GroupsError`` as ``param_group_preset`` does.

    Example:
        >>> phases = ckptkit.param_group_phases("gradual-unfreezing", "py:fixtures.lenet:build", lr=0.01)
        >>> len(phases), [rule.name for rule in phases[0].rules]
        (5, ['frozen', 'trained'])
    """
    first = param_group_preset(name, model, **settings, phase=0)
    layers = next((modifier.layers for modifier in first.modifiers if modifier.layers is not None), None)
    count = 1 if layers is None else len(layers.levels)
    return (first, *(param_group_preset(name, model, **settings, phase=phase) for phase in range(1, count)))


def _read(name: str) -> str:
    known = param_group_preset_names()
    if name not in known:
        hint = did_you_mean(name, known, f"the presets are {', '.join(known)}")
        raise GroupsError(f"there is no preset {quoted(name)}", hint=hint)
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def _compute_settings(given: Mapping[str, Any], model: Module | Checkpoint | None) -> dict[str, Any]:
    """Return the settings in the order of the file, with ``model:...`` and ``made:...`` replaced by their values."""
    values: dict[str, Any] = {}
    table = None
    for key, value in given.items():
        if value == _REQUIRED:
            raise GroupsError(f"the setting {quoted(key)} is required", hint=f"write {key}=...")
        prefix, colon, function = value.partition(":") if isinstance(value, str) else ("", "", "")
        if not colon or prefix not in _NEEDS_MODEL:
            values[key] = value
            continue
        if model is None and _NEEDS_MODEL[prefix]:
            raise GroupsError(
                f"the setting {quoted(key)} is computed from the model, and no model was given",
                hint=f"give the model, or set {key}",
            )
        if table is None:
            table = parameter_table({} if model is None else model)
        values[key] = COMPUTED_SETTINGS[function](PresetContext(model, table, {**given, **values}))
    return values


def _fill(table: Any, settings: Mapping[str, Any]) -> Any:
    """Return ``table`` with each ``$name`` replaced by its setting; keys with an unset value are left out."""
    if isinstance(table, str) and table.startswith("$"):
        return settings[table[1:]]
    if isinstance(table, list):
        return [value for value in (_fill(inner, settings) for inner in table) if value not in _UNSET]
    if not isinstance(table, dict):
        return table
    filled = {key: _fill(value, settings) for key, value in table.items()}
    return {key: _as_match(key, value) for key, value in filled.items() if value not in _UNSET}


def _as_match(key: str, value: Any) -> Any:
    """Return a pattern, or a list of patterns, as a ``match`` table where it is the whole ``match``."""
    return {"params": value} if key == "match" and isinstance(value, str | list) else value
