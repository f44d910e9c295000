"""Who speaks for a parameter: the first rule that fits owns it, and every modifier that fits applies."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.param_groups.layers import Depths
from ckptkit.param_groups.properties import ParameterFacts, Subject
from ckptkit.param_groups.resolve import Applied
from ckptkit.param_groups.spec import GroupRule, ParamGroupSpec

__all__ = ["Speakers"]


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
