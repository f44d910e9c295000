"""Explain the options of one parameter: the rule that owns it, later rules that match it, and its modifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptkit.core.result import Result
from ckptkit.core.text import kind_of, nearest, printable, quoted
from ckptkit.errors import GroupsError
from ckptkit.inputs import CheckpointLike
from ckptkit.param_groups.ownership import OptionStep, RuleMatcher, resolve_options
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.properties import ParameterInfo, parameter_table

__all__ = ["Explanation", "explain_param_group"]

Outcome = Literal["trained", "frozen", "freeze", "unowned"]


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Result):
    """The effect of a spec on one parameter.

    - ``outcome``: ``trained``, ``frozen`` (by the model), ``freeze`` (by the spec) or ``unowned``.
    - ``rule`` owns the parameter, or is None. ``shadowed`` are later rules that match it too.
    - ``modifiers`` apply in this order. ``layer`` is the number of the layer that the parameter is in.
    - ``steps`` are the changes that lead to ``options``, in order. ``options`` is None where nothing trains.

    Example:
        >>> ckptkit.explain_param_group("fixtures/lenet_10class.pth", "fixtures/groups.toml", "fc3.bias").options["lr"]
        0.01
    """

    parameter: ParameterInfo
    outcome: Outcome
    rule: str | None
    shadowed: tuple[str, ...] = ()
    modifiers: tuple[str, ...] = ()
    layer: int | None = None
    steps: tuple[OptionStep, ...] = ()
    options: Mapping[str, Any] | None = None

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        owner = "" if self.rule is None else f", {quoted(self.rule)}"
        return f"{printable(self.parameter.name)}, {self.outcome}{owner}"


def explain_param_group(model: CheckpointLike, spec: SpecLike, name: str) -> Explanation:
    """Return which rules and modifiers of ``spec`` apply to the parameter ``name`` of ``model``, and its options.

    ``model`` and ``spec`` are what ``plan_param_groups`` accepts, paths included. A tied parameter is found under any
    of its names, and is reported under the first. Raises ``GroupsError`` where the model has no parameter of that name.

    Example:
        >>> explain_param_group("py:fixtures.lenet:build", "fixtures/groups.toml", "fc3.weight").rule
        'head'
    """
    if not isinstance(name, str):
        raise GroupsError(
            f"the name of the parameter is {kind_of(name)}, not a string", hint="use a name of model.named_parameters()"
        )
    table, spec = parameter_table(model), parse_spec(spec)
    parameter = table.parameter(name)
    if parameter is None:
        near = nearest(name, table.by_name, cutoff=0.5)
        why = "is a buffer, which no optimizer trains" if name in table.buffers else "is not a parameter of the model"
        raise GroupsError(
            f"{quoted(name)} {why}",
            hint=f"did you mean {quoted(near)}?" if near else "ckpt show MODEL lists the names of the parameters",
            call=None if near else "model.named_parameters() lists the names of the parameters",
        )
    matcher = RuleMatcher(spec, table)
    owner = matcher.owner(parameter)
    rule = None if owner is None else spec.rules[owner]
    rule_name = None if rule is None else rule.name
    shadowed = [other.name for other in matcher.matching_rules(parameter) if other is not rule]
    if spec.rules[-1].rest and spec.rules[-1] is not rule:
        shadowed.append(spec.rules[-1].name)
    if not parameter.trainable and spec.frozen != "include":
        return Explanation(parameter, "frozen", rule_name, tuple(shadowed))
    if rule is None or rule.freeze:
        is_frozen = rule is not None or spec.unmatched == "freeze"
        return Explanation(parameter, "freeze" if is_frozen else "unowned", rule_name, tuple(shadowed))
    applied = matcher.modifiers(parameter)
    options, steps = resolve_options(spec, rule, applied)
    return Explanation(
        parameter,
        "trained",
        rule.name,
        tuple(shadowed),
        tuple(entry.modifier.name for entry in applied),
        next((entry.layer for entry in applied if entry.layer is not None), None),
        tuple(steps),
        options,
    )
