"""Decide which group gets each trainable parameter that is in no group of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptkit.core.text import kind_of, listed, quoted
from ckptkit.core.torch_optim import options_of_kind
from ckptkit.core.torch_types import Optimizer
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.compare.groups import GroupView, compare_groups
from ckptkit.param_groups.parameters import LiveModel, LiveParameter
from ckptkit.param_groups.parse import SpecLike, is_spec
from ckptkit.param_groups.plan import ParamGroupsPlan, assign
from ckptkit.param_groups.properties import live_parameter_table
from ckptkit.param_groups.validate.options import BOOKKEEPING, find_option_fault, intended_option, is_read_by

__all__ = ["Place", "Placement", "place_by_spec", "place_together"]

_ADD_MISSING = (
    "add_missing takes the name or index of a group, or the options of a new group; spec= takes a spec of all groups"
)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The group of some parameters: the index of a group of the optimizer, or the ``options`` of a new group.

    ``order`` has the names of all parameters that belong in the group, in their order.
    """

    parameters: tuple[LiveParameter, ...]
    index: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """The places of the missing parameters, and those that stay in no group, with the reason and the way out."""

    places: tuple[Place, ...] = ()
    left: tuple[tuple[tuple[LiveParameter, ...], str, str], ...] = ()


def place_together(optimizer: Optimizer, missing: Sequence[LiveParameter], add_missing: object) -> Placement:
    """Return the one place of all missing parameters that ``add_missing`` names.

    Raises ``GroupsError`` where ``add_missing`` is wrong, even if nothing is missing.
    """
    together = tuple(missing)
    if add_missing is None:
        hint = "pass spec=, or add_missing= the name or index of a group, or the options of a new group; or freeze "
        left = ((together, "in no group of this optimizer", f"{hint}the parameters"),) if together else ()
        return Placement((), left)
    if is_spec(add_missing):
        raise GroupsError(
            "add_missing is a spec of param groups", hint="pass it as spec=: rebind(optimizer, model, spec=spec)"
        )
    if isinstance(add_missing, Mapping):
        _check_new_options(optimizer, add_missing, "add_missing")
        place = Place(together, options=dict(add_missing))
    else:
        place = Place(together, _group_index(optimizer, add_missing))
    return Placement((place,) if together else ())


def _group_index(optimizer: Optimizer, wanted: object) -> int:
    groups = optimizer.param_groups
    if isinstance(wanted, str):
        names = [group.get("name", group.get("group_name")) for group in groups]
        if names.count(wanted) != 1:
            known = listed([name for name in names if isinstance(name, str)])
            how_many = "no group has" if wanted not in names else "several groups have"
            raise GroupsError(
                f"add_missing: {how_many} the name {quoted(wanted)}",
                hint=f"the names of the groups are {known}" if known else "no group has a name: use an index",
            )
        return names.index(wanted)
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        raise GroupsError(f"add_missing is {kind_of(wanted)}", hint=_ADD_MISSING)
    if not 0 <= wanted < len(groups):
        raise GroupsError(f"add_missing: there is no group {wanted}", hint=f"the groups are 0 to {len(groups) - 1}")
    return wanted


def _check_new_options(optimizer: Optimizer, options: Mapping[Any, Any], where: str) -> None:
    """Raise ``GroupsError`` for an option of a new group that the optimizer does not read, or with a wrong value."""
    kind = type(optimizer)
    known = list(dict.fromkeys([*optimizer.defaults, *(key for group in optimizer.param_groups for key in group)]))
    known = [key for key in known if key not in options_of_kind("members")]
    for key in options:
        if not isinstance(key, str):
            raise GroupsError(
                f"{where}: {key!r} is not the name of an option", hint="use the names of torch.optim, such as lr"
            )
        if key in options_of_kind("members"):
            raise GroupsError(
                f"{where}: the new group gets the missing parameters and no others", hint=f"leave out {key}"
            )
        if key not in known and not is_read_by(kind, key):
            intended = intended_option(key, known)
            options_are = f"the options of {kind.__name__} are {', '.join(sorted(set(known) - BOOKKEEPING))}"
            raise GroupsError(
                f"{where}: no step of {kind.__name__} reads {quoted(key)}",
                hint=options_are if intended is None else f"did you mean {quoted(intended)}?",
            )
        if fault := find_option_fault(key, {**optimizer.defaults, **options}, kind):
            raise GroupsError(f"{where}: {key} {fault.problem}", hint=fault.hint)


def place_by_spec(
    optimizer: Optimizer,
    live_model: LiveModel,
    held: Sequence[Sequence[str]],
    missing: Sequence[LiveParameter],
    spec: SpecLike,
) -> Placement:
    """Return the places that ``spec`` gives to the missing parameters; ``held`` are the names that each group has.

    A group of the spec is the live group of the same name, or else the live group with most of its parameters. Where
    both are absent, it is a new group. Raises ``GroupsError`` for a fault of the spec, even if nothing is missing.
    """
    plan = _plan(live_model, spec)
    by_name = {live.name: live for live in missing}
    found = [
        GroupView(str(group.get("name", group.get("group_name", f"group {number}"))), tuple(names), {})
        for number, (group, names) in enumerate(zip(optimizer.param_groups, held, strict=True))
    ]
    kind = type(optimizer).__name__
    planned = [group for group in plan.groups if len(plan.optimizers) < 2 or group.optimizer == kind]
    expected = [GroupView(group.name, tuple(parameter.name for parameter in group.parameters), {}) for group in planned]
    places = []
    for group, view, difference in zip(planned, expected, compare_groups(expected, found).groups, strict=True):
        parameters = tuple(by_name.pop(name) for name in view.names if name in by_name)
        if not parameters:
            continue
        if difference.found is None:
            options = {"name": group.name, **group.options}
            _check_new_options(optimizer, options, f"group {quoted(group.name)} of the spec")
            places.append(Place(parameters, options=options, order=view.names))
        else:
            places.append(Place(parameters, difference.found, order=view.names))
    return Placement(tuple(places), tuple(_left(plan, by_name)))


def _plan(live_model: LiveModel, spec: SpecLike) -> ParamGroupsPlan:
    assignment = assign(live_parameter_table(live_model), spec)
    for finding in assignment.report.findings:
        # With gradual unfreezing, groups of the spec are frozen for now.
        if finding.severity == "error" and finding.code != codes.RULE_FROZEN.name:
            raise GroupsError(finding.message, hint=finding.hint)
    return assignment.plan


def _left(
    plan: ParamGroupsPlan, remaining: Mapping[str, LiveParameter]
) -> list[tuple[tuple[LiveParameter, ...], str, str]]:
    """Return the parameters that the spec gives to no group of this optimizer, with the reason and the way out."""
    freeze = {parameter.name for parameter in plan.freeze}
    frozen = tuple(live for name, live in remaining.items() if name in freeze)
    left = [] if not frozen else [(frozen, "the spec freezes them", "freeze them: requires_grad_(False)")]
    for kind in plan.optimizers:
        names = {parameter.name for group in plan.groups if group.optimizer == kind for parameter in group.parameters}
        others = tuple(live for name, live in remaining.items() if name in names)
        if others:
            hint = (
                f"call rebind() for the optimizer {kind} too; beside= takes the optimizers that have other parameters"
            )
            left.append((others, f"the spec gives them to {kind}", hint))
    return left
