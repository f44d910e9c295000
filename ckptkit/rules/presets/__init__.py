"""Presets: rule files for well-known models, stored beside this module, such as ``llama-meta-to-hf.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from types import NoneType

from ckptkit.core.arguments import require_type
from ckptkit.core.text import quoted
from ckptkit.errors import CkptkitError, RuleError
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import parse_rules, rule_lines
from ckptkit.rules.variables import Settings

__all__ = ["PRESET_PREFIX", "preset_names", "preset_rules", "preset_text"]

PRESET_PREFIX = "preset:"
_SUFFIX = ".toml"


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets of rules, sorted.

    Example:
        >>> "llama-meta-to-hf" in ckptkit.preset_names()
        True
    """
    names = (item.name for item in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def preset_text(name: str) -> str:
    """Return the text of the rule file of a preset; raise ``RuleError``, listing all presets, for an unknown name."""
    known = preset_names()
    if name not in known:
        raise RuleError(f"there is no preset {quoted(name)}", hint=f"presets: {', '.join(known)}")
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def preset_rules(
    name: str, variables: Mapping[str, int] | None = None, *, config: Mapping[str, object] | None = None
) -> Rules:
    """Return the rules of a preset, for ``plan_remap``, ``diff`` and ``load_into``.

    ``config`` is the configuration of the model, with numbers that shapes do not tell, such as the number of heads.
    ``variables``, such as ``{"heads": 32}``, replace values of the configuration. Raises ``RuleError`` for an unknown
    preset or variable, and where a value is neither in ``variables`` nor in ``config``.

    Example:
        >>> rules = ckptkit.preset_rules("llama-meta-to-hf", {"heads": 32, "kv_heads": 8})
        >>> len(rules.stages[0].rules)
        13
    """
    require_type(name, str, "name", "a str")
    require_type(variables, (Mapping, NoneType), "variables", 'a mapping, such as {"heads": 32}')
    require_type(config, (Mapping, NoneType), "config", "a mapping with the content of config.json")
    text = preset_text(name)
    given = Settings(
        {variable: str(value) for variable, value in (variables or {}).items()},
        None if config is None else lambda: config,
    )
    try:
        return parse_rules(file=tomllib.loads(text), lines=rule_lines(text), settings=given)
    except CkptkitError as error:
        error.path = f"{PRESET_PREFIX}{name}"
        raise
