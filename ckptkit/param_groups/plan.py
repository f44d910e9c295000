"""Assign the parameters of a model to the groups of a spec, and find the faults of the spec."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptkit.core.findings import Finding, Report
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.result import Result
from ckptkit.core.text import plural
from ckptkit.errors import GroupsError
from ckptkit.inputs import CheckpointLike
from ckptkit.param_groups.ownership import AppliedModifier, RuleMatcher, resolve_options
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.properties import ParameterInfo, ParameterTable, parameter_table
from ckptkit.param_groups.spec import ParamGroupSpec
from ckptkit.param_groups.spec.fields import GroupRule, is_tensor
from ckptkit.param_groups.spec_findings import SpecFindings

__all__ = ["ParamGroupsPlan", "PlannedGroup", "PlannedParameter", "SpecAssignment", "assign", "plan_param_groups"]


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """A parameter of a plan.

    ``name`` is its first registered FQN; ``aliases`` are its other names where it is tied. ``rule`` owns it,
    ``modifiers`` apply to it, and ``layer`` counts from 0 at the input where a modifier numbers layers.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    aliases: tuple[str, ...] = ()
    dtype: str = ""
    rule: str = ""
    modifiers: tuple[str, ...] = ()
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """One param group of a plan: its rule, its options for the optimizer, and its parameters in the order of the model.

    ``optimizer`` is the class that the spec names for the group. ``modifiers`` changed the options of the group.
    """

    name: str
    rule: GroupRule
    options: Mapping[str, Any]
    parameters: tuple[PlannedParameter, ...]
    optimizer: str | None = None
    modifiers: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements that this group trains."""
        return sum(parameter.elements for parameter in self.parameters)


@dataclass(frozen=True, slots=True, repr=False)
class ParamGroupsPlan(Result):
    """The planned groups in order, and the parameters that are in none of them.

    ``frozen`` has the parameters with ``requires_grad=False`` that no group holds. ``freeze`` has the parameters that
    the spec freezes: they are trainable now. ``idle`` has the optional rules that own nothing.
    """

    groups: tuple[PlannedGroup, ...]
    frozen: tuple[PlannedParameter, ...] = ()
    idle: tuple[GroupRule, ...] = ()
    freeze: tuple[PlannedParameter, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements that all groups train."""
        return sum(group.elements for group in self.groups)

    @property
    def optimizers(self) -> tuple[str | None, ...]:
        """The optimizer class of each group, without repeats; None where the spec names none."""
        return tuple(dict.fromkeys(group.optimizer for group in self.groups))

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        count = sum(len(group.parameters) for group in self.groups)
        return f"{plural(count, 'parameter')} in {plural(len(self.groups), 'group')}"


@dataclass(frozen=True, slots=True, eq=False)
class SpecAssignment:
    """The groups that a spec makes for one model, and every finding about the spec.

    Build groups from ``plan`` only where ``report`` has no error.
    """

    plan: ParamGroupsPlan
    report: Report


def plan_param_groups(model: CheckpointLike, spec: SpecLike) -> ParamGroupsPlan:
    """Return which rule of ``spec`` owns each trainable parameter of ``model``, and its options.

    ``model`` is a live ``torch.nn.Module``, the path of a checkpoint, a Checkpoint, or a mapping of tensors or of
    ``TensorInfo``. Only names and shapes of a checkpoint are used: every parameter counts as trainable, and roles are
    read from names. ``spec`` is the path of a TOML, JSON or YAML file, its parsed content, a list of groups, or a
    ``ParamGroupSpec``.

    Raises ``GroupsError``:

    - for a rule, modifier or pattern that matches nothing, unless it is optional;
    - for a trainable parameter that no rule owns;
    - for an uninitialised parameter;
    - for a tied parameter that would get different options under its names.

    Example:
        >>> plan = plan_param_groups("fixtures/lenet_10class.pth", "fixtures/groups.toml")
        >>> [group.name for group in plan.groups]
        ['head', 'base']
    """
    with pause_gc():
        assignment = assign(parameter_table(model), spec)
    assignment.report.raise_for_errors()
    return assignment.plan


@dataclass(slots=True)
class _Assigned:
    """One trainable parameter with the index of its rule and its modifiers."""

    parameter: ParameterInfo
    owner: int
    applied: tuple[AppliedModifier, ...]


@dataclass(slots=True)
class _OptionsCache:
    """The options of each rule with each set of modifiers, resolved once."""

    spec: ParamGroupSpec
    known: dict[Hashable, dict[str, Any]] = field(default_factory=dict)

    def of(self, owner: int, applied: tuple[AppliedModifier, ...]) -> dict[str, Any]:
        key = (owner, tuple((entry.modifier.name, entry.layer) for entry in applied))
        if key not in self.known:
            self.known[key] = resolve_options(self.spec, self.spec.rules[owner], applied)[0]
        return self.known[key]


def assign(table: ParameterTable, spec: SpecLike) -> SpecAssignment:
    """Return the plan that ``spec`` makes of the parameters in ``table``, with every finding about the spec.

    Raises ``GroupsError`` where the spec itself cannot be parsed.
    """
    spec = parse_spec(spec)
    matcher, options = RuleMatcher(spec, table), _OptionsCache(spec)
    problems = SpecFindings(table, spec, matcher)
    assigned: list[_Assigned] = []
    frozen: list[ParameterInfo] = []
    freeze: list[ParameterInfo] = []
    unowned: list[ParameterInfo] = []
    explained: set[int] = set()  # rules that own nothing because of a tie, which has its own finding
    owners: set[int] = set()
    findings: list[Finding] = []
    for parameter in table.parameters:
        owner = matcher.owner(parameter)
        if not parameter.trainable and (spec.frozen != "include" or owner is None or spec.rules[owner].freeze):
            frozen.append(parameter)
            if owner is not None and spec.rules[owner].freeze:
                owners.add(owner)
            continue
        if owner is None:
            (freeze if spec.unmatched == "freeze" else unowned).append(parameter)
            continue
        owners.add(owner)
        if spec.overlap == "error":
            findings.extend(problems.overlap(parameter))
        if spec.rules[owner].freeze:
            freeze.append(parameter)
            continue
        applied = matcher.modifiers(parameter) if spec.modifiers else ()
        assigned.append(_Assigned(parameter, owner, applied))
        if parameter.shape is None:
            findings.append(problems.lazy(parameter))
        if parameter.aliases and spec.tied == "error":
            for other, finding in _split_ties(assigned[-1], matcher, options, problems):
                findings.append(finding)
                explained.add(other)
    if spec.frozen == "error" and frozen:
        findings.append(problems.frozen(frozen))
    idle = [index for index in range(len(spec.rules)) if index not in owners]
    findings.extend(problems.idle(idle, explained))
    if unowned:
        findings.append(problems.unowned(unowned))
    findings.extend(problems.vectors([(entry.owner, entry.parameter) for entry in assigned]))
    plan = ParamGroupsPlan(
        tuple(_groups(assigned, spec, options)),
        tuple(map(_planned, frozen)),
        tuple(spec.rules[index] for index in idle),
        tuple(map(_planned, freeze)),
    )
    return SpecAssignment(plan, Report((*findings, *problems.remarks()), GroupsError))


def _split_ties(
    assigned: _Assigned, matcher: RuleMatcher, options: _OptionsCache, problems: SpecFindings
) -> Iterator[tuple[int, Finding]]:
    """Yield the rule and a finding for each alias under which a tied parameter would get different options."""
    mine = options.of(assigned.owner, assigned.applied)
    rules = options.spec.rules
    for alias in assigned.parameter.aliases:
        owner = matcher.owner(alias)
        if owner is None:
            continue
        if rules[owner].freeze:
            yield owner, problems.split_tie(assigned.parameter, alias, assigned.owner, owner, None)
            continue
        theirs = options.of(owner, matcher.modifiers(alias))
        different = _first_difference(mine, theirs)
        if different or options.spec.optimizer_of(rules[owner]) != options.spec.optimizer_of(rules[assigned.owner]):
            yield owner, problems.split_tie(assigned.parameter, alias, assigned.owner, owner, different)


def _first_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Return the first option that differs between two sets of options, or None."""
    for key in {**mine, **theirs}:
        if key not in mine or key not in theirs:
            return key
        # Two equal tensors count as different, because a scheduler can later change one of them alone.
        same = mine[key] is theirs[key]
        if not same and (any(map(is_tensor, (mine[key], theirs[key]))) or mine[key] != theirs[key]):
            return key
    return None


def _groups(assigned: Sequence[_Assigned], spec: ParamGroupSpec, options: _OptionsCache) -> Iterator[PlannedGroup]:
    by_key: dict[Hashable, list[_Assigned]] = {}
    hashable_options: dict[int, Hashable] = {}
    for entry in assigned:
        rule = spec.rules[entry.owner]
        given = options.of(entry.owner, entry.applied)
        if id(given) not in hashable_options:
            hashable_options[id(given)] = _hashable(given)
        key: Hashable = (entry.owner, hashable_options[id(given)])
        if spec.merge == "options":
            key = (spec.optimizer_of(rule), hashable_options[id(given)])
        elif spec.merge == "never":
            key = entry.parameter.name
        by_key.setdefault(key, []).append(entry)
    groups = list(by_key.values())
    if spec.order == "rule":
        # By rule and modifiers, never by position in the model: freezing a layer must not reorder the optimizer state.
        numbers = {modifier.name: number for number, modifier in enumerate(spec.modifiers)}
        groups.sort(key=lambda group: min(_rank(entry, numbers) for entry in group))
    taken: set[str] = set()
    is_alone = {owner: sum(owner == group[0].owner for group in groups) == 1 for owner in range(len(spec.rules))}
    for group in groups:
        first = group[0]
        rule = spec.rules[first.owner]
        name = _name(group, spec, alone=is_alone[first.owner])
        while name in taken:
            name += "'"
        taken.add(name)
        yield PlannedGroup(
            name,
            rule,
            options.of(first.owner, first.applied),
            tuple(
                _planned(entry.parameter, rule=spec.rules[entry.owner].name, applied=entry.applied) for entry in group
            ),
            spec.optimizer_of(rule),
            tuple(applied.modifier.name for applied in first.applied),
        )


def _rank(assigned: _Assigned, numbers: Mapping[str, int]) -> tuple[int, list[tuple[int, int]]]:
    applied = [(numbers[entry.modifier.name], -1 if entry.layer is None else entry.layer) for entry in assigned.applied]
    return assigned.owner, applied


def _name(group: Sequence[_Assigned], spec: ParamGroupSpec, *, alone: bool) -> str:
    """Return the name of a group; ``alone`` says that its rule has no other group."""
    first = group[0]
    if spec.merge == "never":
        return f"{spec.rules[first.owner].name}/{first.parameter.name}"
    name = "+".join(spec.rules[owner].name for owner in sorted({entry.owner for entry in group}))
    if alone:
        return name
    parts = [entry.modifier.name if entry.layer is None else f"layer {entry.layer}" for entry in first.applied]
    return "/".join([name, *parts])


def _hashable(value: object) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _hashable(inner)) for key, inner in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return id(value) if is_tensor(value) else (type(value).__name__, repr(value))


def _planned(parameter: ParameterInfo, *, rule: str = "", applied: Sequence[AppliedModifier] = ()) -> PlannedParameter:
    return PlannedParameter(
        parameter.name,
        parameter.shape or (),
        parameter.elements,
        tuple(alias.name for alias in parameter.aliases),
        parameter.dtype,
        rule,
        tuple(entry.modifier.name for entry in applied),
        next((entry.layer for entry in applied if entry.layer is not None), None),
    )
