"""Who owns what: a spec laid over a live model, as a value to print, check or build from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.errors import GroupsError
from ckptkit.findings import Finding, Report
from ckptkit.param_groups.inventory import Inventory, LiveParameter, take_inventory
from ckptkit.param_groups.spec import GroupRule, ParamGroupSpec, SpecLike, is_tensor, parse_spec
from ckptkit.param_groups.suggest import suggest_pattern
from ckptkit.text import html_table, plural, printable, quoted

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["ParamGroupsPlan", "PlannedGroup", "PlannedParameter", "check_spec", "lay_over", "plan_param_groups"]

_REST = 'write a rule that fits, or end with one that takes what is left: [[group]] name = "base", rest = true'
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """A parameter as the plan names it: the first registered FQN, and the others where it is tied."""

    name: str
    shape: tuple[int, ...]
    elements: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """One group to be: its rule, all options that the optimizer will get, and its parameters in model order."""

    name: str
    rule: GroupRule
    options: Mapping[str, Any]
    parameters: tuple[PlannedParameter, ...]

    @property
    def elements(self) -> int:
        """Number of elements that this group trains."""
        return sum(parameter.elements for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class ParamGroupsPlan:
    """The groups in the order of their rules, the frozen parameters that no group holds, and idle optional rules."""

    groups: tuple[PlannedGroup, ...]
    frozen: tuple[PlannedParameter, ...] = ()
    idle: tuple[GroupRule, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements that all groups train."""
        return sum(group.elements for group in self.groups)

    def _repr_html_(self) -> str:
        return html_table(
            ("group", "parameters", "elements"),
            [(printable(group.name), f"{len(group.parameters):,}", f"{group.elements:,}") for group in self.groups],
        )


def plan_param_groups(model: Module, spec: SpecLike) -> ParamGroupsPlan:
    """Return which rule of ``spec`` owns which trainable parameter of ``model``: the first that fits its name.

    Raises ``GroupsError`` for a rule or a pattern that fits nothing or owns nothing (unless it is
    optional), a trainable parameter that no rule owns, one that is uninitialised, and a tied one whose
    names fall to rules with different options.
    """
    plan, report = lay_over(take_inventory(model), parse_spec(spec))
    report.raise_for_errors()
    return plan


def check_spec(model: Module, spec: SpecLike) -> Report:
    """Return all that ``plan_param_groups`` would refuse, at once.

    Raises ``GroupsError`` where the spec itself cannot be read.
    """
    return lay_over(take_inventory(model), parse_spec(spec))[1]


def lay_over(inventory: Inventory, spec: ParamGroupSpec) -> tuple[ParamGroupsPlan, Report]:
    """Return the plan and what is wrong with it; only a plan without errors may be built."""
    owners = _Owners(spec)
    owned: list[list[LiveParameter]] = [[] for _ in spec.rules]
    unowned: list[LiveParameter] = []
    frozen: list[LiveParameter] = []
    findings: list[Finding] = []
    excused: set[int] = set()  # rules whose emptiness another finding explains already
    for live in inventory.parameters.values():
        owner = owners.of(live.name)
        if not live.trainable:
            frozen.append(live)
            continue
        if owner is None:
            unowned.append(live)
            continue
        owned[owner].append(live)
        if live.lazy:
            findings.append(_lazy(live))
        for alias in live.aliases:
            other = owners.of(alias)
            if other is not None and not _same_options(spec, owner, other):
                findings.append(_torn(live, alias, spec.rules[owner], spec.rules[other]))
                excused.add(other)
    idle = [index for index, members in enumerate(owned) if not members]
    diagnosis = _Diagnosis(inventory, spec, owners)
    for index, rule in enumerate(spec.rules):
        if rule.optional or index in excused:
            continue
        findings.extend(diagnosis.idle_rule(index) if index in idle else diagnosis.idle_patterns(index))
    if unowned:
        findings.append(_unowned(unowned))
    plan = ParamGroupsPlan(
        tuple(
            PlannedGroup(rule.name, rule, spec.options(rule), tuple(map(_planned, members)))
            for rule, members in zip(spec.rules, owned, strict=True)
            if members
        ),
        tuple(map(_planned, frozen)),
        tuple(spec.rules[index] for index in idle),
    )
    return plan, Report(tuple(findings), GroupsError)


class _Owners:
    """The first rule that fits a name; remembers which patterns ever fitted first."""

    def __init__(self, spec: ParamGroupSpec) -> None:
        self._flat = [
            (index, pattern.text, pattern.match) for index, rule in enumerate(spec.rules) for pattern in rule.patterns
        ]
        self._rest = len(spec.rules) - 1 if spec.rules[-1].rest else None
        self.hits: set[tuple[int, str]] = set()

    def of(self, name: str) -> int | None:
        for index, text, fits in self._flat:
            if fits(name):
                self.hits.add((index, text))
                return index
        return self._rest


@dataclass(frozen=True, slots=True)
class _Diagnosis:
    """Why a rule owns nothing, which is worked out only for the rules that do not."""

    inventory: Inventory
    spec: ParamGroupSpec
    owners: _Owners

    def idle_patterns(self, index: int) -> Iterator[Finding]:
        """One pattern of a list can be a slip while the rule as a whole owns something."""
        rule = self.spec.rules[index]
        names = self.inventory.by_name
        for pattern in rule.patterns:
            if (index, pattern.text) not in self.owners.hits and not any(map(pattern.match, names)):
                yield _finding(
                    "groups.rule-unmatched",
                    pattern.text,
                    f"pattern {quoted(pattern.text)} of group {quoted(rule.name)} fits no parameter of the model",
                    suggest_pattern(pattern, names),
                )

    def idle_rule(self, index: int) -> Iterator[Finding]:
        rule = self.spec.rules[index]
        who = f"group {quoted(rule.name)}"
        trainable = list(self.inventory.trainable())
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

    def _idle(self, rule: GroupRule, who: str, trainable: Sequence[LiveParameter]) -> Finding:
        def fits(name: str) -> bool:
            return any(pattern.match(name) for pattern in rule.patterns)

        taken = [live for live in trainable if fits(live.name)]
        if taken:
            takers = _distinct(self._owner_name(live.name) for live in taken)
            return _finding(
                "groups.rule-shadowed",
                rule.name,
                f"{who} owns nothing: all that it fits ({_list(taken)}) is owned by group {takers} before it",
                "move the narrower group up: the first that fits wins",
            )
        tied = [(alias, live) for live in trainable for alias in live.aliases if fits(alias)]
        if tied:
            alias, live = tied[0]
            return _finding(
                "groups.rule-tied",
                alias,
                f"{who} owns nothing: {quoted(alias)} is tied to {quoted(live.name)}, "
                f"which is owned by group {quoted(self._owner_name(live.name))}",
                f"name the parameter as {quoted(live.name)}: a tied one goes by its first registered name",
            )
        frozen = [live for live in self.inventory.parameters.values() if any(map(fits, (live.name, *live.aliases)))]
        if frozen:
            return _finding(
                "groups.rule-frozen",
                rule.name,
                f"{who} fits only frozen parameters ({_list(frozen)} with requires_grad=False)",
                "unfreeze them with requires_grad_(True), drop the group, or set optional = true",
            )
        buffer = next((name for name, _ in self.inventory.buffers.values() if fits(name)), None)
        if buffer is not None:
            return _finding(
                "groups.rule-unmatched",
                rule.name,
                f"{who} fits no parameter, only buffers such as {quoted(buffer)}, which no optimizer trains",
                "drop the group, or name parameters",
            )
        texts = ", ".join(quoted(pattern.text) for pattern in rule.patterns)
        return _finding(
            "groups.rule-unmatched",
            rule.name,
            f"{who} fits no parameter of the model: params = {texts}",
            suggest_pattern(rule.patterns[0], self.inventory.by_name),
        )

    def _owner_name(self, name: str) -> str:
        owner = self.owners.of(name)
        return "" if owner is None else self.spec.rules[owner].name


def _finding(code: str, key: str, message: str, hint: str) -> Finding:
    return Finding(code, "error", key, message, hint)


def _lazy(live: LiveParameter) -> Finding:
    return _finding(
        "groups.lazy",
        live.name,
        f"{quoted(live.name)} is uninitialised: a lazy module has no shapes before its first forward pass",
        "run the model once on a sample batch, then build the groups",
    )


def _torn(live: LiveParameter, alias: str, owner: GroupRule, other: GroupRule) -> Finding:
    return _finding(
        "groups.tied",
        live.name,
        f"{quoted(live.name)} and {quoted(alias)} are one tied parameter, but fall to groups {quoted(owner.name)} "
        f"and {quoted(other.name)} with different options",
        f"put both names into one group: params = [{live.name!r}, {alias!r}]",
    )


def _unowned(unowned: Sequence[LiveParameter]) -> Finding:
    verb = "is" if len(unowned) == 1 else "are"
    return _finding(
        "groups.unowned",
        unowned[0].name,
        f"{plural(len(unowned), 'trainable parameter')} {verb} owned by no group: {_list(unowned)}",
        _REST,
    )


def _list(found: Sequence[LiveParameter]) -> str:
    more = len(found) - _SHOWN
    return ", ".join(quoted(live.name) for live in found[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _distinct(names: Iterator[str]) -> str:
    return " and ".join(map(quoted, dict.fromkeys(names)))


def _planned(live: LiveParameter) -> PlannedParameter:
    return PlannedParameter(live.name, live.shape, live.elements, live.aliases)


def _same_options(spec: ParamGroupSpec, one: int, other: int) -> bool:
    if one == other:
        return True
    mine, theirs = spec.options(spec.rules[one]), spec.options(spec.rules[other])
    return mine.keys() == theirs.keys() and all(
        # Tensors compare element by element, and two equal ones are still changed one by one later.
        mine[key] is theirs[key] or (not any(map(is_tensor, (mine[key], theirs[key]))) and mine[key] == theirs[key])
        for key in mine
    )
