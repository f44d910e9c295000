"""Rules for well-known pairs of names, shipped as the rule files beside this one: ``llama-meta-to-hf.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import CkptkitError, RuleError
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import parse_rules, rule_lines
from ckptkit.rules.variables import Settings

__all__ = ["PRESET_PREFIX", "preset_names", "preset_rules", "preset_text"]

PRESET_PREFIX = "preset:"
_SUFFIX = ".toml"


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, sorted."""
    names = (item.name for item in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def preset_text(name: str) -> str:
    """Return the rule file of a preset as it was written; raises ``RuleError`` listing all where there is none."""
    known = preset_names()
    if name not in known:
        raise RuleError(f"there is no preset {quoted(name)}", hint=f"presets: {', '.join(known)}")
    return (files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def preset_rules(
    name: str, variables: Mapping[str, int] | None = None, *, config: Mapping[str, Any] | None = None
) -> Rules:
    """Return the rules of a preset, for ``plan_remap``, ``diff``, ``load_into``: ``preset_rules("vit-timm-to-hf")``.

    ``config`` is the model's configuration, from which the preset takes numbers that no shape tells, such as that of
    the heads; ``variables`` (``{"heads": 32}``) are given in place of those. Raises ``RuleError`` for an unknown preset
    or variable, and where a number is neither given nor in ``config``.
    """
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
