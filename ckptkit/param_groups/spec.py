"""What a param-group spec says: who owns which parameter, what changes its options on top, and how doubt is settled."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ckptkit.core.patterns import Pattern
from ckptkit.core.text import kind_of
from ckptkit.param_groups.conditions import Condition, Layers
from ckptkit.param_groups.properties import ParameterFacts

__all__ = ["POLICIES", "GroupRule", "Modifier", "ParamGroupSpec", "is_tensor", "number_fault"]

POLICIES: Mapping[str, tuple[str, ...]] = {
    "unmatched": ("error", "freeze"),
    "overlap": ("first", "error"),
    "frozen": ("skip", "include", "error"),
    "tied": ("error", "first"),
    "merge": ("rule", "options", "never"),
    "order": ("rule", "model"),
}


@dataclass(frozen=True, slots=True)
class GroupRule:
    """An owner: it takes the parameters whose FQN fits one of ``patterns`` and for which ``condition`` holds.

    With ``rest`` it has neither and takes all that no rule before it does; with ``optional`` it may own none; with
    ``freeze`` what it owns does not train. ``options`` go to the optimizer as they are, after what ``multiples``
    say of the defaults; ``optimizer`` is the class that its parameters train with.
    """

    name: str
    patterns: tuple[Pattern, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    rest: bool = False
    optional: bool = False
    condition: Condition | None = None
    multiples: Mapping[str, float] = field(default_factory=dict)
    optimizer: str | None = None
    freeze: bool = False

    def condition_of(self, facts: ParameterFacts) -> bool | None:
        """Return whether the condition holds, which it does where there is none."""
        return self.condition is None or self.condition.holds(facts)


@dataclass(frozen=True, slots=True)
class Modifier:
    """What is changed for the parameters that it fits, whoever owns them; all that fit apply, later ones on top.

    Without ``patterns`` and ``condition`` it fits all parameters; with ``layers`` those that lie in one of them.
    """

    name: str
    patterns: tuple[Pattern, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    condition: Condition | None = None
    multiples: Mapping[str, float] = field(default_factory=dict)
    layers: Layers | None = None

    def fits(self, facts: ParameterFacts) -> bool | None:
        """Return whether it applies, layers aside, or None where only the live model could tell."""
        if self.patterns and not any(pattern.match(facts.name) for pattern in self.patterns):
            return False
        return self.condition is None or self.condition.holds(facts)


@dataclass(frozen=True, slots=True)
class ParamGroupSpec:
    """Ordered rules, of which the first that fits a parameter owns it, then modifiers, over defaults that all share.

    ``optimizers`` holds the defaults of a class over ``defaults``. The policies are those of ``POLICIES``;
    ``unmatched`` may also name the rule that takes what no rule fits. With ``lr_scale`` a group carries the multiple
    of its learning rate beside it, for a scheduler that reads it.
    """

    rules: tuple[GroupRule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    modifiers: tuple[Modifier, ...] = ()
    optimizer: str | None = None
    optimizers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unmatched: str = "error"
    overlap: str = "first"
    frozen: str = "skip"
    tied: str = "error"
    merge: str = "rule"
    order: str = "rule"
    lr_scale: bool = False

    def optimizer_of(self, rule: GroupRule) -> str | None:
        """Return the optimizer class that ``rule`` trains with, where the spec names one."""
        return rule.optimizer or self.optimizer

    def given(self, rule: GroupRule) -> dict[str, Any]:
        """Return the defaults that ``rule`` begins with: those of all, then those of its optimizer class."""
        return {**self.defaults, **self.optimizers.get(self.optimizer_of(rule) or "", {})}


def number_fault(value: Any) -> str | None:
    """Return why ``value`` cannot be a learning rate or a weight decay, or None where it can.

    A torch tensor with one element is a number, as it is for ``torch.optim``.
    """
    if is_tensor(value):
        if value.numel() != 1:
            return f"is a tensor of shape {tuple(value.shape)}"
        if value.is_meta:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return f"is {kind_of(value)}"
    try:
        number = float(value)
    except OverflowError:
        return "is too large for a float"
    if not math.isfinite(number):
        return f"is {number}"
    return f"is negative ({value})" if number < 0 else None


def is_tensor(value: object) -> bool:
    """Return whether ``value`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")  # no tensor can exist before somebody imported it
    return torch is not None and isinstance(value, torch.Tensor)
