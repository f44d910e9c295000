"""The findings about a spec for a model: rules that own nothing, parameters without a rule, and assumptions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ckptkit.core.config_files import toml_value
from ckptkit.core.findings import Finding
from ckptkit.core.patterns import matches_any, suggest_pattern
from ckptkit.core.text import listed, plural, quoted
from ckptkit.param_groups import codes
from ckptkit.param_groups.conditions import condition_table
from ckptkit.param_groups.ownership import RuleMatcher
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.spec.fields import GroupRule, Modifier

__all__ = ["SpecFindings"]

_SHOWN = 5
_MATRIX = 2  # the dimensions of a matrix


@dataclass(frozen=True, slots=True)
class SpecFindings:
    """Makes the findings about one spec over one model, after ``matcher`` has seen every parameter.

    The reason why a rule owns nothing is computed only for such rules, because it takes time.
    """

    table: ParameterTable
    spec: ParamGroupSpec
    matcher: RuleMatcher

    def idle(self, idle: Collection[int], explained: Collection[int]) -> Iterator[Finding]:
        """Yield a finding for each rule that owns nothing, and for each pattern and modifier that matches nothing.

        ``idle`` has the indices of the rules that own nothing. ``explained`` has those with a finding already.
        """
        for index, rule in enumerate(self.spec.rules):
            if not rule.optional and index not in explained and not (index in idle and self._is_overridden(rule)):
                yield from [self._idle_rule(rule)] if index in idle else self._idle_patterns(index)
        for modifier in self.spec.modifiers:
            if not modifier.optional and modifier.name not in self.matcher.applied:
                yield self._idle_modifier(modifier)

    def remarks(self) -> Iterator[Finding]:
        """Yield warnings and notes: unused options, layers, conditions that need the live model, and assumptions."""
        used = {self.spec.optimizer_of(rule) for rule in self.spec.rules}
        for name in self.spec.optimizers:
            if name not in used:
                yield codes.OPTIMIZER_UNUSED.finding(
                    name,
                    f"[optimizers.{name}] has options for an optimizer class that no group uses",
                    f"name the class in a group, or at the top of the spec: optimizer = {quoted(name)}",
                )
        for name, without in self.matcher.without_layer.items():
            are, keep = ("is", "keeps") if len(without) == 1 else ("are", "keep")
            yield codes.LAYER_UNMATCHED.finding(
                without[0],
                f"{plural(len(without), 'parameter')} {are} in no layer of modifier {quoted(name)}, "
                f"and {keep} the full lr: {listed(without, _SHOWN)}",
                "add them to layers, or exclude them from the modifier with params or match",
                keys=without,
            )
        for name, numbers in self.matcher.layers.items():
            if numbers.gaps:
                yield codes.LAYER_GAP.finding(
                    name,
                    f"modifier {quoted(name)} finds no layer {', '.join(numbers.gaps)} in the model, "
                    "and numbers the layers above without a gap",
                )
        for name, undecided in self.matcher.undecided.items():
            yield codes.NEEDS_MODEL.finding(
                undecided[0],
                f"only the live model can tell whether {quoted(name)} matches "
                f"{listed(dict.fromkeys(undecided), _SHOWN)}; here it counts as no match",
                "give the live model: --model py:MODULE:CALLABLE",
                keys=undecided,
            )
        for assumed in self.table.assumed:
            yield codes.ASSUMED.finding("", assumed)

    def overlap(self, parameter: ParameterInfo) -> Iterator[Finding]:
        """Yield a finding where several rules match ``parameter``, for a spec that forbids this."""
        matching = self.matcher.matching_rules(parameter)
        if len(matching) > 1 and not matching[0].override:
            yield codes.OVERLAP.finding(
                parameter.name,
                f"{quoted(parameter.name)} matches groups {' and '.join(quoted(rule.name) for rule in matching)}",
                'narrow their patterns, or let the first group own the parameter: overlap = "first"',
            )

    def lazy(self, parameter: ParameterInfo) -> Finding:
        """Return the finding that ``parameter`` has no shape yet."""
        return codes.LAZY.finding(
            parameter.name,
            f"{quoted(parameter.name)} is uninitialised: a lazy module has no shapes before its first forward pass",
            "run the model once on a sample batch, then build the groups",
        )

    def frozen(self, frozen: Sequence[ParameterInfo]) -> Finding:
        """Return the finding that the parameters in ``frozen`` are frozen, for a spec that forbids this."""
        verb = "has" if len(frozen) == 1 else "have"
        return codes.FROZEN.finding(
            frozen[0].name,
            f"{plural(len(frozen), 'parameter')} {verb} requires_grad=False, "
            f'and the spec says frozen = "error": {_names(frozen)}',
            'unfreeze with requires_grad_(True), or write frozen = "skip" into the spec',
            keys=(parameter.name for parameter in frozen),
        )

    def split_tie(
        self, parameter: ParameterInfo, alias: ParameterInfo, owner: int, other: int, option: str | None
    ) -> Finding:
        """Return the finding that two names of one tied parameter would get different options.

        ``owner`` and ``other`` are the indices of their rules. ``option`` is the first option that differs, or None
        where one of the rules freezes.
        """
        mine, theirs = quoted(self.spec.rules[owner].name), quoted(self.spec.rules[other].name)
        tied = f"{quoted(parameter.name)} and {quoted(alias.name)} are one tied parameter"
        if owner == other:
            return codes.TIED.finding(
                parameter.name,
                f"{tied}, but would get different values of {quoted(option or 'option')} in group {mine}",
                'let the first name decide: tied = "first"',
            )
        return codes.TIED.finding(
            parameter.name,
            f"{tied}, but match groups {mine} and {theirs}, which have different options",
            f"put both names into one group: params = [{parameter.name!r}, {alias.name!r}]",
        )

    def unowned(self, unowned: Sequence[ParameterInfo]) -> Finding:
        """Return the finding that no rule matches the trainable parameters in ``unowned``."""
        verb = "matches" if len(unowned) == 1 else "match"
        return codes.UNOWNED.finding(
            unowned[0].name,
            f"{plural(len(unowned), 'trainable parameter')} {verb} no group: {_names(unowned)}",
            'add a group that matches, or at the end one in three lines: [[group]], name = "base", rest = true',
            keys=(parameter.name for parameter in unowned),
        )

    def vectors(self, owned: Sequence[tuple[int, ParameterInfo]]) -> Iterator[Finding]:
        """Yield a finding for each group that gives vectors to Muon.

        Only vectors are reported: some versions of Muon flatten a convolution to a matrix, but none takes a vector.
        """
        vectors_by_owner: dict[int, list[ParameterInfo]] = {}
        for owner, parameter in owned:
            if parameter.shape is not None and len(parameter.shape) < _MATRIX:
                vectors_by_owner.setdefault(owner, []).append(parameter)
        for owner, vectors in vectors_by_owner.items():
            rule = self.spec.rules[owner]
            if self.spec.optimizer_of(rule) == "Muon":
                yield codes.MATRICES_ONLY.finding(
                    vectors[0].name,
                    f"group {quoted(rule.name)} trains with Muon, which takes matrices, but has "
                    f"{plural(len(vectors), 'parameter')} with fewer than two dimensions: {_names(vectors)}",
                    "write match = { ndim = 2 } for Muon, and train the others with a second optimizer, such as AdamW",
                    severity="warning",
                    keys=(parameter.name for parameter in vectors),
                )

    def _idle_patterns(self, index: int) -> Iterator[Finding]:
        """Yield a finding for each pattern that matches nothing, of a rule that owns parameters by other patterns."""
        rule = self.spec.rules[index]
        names = self.table.by_name
        for pattern in rule.patterns:
            if (index, pattern.text) not in self.matcher.matched and not any(map(pattern.match, names)):
                yield codes.RULE_UNMATCHED.finding(
                    pattern.text,
                    f"pattern {quoted(pattern.text)} of group {quoted(rule.name)} matches no parameter of the model",
                    suggest_pattern(pattern, names),
                )

    def _is_overridden(self, rule: GroupRule) -> bool:
        """Return whether ``rule`` would own a parameter if no earlier rule had ``override``."""
        return any(
            self.spec.rules[owner].override
            for parameter in self.table.trainable()
            if rule.rest or rule.matches(parameter)
            if (owner := self.matcher.owner(parameter)) is not None
        )

    def _idle_rule(self, rule: GroupRule) -> Finding:
        group = f"group {quoted(rule.name)}"
        trainable = list(self.table.trainable())
        if not trainable:
            return codes.RULE_FROZEN.finding(
                rule.name,
                f"{group} owns no parameter: the model has no trainable parameter",
                "unfreeze the parameters that must train: requires_grad_(True)",
            )
        if rule.rest:
            return codes.RULE_UNMATCHED.finding(
                rule.name,
                f"{group} has rest = true, but the groups before it own all {plural(len(trainable), 'parameter')}",
                "narrow their patterns, remove this group, or set optional = true",
            )
        shadowed = [parameter for parameter in trainable if rule.matches(parameter)]
        if shadowed:
            owners = " and ".join(map(quoted, dict.fromkeys(map(self._owner_name, shadowed))))
            return codes.RULE_SHADOWED.finding(
                rule.name,
                f"{group} owns no parameter: every parameter that it matches is in an earlier group, {owners} "
                f"({_names(shadowed)})",
                "move the group with the narrower patterns up: the first group that matches a parameter owns it",
            )
        tied = [(alias, parameter) for parameter in trainable for alias in parameter.aliases if rule.matches(alias)]
        if tied:
            alias, parameter = tied[0]
            return codes.RULE_TIED.finding(
                alias.name,
                f"{group} owns no parameter: {quoted(alias.name)} is tied to {quoted(parameter.name)}, "
                f"which group {quoted(self._owner_name(parameter))} owns",
                f"write {quoted(parameter.name)} instead: a tied parameter is listed under its first registered name",
            )
        frozen = [parameter for parameter in self.table.parameters if any(map(rule.matches, parameter.named()))]
        if frozen:
            return codes.RULE_FROZEN.finding(
                rule.name,
                f"{group} matches only frozen parameters ({_names(frozen)} with requires_grad=False)",
                "unfreeze them with requires_grad_(True), remove the group, or set optional = true",
            )
        buffer = next((name for name in self.table.buffers if matches_any(rule.patterns, name)), None)
        if buffer is not None:
            return codes.RULE_UNMATCHED.finding(
                rule.name,
                f"{group} matches no parameter, only buffers such as {quoted(buffer)}, which no optimizer trains",
                "remove the group, or write patterns of parameters",
            )
        return self._matches_nothing(rule, group)

    def _idle_modifier(self, modifier: Modifier) -> Finding:
        text = f"modifier {quoted(modifier.name)}"
        matching = [parameter for parameter in self.table.parameters if any(map(modifier.matches, parameter.named()))]
        if matching and all(not parameter.trainable for parameter in matching):
            return codes.RULE_FROZEN.finding(
                modifier.name,
                f"{text} matches only frozen parameters ({_names(matching)} with requires_grad=False)",
                "remove the modifier, or set optional = true",
            )
        return self._matches_nothing(modifier, text)

    def _matches_nothing(self, rule: GroupRule | Modifier, text: str) -> Finding:
        asked = []
        if rule.patterns:
            asked.append("params = " + ", ".join(quoted(pattern.text) for pattern in rule.patterns))
        if rule.condition is not None:
            asked.append(f"match = {toml_value(condition_table(rule.condition))}")
        if isinstance(rule, Modifier) and rule.layers is not None:
            asked.append("its layers")
        hint = "compare with the names, modules and shapes of the model, or set optional = true"
        if rule.patterns and not any(matches_any(rule.patterns, name) for name in self.table.by_name):
            hint = suggest_pattern(rule.patterns[0], self.table.by_name)
        return codes.RULE_UNMATCHED.finding(
            rule.name, f"{text} matches no parameter of the model: {' and '.join(asked)}", hint
        )

    def _owner_name(self, parameter: ParameterInfo) -> str:
        owner = self.matcher.owner(parameter)
        return "" if owner is None else self.spec.rules[owner].name


def _names(parameters: Sequence[ParameterInfo]) -> str:
    return listed([parameter.name for parameter in parameters], _SHOWN)
