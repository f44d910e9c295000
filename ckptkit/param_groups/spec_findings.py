"""What is wrong with a spec over a model, in sentences: rules that own nothing, parameters that nobody owns, doubt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ckptkit.core.findings import Finding, Severity
from ckptkit.core.patterns import suggest_pattern
from ckptkit.core.text import listed, plural, quoted
from ckptkit.param_groups.ownership import RuleMatcher
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable
from ckptkit.param_groups.spec import GroupRule, Modifier, ParamGroupSpec

__all__ = ["SpecFindings"]

_REST = 'write a rule that fits, or end with one that takes what is left: [[group]] name = "base", rest = true'
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class SpecFindings:
    """Why a rule owns nothing, which is worked out only for the rules that do not, and other doubt about a spec."""

    table: ParameterTable
    spec: ParamGroupSpec
    matcher: RuleMatcher

    def idle(self, idle: Collection[int], explained: Collection[int]) -> Iterator[Finding]:
        """Yield why rules, patterns and modifiers fit nothing."""
        for index, rule in enumerate(self.spec.rules):
            if not rule.optional and index not in explained:
                yield from self._idle_rule(index) if index in idle else self._idle_patterns(index)
        for modifier in self.spec.modifiers:
            if not modifier.optional and modifier.name not in self.matcher.applied:
                yield self._idle_modifier(modifier)

    def remarks(self) -> Iterator[Finding]:
        """Yield what is only assumed, unsure or left at its value."""
        trained = {self.spec.optimizer_of(rule) for rule in self.spec.rules}
        for name in self.spec.optimizers:
            if name not in trained:
                yield _finding(
                    "groups.optimizer-unused",
                    name,
                    f"[optimizers.{name}] gives options to a class that no group trains with",
                    f"name it in a group, or at the top of the spec: optimizer = {quoted(name)}",
                    "warning",
                )
        for name, without in self.matcher.without_layer.items():
            yield _finding(
                "groups.layer-unmatched",
                without[0],
                f"modifier {quoted(name)} puts {plural(len(without), 'parameter')} that it fits into no layer, "
                f"and they keep their full lr: {listed(without, _SHOWN)}",
                "name them in layers, or leave them out with params or match",
                "warning",
            )
        for name, numbers in self.matcher.layers.items():
            if numbers.gaps:
                yield _finding(
                    "groups.layer-gap",
                    name,
                    f"modifier {quoted(name)} counts layers without a hole, but the model has no number "
                    f"{', '.join(numbers.gaps)} between the others",
                    "",
                    "note",
                )
        for name, unsure in self.matcher.undecided.items():
            shown = listed(dict.fromkeys(unsure), _SHOWN)
            yield _finding(
                "groups.needs-model",
                unsure[0],
                f"only a live model tells whether {quoted(name)} fits {shown}; here it does not",
                "give the live model: --model py:MODULE:CALLABLE",
                "warning",
            )
        for assumed in self.table.assumed:
            yield _finding("groups.assumed", "", assumed, "", "note")

    def _idle_patterns(self, index: int) -> Iterator[Finding]:
        """One pattern of a list can be a slip while the rule as a whole owns something."""
        rule = self.spec.rules[index]
        names = self.table.by_name
        for pattern in rule.patterns:
            if (index, pattern.text) not in self.matcher.matched and not any(map(pattern.match, names)):
                yield _finding(
                    "groups.rule-unmatched",
                    pattern.text,
                    f"pattern {quoted(pattern.text)} of group {quoted(rule.name)} fits no parameter of the model",
                    suggest_pattern(pattern, names),
                )

    def _idle_rule(self, index: int) -> Iterator[Finding]:
        rule = self.spec.rules[index]
        who = f"group {quoted(rule.name)}"
        trainable = list(self.table.trainable())
        if not trainable:
            yield _finding(
                "groups.rule-frozen",
                rule.name,
                f"{who} owns nothing: the model has no trainable parameter",
                "unfreeze what shall train: requires_grad_(True)",
            )
        elif rule.rest:
            yield _finding(
                "groups.rule-unmatched",
                rule.name,
                f"{who} has rest = true, but the groups before it own all {plural(len(trainable), 'parameter')}",
                "narrow their patterns, drop the group, or set optional = true",
            )
        else:
            yield self._idle(rule, who, trainable)

    def _idle(self, rule: GroupRule, who: str, trainable: Sequence[ParameterInfo]) -> Finding:
        def fits(parameter: ParameterInfo) -> bool:
            named = not rule.patterns or any(pattern.match(parameter.name) for pattern in rule.patterns)
            return named and bool(rule.condition_holds(parameter))

        taken = [parameter for parameter in trainable if fits(parameter)]
        if taken:
            takers = " and ".join(map(quoted, dict.fromkeys(map(self._owner_name, taken))))
            return _finding(
                "groups.rule-shadowed",
                rule.name,
                f"{who} owns nothing: all that it fits ({_names(taken)}) is owned by group {takers} before it",
                "move the narrower group up: the first that fits wins",
            )
        tied = [(alias, parameter) for parameter in trainable for alias in parameter.aliases if fits(alias)]
        if tied:
            alias, parameter = tied[0]
            return _finding(
                "groups.rule-tied",
                alias.name,
                f"{who} owns nothing: {quoted(alias.name)} is tied to {quoted(parameter.name)}, "
                f"which is owned by group {quoted(self._owner_name(parameter))}",
                f"name the parameter as {quoted(parameter.name)}: a tied one goes by its first registered name",
            )
        frozen = [parameter for parameter in self.table.parameters if any(map(fits, parameter.named()))]
        if frozen:
            return _finding(
                "groups.rule-frozen",
                rule.name,
                f"{who} fits only frozen parameters ({_names(frozen)} with requires_grad=False)",
                "unfreeze them with requires_grad_(True), drop the group, or set optional = true",
            )
        buffer = next(
            (name for name in self.table.buffers if any(pattern.match(name) for pattern in rule.patterns)), None
        )
        if buffer is not None:
            return _finding(
                "groups.rule-unmatched",
                rule.name,
                f"{who} fits no parameter, only buffers such as {quoted(buffer)}, which no optimizer trains",
                "drop the group, or name parameters",
            )
        return self._fits_nothing(rule, who)

    def _idle_modifier(self, modifier: Modifier) -> Finding:
        who = f"modifier {quoted(modifier.name)}"
        fitting = [parameter for parameter in self.table.parameters if any(map(modifier.matches, parameter.named()))]
        if fitting and all(not parameter.trainable for parameter in fitting):
            return _finding(
                "groups.rule-frozen",
                modifier.name,
                f"{who} fits only frozen parameters ({_names(fitting)} with requires_grad=False)",
                "drop the modifier, or set optional = true",
            )
        return self._fits_nothing(modifier, who)

    def _fits_nothing(self, rule: GroupRule | Modifier, who: str) -> Finding:
        asked = []
        if rule.patterns:
            asked.append("params = " + ", ".join(quoted(pattern.text) for pattern in rule.patterns))
        if rule.condition is not None:
            asked.append("what it asks in match")
        if isinstance(rule, Modifier) and rule.layers is not None:
            asked.append("its layers")
        hint = "look at the names, modules and shapes that the model has, or set optional = true"
        if rule.patterns and not any(pattern.match(name) for pattern in rule.patterns for name in self.table.by_name):
            hint = suggest_pattern(rule.patterns[0], self.table.by_name)
        return _finding(
            "groups.rule-unmatched", rule.name, f"{who} fits no parameter of the model: {' and '.join(asked)}", hint
        )

    def _owner_name(self, parameter: ParameterInfo) -> str:
        owner = self.matcher.owner(parameter)
        return "" if owner is None else self.spec.rules[owner].name

    def overlap(self, parameter: ParameterInfo) -> Iterator[Finding]:
        """Yield that more than one rule fits, where the spec forbids it."""
        fitting = self.matcher.matching_rules(parameter)
        if len(fitting) > 1:
            yield _finding(
                "groups.overlap",
                parameter.name,
                f"{quoted(parameter.name)} fits groups {' and '.join(quoted(rule.name) for rule in fitting)}",
                'narrow their patterns, or let the first own it: overlap = "first"',
            )

    def lazy(self, parameter: ParameterInfo) -> Finding:
        """Return that a parameter has no shape yet."""
        return _finding(
            "groups.lazy",
            parameter.name,
            f"{quoted(parameter.name)} is uninitialised: a lazy module has no shapes before its first forward pass",
            "run the model once on a sample batch, then build the groups",
        )

    def frozen(self, frozen: Sequence[ParameterInfo]) -> Finding:
        """Return that parameters are frozen, where the spec forbids it."""
        return _finding(
            "groups.frozen",
            frozen[0].name,
            f'{plural(len(frozen), "parameter")} with requires_grad=False, and the spec has frozen = "error": '
            f"{_names(frozen)}",
            'unfreeze them with requires_grad_(True), or write frozen = "skip"',
        )

    def split_tie(
        self, parameter: ParameterInfo, alias: ParameterInfo, owner: int, other: int, option: str | None
    ) -> Finding:
        """Return that two names of one parameter would get different options."""
        mine, theirs = self.spec.rules[owner].name, self.spec.rules[other].name
        falls = (
            f"fall to groups {quoted(mine)} and {quoted(theirs)} with different options"
            if owner != other
            else f"would get a different {quoted(option or 'option')} in group {quoted(mine)}"
        )
        way = f"put both names into one group: params = [{parameter.name!r}, {alias.name!r}]"
        return _finding(
            "groups.tied",
            parameter.name,
            f"{quoted(parameter.name)} and {quoted(alias.name)} are one tied parameter, but {falls}",
            way if owner != other else 'let its first name decide: tied = "first"',
        )

    def unowned(self, unowned: Sequence[ParameterInfo]) -> Finding:
        """Return that trainable parameters fall to no rule."""
        verb = "is" if len(unowned) == 1 else "are"
        return _finding(
            "groups.unowned",
            unowned[0].name,
            f"{plural(len(unowned), 'trainable parameter')} {verb} owned by no group: {_names(unowned)}",
            _REST,
        )

    def vectors(self, assigned: Sequence[tuple[int, ParameterInfo]]) -> Iterator[Finding]:
        """Yield which groups give vectors to Muon: some versions flatten convolutions, none takes vectors."""
        held: dict[int, list[ParameterInfo]] = {}
        for owner, parameter in assigned:
            if parameter.shape is not None and len(parameter.shape) < 2:
                held.setdefault(owner, []).append(parameter)
        for owner, vectors in held.items():
            rule = self.spec.rules[owner]
            if self.spec.optimizer_of(rule) == "Muon":
                yield _finding(
                    "groups.matrices-only",
                    vectors[0].name,
                    f"group {quoted(rule.name)} trains with Muon, which takes matrices, and has "
                    f"{plural(len(vectors), 'parameter')} of fewer than two dimensions: {_names(vectors)}",
                    "ask for match = { ndim = 2 }, and give the others to a second optimizer, such as AdamW",
                    "warning",
                )


def _finding(code: str, key: str, message: str, hint: str, severity: Severity = "error") -> Finding:
    return Finding(code, severity, key, message, hint)


def _names(found: Sequence[ParameterInfo]) -> str:
    return listed([parameter.name for parameter in found], _SHOWN)
