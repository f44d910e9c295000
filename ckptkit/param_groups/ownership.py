"""Find the rule that owns each parameter, the modifiers that apply to it, and the options that result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.patterns import Pattern
from ckptkit.core.text import quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.conditions import LayerNumbers
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.spec.fields import GroupRule, Modifier, number_fault

__all__ = ["AppliedModifier", "OptionStep", "RuleMatcher", "resolve_options"]


@dataclass(frozen=True, slots=True)
class AppliedModifier:
    """A modifier that applies to a parameter.

    For a modifier with layers, ``layer`` is the layer of the parameter and ``scale`` multiplies its learning rate.
    """

    modifier: Modifier
    layer: int | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class OptionStep:
    """One change of an option: ``source`` set ``key`` to ``value``.

    ``source`` is ``defaults``, or the name of a rule or modifier. ``factor`` is the number that the option was
    multiplied by, or None where the option was set.
    """

    source: str
    key: str
    value: Any
    factor: float | None = None


def resolve_options(
    spec: ParamGroupSpec, rule: GroupRule, applied: Sequence[AppliedModifier]
) -> tuple[dict[str, Any], list[OptionStep]]:
    """Return the options that the optimizer gets, and every change that leads to them, in order.

    The defaults come first, then the rule, then each modifier. Each of them sets its options and then multiplies the
    values so far. With ``spec.lr_scale``, ``lr`` keeps its value and ``lr_scale`` holds the product of its multiples.
    Raises ``GroupsError`` where a product is not a usable number.
    """
    options = spec.defaults_for(rule)
    steps = [OptionStep("defaults", key, value) for key, value in options.items()]
    lr_scale = 1.0

    def apply(source: str, values: Mapping[str, Any], multiples: Mapping[str, float]) -> None:
        nonlocal lr_scale
        for key, value in values.items():
            options[key] = value
            lr_scale = 1.0 if key == "lr" else lr_scale
            steps.append(OptionStep(source, key, value))
        for key, factor in multiples.items():
            if key == "lr" and spec.lr_scale:
                lr_scale *= factor
                steps.append(OptionStep(source, "lr_scale", lr_scale, factor))
            else:
                options[key] = options[key] * factor
                steps.append(OptionStep(source, key, options[key], factor))

    apply(rule.name, rule.options, rule.multiples)
    for entry in applied:
        apply(entry.modifier.name, entry.modifier.options, entry.modifier.multiples)
        if entry.layer is not None:
            apply(f"{entry.modifier.name}, layer {entry.layer}", {}, {"lr": entry.scale})
    if spec.lr_scale:
        options["lr_scale"] = lr_scale
    for step in steps:
        fault = None if step.factor is None else number_fault(options[step.key])
        if fault is not None:
            parts = [
                f"{each.value if each.factor is None else each.factor} from {quoted(each.source)}"
                for each in steps
                if each.key == step.key
            ]
            raise GroupsError(
                f"{quoted(step.key)} of group {quoted(rule.name)} {fault} after all its multiples",
                hint=f"change one of its factors: {', '.join(parts)}",
            )
    return options, steps


class RuleMatcher:
    """Matches the rules and modifiers of a spec against the parameters of one model.

    While it matches, the matcher records the facts that findings report:

    - ``matched``: each pair of a rule index and a pattern that owns a parameter.
    - ``applied``: the names of the modifiers that apply to a parameter.
    - ``without_layer``: for each modifier, the parameters that it matches but that are in none of its layers.
    - ``undecided``: for each rule or modifier, the parameters that only the live model can decide about.
    """

    def __init__(self, spec: ParamGroupSpec, table: ParameterTable) -> None:
        """Number the layers of each modifier, and find the rule that owns the parameters that no other rule matches."""
        self.spec = spec
        self._rules = [(index, rule) for index, rule in enumerate(spec.rules) if not rule.rest]
        indices = {rule.name: index for index, rule in enumerate(spec.rules)}
        self._rest = len(spec.rules) - 1 if spec.rules[-1].rest else indices.get(spec.unmatched)
        self.layers: dict[str, LayerNumbers] = {}
        for modifier in spec.modifiers:
            if modifier.layers is not None:
                matching = [name for name, parameter in table.by_name.items() if modifier.matches(parameter)]
                self.layers[modifier.name] = modifier.layers.layer_numbers(matching)
        self.matched: set[tuple[int, str]] = set()
        self.applied: set[str] = set()
        self.without_layer: dict[str, list[str]] = {}
        self.undecided: dict[str, list[str]] = {}

    def owner(self, parameter: ParameterInfo) -> int | None:
        """Return the index of the rule that owns ``parameter``: the first that matches, or None."""
        for index, rule in self._rules:
            pattern = _first_match(rule.patterns, parameter.name)
            if pattern is None and rule.patterns:
                continue
            holds = rule.condition_holds(parameter)
            if holds:
                self.matched.add((index, "" if pattern is None else pattern.text))
                return index
            if holds is None:
                self.undecided.setdefault(rule.name, []).append(parameter.name)
        return self._rest

    def matching_rules(self, parameter: ParameterInfo) -> list[GroupRule]:
        """Return every rule that matches ``parameter``, except one with ``rest``."""
        return [rule for _, rule in self._rules if rule.matches(parameter)]

    def modifiers(self, parameter: ParameterInfo) -> tuple[AppliedModifier, ...]:
        """Return the modifiers that apply to ``parameter``, in the order of the spec."""
        found = []
        for modifier in self.spec.modifiers:
            matches = modifier.matches(parameter)
            if not matches:
                if matches is None:
                    self.undecided.setdefault(modifier.name, []).append(parameter.name)
                continue
            if modifier.layers is None:
                found.append(AppliedModifier(modifier))
            else:
                numbers = self.layers[modifier.name]
                layer = numbers.layer.get(parameter.name)
                if layer is None:
                    self.without_layer.setdefault(modifier.name, []).append(parameter.name)
                    continue
                found.append(AppliedModifier(modifier, layer, modifier.layers.scale(layer, numbers.count)))
            self.applied.add(modifier.name)
        return tuple(found)


def _first_match(patterns: Sequence[Pattern], name: str) -> Pattern | None:
    return next((pattern for pattern in patterns if pattern.match(name)), None)
