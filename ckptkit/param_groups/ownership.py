"""Who speaks for a parameter: the first rule that fits owns it, and every modifier that fits applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.conditions import Depths
from ckptkit.param_groups.properties import ParameterFacts, Subject
from ckptkit.param_groups.spec import GroupRule, Modifier, ParamGroupSpec, number_fault

__all__ = ["Applied", "Said", "Speakers", "resolve"]


@dataclass(frozen=True, slots=True)
class Applied:
    """A modifier that applies; with layers, in which layer the parameter lies and what its lr is multiplied by."""

    modifier: Modifier
    layer: int | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Said:
    """One step: ``who`` made option ``key`` into ``value``, multiplying it by ``factor`` where that is not None."""

    who: str
    key: str
    value: Any
    factor: float | None = None


def resolve(spec: ParamGroupSpec, rule: GroupRule, applied: Sequence[Applied]) -> tuple[dict[str, Any], list[Said]]:
    """Return the options that the optimizer gets, and how they came about.

    Each speaker sets options and then multiplies what stands; the learning rate comes out as a number, and beside it,
    where the spec asks for ``lr_scale``, as the number before all multiples with their product. Raises ``GroupsError``
    where multiples make of a number what is none to train with.
    """
    said = [Said("defaults", key, value) for key, value in spec.given(rule).items()]
    options = spec.given(rule)
    scale = 1.0

    def speak(who: str, values: Mapping[str, Any], multiples: Mapping[str, float]) -> None:
        nonlocal scale
        for key, value in values.items():
            options[key] = value
            scale = 1.0 if key == "lr" else scale
            said.append(Said(who, key, value))
        for key, factor in multiples.items():
            if key == "lr" and spec.lr_scale:
                scale *= factor
                said.append(Said(who, "lr_scale", scale, factor))
            else:
                options[key] = options[key] * factor
                said.append(Said(who, key, options[key], factor))

    speak(rule.name, rule.options, rule.multiples)
    for one in applied:
        speak(one.modifier.name, one.modifier.options, one.modifier.multiples)
        if one.layer is not None:
            speak(f"{one.modifier.name}, layer {one.layer}", {}, {"lr": one.scale})
    if spec.lr_scale:
        options["lr_scale"] = scale
    for one_said in said:
        fault = None if one_said.factor is None else number_fault(options[one_said.key])
        if fault is not None:
            raise GroupsError(
                f"{quoted(one_said.key)} of group {quoted(rule.name)}, multiplied by all that fit, {fault}",
                hint=f"ckpt groups explain tells each step; {quoted(one_said.who)} is one of them",
            )
    return options, said


class Speakers:
    """A spec over one subject; remembers which patterns and modifiers ever spoke, and what only a model could tell."""

    def __init__(self, spec: ParamGroupSpec, subject: Subject) -> None:
        """Look up once what each question needs: the layers, and the rule for what nobody fits."""
        self.spec = spec
        self._rules = [
            (index, rule, [(pattern.text, pattern.match) for pattern in rule.patterns])
            for index, rule in enumerate(spec.rules)
            if not rule.rest
        ]
        names = {rule.name: index for index, rule in enumerate(spec.rules)}
        self._rest = len(spec.rules) - 1 if spec.rules[-1].rest else names.get(spec.unmatched)
        self.depths: dict[str, Depths] = {}
        for modifier in spec.modifiers:
            if modifier.layers is not None:
                fitting = [name for name, facts in subject.by_name.items() if modifier.fits(facts)]
                self.depths[modifier.name] = modifier.layers.depths(fitting)
        self.hits: set[tuple[int, str]] = set()
        self.applied: set[str] = set()
        self.without_layer: dict[str, list[str]] = {}
        self.unsure: dict[str, list[str]] = {}

    def owner(self, facts: ParameterFacts) -> int | None:
        """Return the index of the rule that owns it, or None."""
        for index, rule, patterns in self._rules:
            text = _first(patterns, facts.name) if patterns else ""
            if text is None:
                continue
            holds = rule.condition_of(facts)
            if holds:
                self.hits.add((index, text))
                return index
            if holds is None:
                self.unsure.setdefault(rule.name, []).append(facts.name)
        return self._rest

    def fitting(self, facts: ParameterFacts) -> list[GroupRule]:
        """Return every rule that fits it, ``rest`` aside."""
        return [
            rule
            for _, rule, patterns in self._rules
            if (not patterns or _first(patterns, facts.name) is not None) and rule.condition_of(facts)
        ]

    def modifiers(self, facts: ParameterFacts) -> tuple[Applied, ...]:
        """Return the modifiers that apply to it, in order."""
        found = []
        for modifier in self.spec.modifiers:
            fits = modifier.fits(facts)
            if not fits:
                if fits is None:
                    self.unsure.setdefault(modifier.name, []).append(facts.name)
                continue
            if modifier.layers is None:
                found.append(Applied(modifier))
            else:
                depths = self.depths[modifier.name]
                layer = depths.layer.get(facts.name)
                if layer is None:
                    self.without_layer.setdefault(modifier.name, []).append(facts.name)
                    continue
                found.append(Applied(modifier, layer, modifier.layers.scale(layer, depths.count)))
            self.applied.add(modifier.name)
        return tuple(found)


def _first(patterns: Sequence[tuple[str, object]], name: str) -> str | None:
    return next((text for text, fits in patterns if fits(name)), None)  # type: ignore[operator]
