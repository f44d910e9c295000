"""Well-known ways to group parameters, as the spec files beside this one: ``timm-layer-decay.toml``, with settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from itertools import takewhile
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import CkptkitError, GroupsError
from ckptkit.param_groups.parse import parse_spec
from ckptkit.param_groups.presets.from_model import FROM_MODEL, Asked
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.spec import ParamGroupSpec

__all__ = ["param_group_phases", "param_group_preset", "param_group_preset_names", "preset_summary"]

_SUFFIX = ".toml"
_NEEDED = "?"
_UNSET: tuple[Any, ...] = ("", [], {})
_MODEL = "model:"  # asked of the model; what is made of other settings alone begins with the next
_MADE = "made:"


def param_group_preset_names() -> tuple[str, ...]:
    """Return the names of all presets for param groups, sorted."""
    names = (item.name for item in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def preset_summary(name: str) -> str:
    """Return what the file of a preset says first: what it does, whose rule it is, and where it differs."""
    lines = takewhile(lambda line: line.startswith("#"), _text(name).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def param_group_preset(name: str, model: Any = None, **settings: Any) -> ParamGroupSpec:
    """Return the spec of a preset: ``param_group_preset("timm-layer-decay", model, lr=1e-3, layer_decay=0.65)``.

    ``model`` is a live ``Module``, or a checkpoint or a mapping of tensors where its names and shapes are enough; few
    presets ask for it here, ``build_param_groups`` always does. Names are those of ``param_group_preset_names``, and
    settings those of the preset's file. Warns (``UserWarning``) where a preset departs from its original for this
    model. Raises ``GroupsError`` for an unknown preset or setting, one that has to be given, and where only another
    model would do.
    """
    table = tomllib.loads(_text(name))
    known = table.pop("settings")
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise GroupsError(
            f"preset {quoted(name)} has no setting {quoted(unknown[0])}", hint=f"it has {', '.join(sorted(known))}"
        )
    try:
        values = _settings({**known, **settings}, model)
        return parse_spec(_filled(table, values))
    except CkptkitError as error:
        raise GroupsError(f"preset {quoted(name)}: {error.reason}", hint=error.hint) from None


def param_group_phases(name: str, model: Any, **settings: Any) -> tuple[ParamGroupSpec, ...]:
    """Return the specs of a preset with phases, such as ``gradual-unfreezing``, from the first to the last.

    What one phase froze has to be trainable again (``model.requires_grad_(True)``) before the groups of the next are
    built. Raises ``GroupsError`` as ``param_group_preset`` does.
    """
    first = param_group_preset(name, model, **settings, phase=0)
    layers = next((modifier.layers for modifier in first.modifiers if modifier.layers is not None), None)
    count = 1 if layers is None else len(layers.levels)
    return (first, *(param_group_preset(name, model, **settings, phase=phase) for phase in range(1, count)))


def _text(name: str) -> str:
    known = param_group_preset_names()
    if name not in known:
        raise GroupsError(f"there is no preset {quoted(name)}", hint=f"presets: {', '.join(known)}")
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def _settings(given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return the settings with what the model tells in place of ``model:...``, in the order of the file."""
    values: dict[str, Any] = {}
    table = None
    for key, value in given.items():
        if value == _NEEDED:
            raise GroupsError(f"the setting {quoted(key)} has to be given", hint=f"write {key}=...")
        source, colon, maker = value.partition(":") if isinstance(value, str) else ("", "", "")
        if f"{source}{colon}" in (_MODEL, _MADE):
            if model is None and source == "model":
                raise GroupsError(f"the setting {quoted(key)} is asked of the model", hint="give the model, or set it")
            if table is None:
                table = parameter_table({} if model is None else model)
            values[key] = FROM_MODEL[maker](Asked(model, table, {**given, **values}))
        else:
            values[key] = value
    return values


def _filled(table: Any, settings: Mapping[str, Any]) -> Any:
    """Return ``table`` with the settings in it; what is unset leaves no trace."""
    if isinstance(table, str) and table.startswith("$"):
        return settings[table[1:]]
    if isinstance(table, list):
        return [made for made in (_filled(one, settings) for one in table) if made not in _UNSET]
    if not isinstance(table, dict):
        return table
    filled = {key: _filled(value, settings) for key, value in table.items()}
    return {key: _question(key, value) for key, value in filled.items() if value not in _UNSET}


def _question(key: str, value: Any) -> Any:
    """Return a setting that stands for a whole ``match`` as one: a pattern, or a list of them, asks for names."""
    return {"params": value} if key == "match" and isinstance(value, str | list) else value
