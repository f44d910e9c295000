"""The fields of a param-group spec: rules that own parameters, modifiers that change options, defaults and policies."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeGuard, get_args

from ckptkit.core.arguments import require_type
from ckptkit.core.patterns import Pattern, matches_any
from ckptkit.core.text import kind_of
from ckptkit.core.torch_types import Tensor
from ckptkit.param_groups.conditions import Condition, Layers
from ckptkit.param_groups.properties import ParameterInfo

__all__ = ["POLICIES", "GroupRule", "Modifier", "SpecFields", "is_tensor", "number_fault"]

Overlap = Literal["first", "error"]
Frozen = Literal["skip", "include", "error"]
Tied = Literal["error", "first"]
Merge = Literal["rule", "options", "never"]
Order = Literal["rule", "model"]

POLICIES: Mapping[str, tuple[str, ...]] = {
    "unmatched": ("error", "freeze"),
    "overlap": get_args(Overlap),
    "frozen": get_args(Frozen),
    "tied": get_args(Tied),
    "merge": get_args(Merge),
    "order": get_args(Order),
}


@dataclass(frozen=True, slots=True)
class GroupRule:
    """A rule of a spec: it owns the parameters that match one of ``patterns`` and for which ``condition`` holds.

    - ``rest``: the rule has neither patterns nor a condition, and owns every parameter that no earlier rule owns.
    - ``optional``: the rule may own no parameter.
    - ``freeze``: the parameters of the rule do not train.
    - ``override``: the rule may take all parameters of a later rule, which is an error otherwise.
    - ``options`` go to the optimizer unchanged.
    - ``multiples`` multiply the defaults: ``{"lr": 10.0}`` is written ``lr_mult = 10.0`` in a spec.
    - ``optimizer`` is the class that trains the parameters.
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
    override: bool = False

    def condition_holds(self, parameter: ParameterInfo) -> bool | None:
        """Return whether the condition holds; True without a condition, None where only the live model could tell."""
        return self.condition is None or self.condition.holds(parameter)

    def matches(self, parameter: ParameterInfo) -> bool | None:
        """Return whether patterns and condition match, or None where only the live model could tell."""
        if self.patterns and not matches_any(self.patterns, parameter.name):
            return False
        return self.condition_holds(parameter)


@dataclass(frozen=True, slots=True)
class Modifier:
    """A change of options for every parameter that it matches, whichever rule owns the parameter.

    Every modifier that matches applies, in the order of the spec. A modifier without ``patterns`` and ``condition``
    matches every parameter. A modifier with ``layers`` applies to the parameters that are in one of the layers.
    """

    name: str
    patterns: tuple[Pattern, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    condition: Condition | None = None
    multiples: Mapping[str, float] = field(default_factory=dict)
    layers: Layers | None = None

    def matches(self, parameter: ParameterInfo) -> bool | None:
        """Return whether patterns and condition match, or None where only the live model could tell.

        Layers are not checked here.
        """
        if self.patterns and not matches_any(self.patterns, parameter.name):
            return False
        return self.condition is None or self.condition.holds(parameter)


@dataclass(frozen=True, slots=True, repr=False)
class SpecFields:
    """The fields of a ``ParamGroupSpec``, which describes them, for the functions that check and write a spec."""

    rules: tuple[GroupRule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    modifiers: tuple[Modifier, ...] = ()
    optimizer: str | None = None
    optimizers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unmatched: str = "error"
    overlap: Overlap = "first"
    frozen: Frozen = "skip"
    tied: Tied = "error"
    merge: Merge = "rule"
    order: Order = "rule"
    lr_scale: bool = False
    ignore: tuple[str, ...] = ()

    def optimizer_of(self, rule: GroupRule) -> str | None:
        """Return the optimizer class that trains the parameters of ``rule``, or None where the spec names none.

        Example:
            >>> spec = ckptkit.param_group_preset("muon", torch.nn.Linear(2, 2))
            >>> [spec.optimizer_of(rule) for rule in spec.rules]
            ['Muon', 'AdamW']
        """
        require_type(rule, GroupRule, "rule", "a GroupRule of the spec")
        return rule.optimizer or self.optimizer

    def defaults_for(self, rule: GroupRule) -> dict[str, Any]:
        """Return ``defaults``, updated with the options in ``optimizers`` for the optimizer class of ``rule``.

        Example:
            >>> spec = ckptkit.param_group_preset("muon", torch.nn.Linear(2, 2), lr=0.02, adamw_lr=3e-4)
            >>> [spec.defaults_for(rule)["lr"] for rule in spec.rules]
            [0.02, 0.0003]
        """
        return {**self.defaults, **self.optimizers.get(self.optimizer_of(rule) or "", {})}


def number_fault(value: object, *, signed: bool = False) -> str | None:
    """Return why ``value`` is not a usable learning rate or weight decay (``is negative (-1)``), or None.

    A torch tensor with one element counts as a number, as it does for ``torch.optim``. A negative number is
    usable if ``signed``.
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
    return f"is negative ({value})" if number < 0 and not signed else None


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Return whether ``value`` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")  # no tensor can exist before torch was imported
    return torch is not None and isinstance(value, torch.Tensor)
