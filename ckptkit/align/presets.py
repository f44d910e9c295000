"""Presets that fit two checkpoints: what is known of a pair of names need not be guessed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from itertools import islice

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.errors import RuleError
from ckptkit.rules import Rules, apply_rules
from ckptkit.rules.presets import preset_names, preset_rules, preset_text

__all__ = ["fitting_presets"]

_SAMPLE = 64


def fitting_presets(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return the names of the presets that make every key expected, in its shape, of what was found."""
    return tuple(name for name in preset_names() if _fits(name, expected, found))


def _fits(name: str, expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo]) -> bool:
    variables = tomllib.loads(preset_text(name)).get("vars", {})
    rules = preset_rules(name, dict.fromkeys(variables, 1))  # one head: how many there are changes no shape
    if not _speaks_of(rules, found):
        return False
    try:
        made = apply_rules(rules, found).describe(found)
    except RuleError:
        return False
    return all(key in made and made[key].shape == info.shape for key, info in expected.items())


def _speaks_of(rules: Rules, found: Mapping[str, TensorInfo]) -> bool:
    patterns = [pattern for stage in rules.stages for rule in stage.rules for pattern in rule.sources]
    step = max(len(found) // _SAMPLE, 1)
    sample = list(islice(found, 0, None, step))
    return sum(any(pattern.match(key) for pattern in patterns) for key in sample) > len(sample) / 4
