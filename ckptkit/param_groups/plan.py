"""Who owns what: a spec laid over a model or a checkpoint, as a value to print, check or build from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptkit.core.findings import Finding, Report
from ckptkit.core.gc_pause import without_collection
from ckptkit.core.text import html_table, printable
from ckptkit.errors import GroupsError
from ckptkit.param_groups.ownership import Applied, Speakers, resolve
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.properties import ParameterFacts, Subject, subject_of
from ckptkit.param_groups.spec import GroupRule, ParamGroupSpec, is_tensor
from ckptkit.param_groups.spec_findings import Diagnosis

__all__ = ["ParamGroupsPlan", "PlannedGroup", "PlannedParameter", "check_spec", "lay_over", "plan_param_groups"]


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    """A parameter as the plan names it: the first registered FQN, the others where it is tied, and who spoke for it."""

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
    """One group to be: its rule, all options that the optimizer will get, and its parameters in model order.

    ``optimizer`` is the class that the spec names for it; ``modifiers`` are those that made its options.
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


@dataclass(frozen=True, slots=True)
class ParamGroupsPlan:
    """The groups in order, the frozen parameters that no group holds, and idle optional rules.

    ``freeze`` names the parameters that the spec freezes: trainable still, and in no group.
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
        """The optimizer classes of the groups, each once; None where the spec names none."""
        return tuple(dict.fromkeys(group.optimizer for group in self.groups))

    def _repr_html_(self) -> str:
        return html_table(
            ("group", "parameters", "elements"),
            [(printable(group.name), f"{len(group.parameters):,}", f"{group.elements:,}") for group in self.groups],
        )


def plan_param_groups(model: Any, spec: SpecLike) -> ParamGroupsPlan:
    """Return which rule of ``spec`` owns which trainable parameter of ``model``, and with which options it trains.

    ``model`` is a live ``torch.nn.Module``, or a checkpoint or a mapping of tensors, of which only names and shapes
    are used: then every parameter counts as trainable, and roles are told by names. Raises ``GroupsError`` for a
    rule, a modifier or a pattern that fits nothing (unless it is optional), a trainable parameter that no rule owns,
    one that is uninitialised, and a tied one whose names would get different options.
    """
    with without_collection():
        plan, report = lay_over(subject_of(model), parse_spec(spec))
    report.raise_for_errors()
    return plan


def check_spec(model: Any, spec: SpecLike) -> Report:
    """Return all that ``plan_param_groups`` would refuse, at once, and what it can only assume.

    Raises ``GroupsError`` where the spec itself cannot be read.
    """
    return lay_over(subject_of(model), parse_spec(spec))[1]


@dataclass(slots=True)
class _Laid:
    """One trainable parameter with its owner and its modifiers."""

    facts: ParameterFacts
    owner: int
    applied: tuple[Applied, ...]


@dataclass(slots=True)
class _Options:
    """The options of each owner with each set of modifiers, worked out once."""

    spec: ParamGroupSpec
    known: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def of(self, owner: int, applied: tuple[Applied, ...]) -> dict[str, Any]:
        key = (owner, tuple((one.modifier.name, one.layer) for one in applied))
        if key not in self.known:
            self.known[key] = resolve(self.spec, self.spec.rules[owner], applied)[0]
        return self.known[key]


def lay_over(subject: Subject, spec: ParamGroupSpec) -> tuple[ParamGroupsPlan, Report]:
    """Return the plan and what is wrong with it; only a plan without errors may be built."""
    speakers, options = Speakers(spec, subject), _Options(spec)
    diagnosis = Diagnosis(subject, spec, speakers)
    laid: list[_Laid] = []
    frozen: list[ParameterFacts] = []
    freeze: list[ParameterFacts] = []
    unowned: list[ParameterFacts] = []
    excused: set[int] = set()  # rules whose emptiness another finding explains already
    owners: set[int] = set()
    findings: list[Finding] = []
    for facts in subject.parameters:
        owner = speakers.owner(facts)
        if not facts.trainable and (spec.frozen != "include" or owner is None or spec.rules[owner].freeze):
            frozen.append(facts)
            if owner is not None and spec.rules[owner].freeze:
                owners.add(owner)
            continue
        if owner is None:
            (freeze if spec.unmatched == "freeze" else unowned).append(facts)
            continue
        owners.add(owner)
        if spec.overlap == "error":
            findings.extend(diagnosis.overlap(facts))
        if spec.rules[owner].freeze:
            freeze.append(facts)
            continue
        applied = speakers.modifiers(facts) if spec.modifiers else ()
        laid.append(_Laid(facts, owner, applied))
        if facts.shape is None:
            findings.append(diagnosis.lazy(facts))
        if facts.aliases and spec.tied == "error":
            for torn, finding in _torn(laid[-1], speakers, options, diagnosis):
                findings.append(finding)
                excused.add(torn)
    if spec.frozen == "error" and frozen:
        findings.append(diagnosis.frozen(frozen))
    idle = [index for index in range(len(spec.rules)) if index not in owners]
    findings.extend(diagnosis.idle(idle, excused))
    if unowned:
        findings.append(diagnosis.unowned(unowned))
    findings.extend(diagnosis.vectors([(one.owner, one.facts) for one in laid]))
    plan = ParamGroupsPlan(
        tuple(_grouped(laid, spec, options)),
        tuple(map(_planned, frozen)),
        tuple(spec.rules[index] for index in idle),
        tuple(map(_planned, freeze)),
    )
    return plan, Report((*findings, *diagnosis.remarks()), GroupsError)


def _torn(laid: _Laid, speakers: Speakers, options: _Options, diagnosis: Diagnosis) -> Iterator[tuple[int, Finding]]:
    """Yield where a tied parameter would get other options under another of its names."""
    mine = options.of(laid.owner, laid.applied)
    rules = options.spec.rules
    for alias in laid.facts.aliases:
        owner = speakers.owner(alias)
        if owner is None:
            continue
        if rules[owner].freeze:
            yield owner, diagnosis.torn(laid.facts, alias, laid.owner, owner, None)
            continue
        theirs = options.of(owner, speakers.modifiers(alias))
        different = _different(mine, theirs)
        if different or options.spec.optimizer_of(rules[owner]) != options.spec.optimizer_of(rules[laid.owner]):
            yield owner, diagnosis.torn(laid.facts, alias, laid.owner, owner, different)


def _different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    for key in {**mine, **theirs}:
        if key not in mine or key not in theirs:
            return key
        # Tensors compare element by element, and two equal ones are still changed one by one later.
        same = mine[key] is theirs[key]
        if not same and (any(map(is_tensor, (mine[key], theirs[key]))) or mine[key] != theirs[key]):
            return key
    return ""


def _grouped(laid: Sequence[_Laid], spec: ParamGroupSpec, options: _Options) -> Iterator[PlannedGroup]:
    members: dict[Any, list[_Laid]] = {}
    frozen_options: dict[int, Any] = {}
    for one in laid:
        rule = spec.rules[one.owner]
        given = options.of(one.owner, one.applied)
        if id(given) not in frozen_options:
            frozen_options[id(given)] = _hashable(given)
        held = frozen_options[id(given)]
        key: Any = (one.owner, held)
        if spec.merge == "options":
            key = (spec.optimizer_of(rule), held)
        elif spec.merge == "never":
            key = one.facts.name
        members.setdefault(key, []).append(one)
    groups = list(members.values())
    if spec.order == "rule":
        # By what spoke, never by who comes first in the model: freezing a layer must not reorder the optimizer's state.
        numbers = {modifier.name: number for number, modifier in enumerate(spec.modifiers)}
        groups.sort(key=lambda group: min(_rank(one, numbers) for one in group))
    taken: set[str] = set()
    alone = {owner: sum(owner == group[0].owner for group in groups) == 1 for owner in range(len(spec.rules))}
    for group in groups:
        first = group[0]
        rule = spec.rules[first.owner]
        name = _name(group, spec, alone=alone[first.owner])
        while name in taken:
            name += "'"
        taken.add(name)
        yield PlannedGroup(
            name,
            rule,
            options.of(first.owner, first.applied),
            tuple(_planned(one.facts, rule=spec.rules[one.owner].name, applied=one.applied) for one in group),
            spec.optimizer_of(rule),
            tuple(applied.modifier.name for applied in first.applied),
        )


def _rank(laid: _Laid, numbers: Mapping[str, int]) -> tuple[int, list[tuple[int, int]]]:
    applied = [(numbers[one.modifier.name], -1 if one.layer is None else one.layer) for one in laid.applied]
    return laid.owner, applied


def _name(group: Sequence[_Laid], spec: ParamGroupSpec, *, alone: bool) -> str:
    first = group[0]
    if spec.merge == "never":
        return f"{spec.rules[first.owner].name}/{first.facts.name}"
    name = "+".join(spec.rules[owner].name for owner in sorted({one.owner for one in group}))
    if alone:
        return name
    parts = [one.modifier.name if one.layer is None else f"layer {one.layer}" for one in first.applied]
    return "/".join([name, *parts])


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, _hashable(inner)) for key, inner in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return id(value) if is_tensor(value) else (type(value).__name__, repr(value))


def _planned(facts: ParameterFacts, *, rule: str = "", applied: Sequence[Applied] = ()) -> PlannedParameter:
    return PlannedParameter(
        facts.name,
        facts.shape or (),
        facts.elements,
        tuple(alias.name for alias in facts.aliases),
        facts.dtype,
        rule,
        tuple(one.modifier.name for one in applied),
        next((one.layer for one in applied if one.layer is not None), None),
    )
