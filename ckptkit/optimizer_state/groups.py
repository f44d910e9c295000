"""Groups dealt anew: the same groups with other members, groups of a spec, groups in the order of a model."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ckptkit.core.text import kind_of, listed, plural, printable, quoted
from ckptkit.core.torch_optim import options_of_kind
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.model import (
    Change,
    LazyTensor,
    NamedGroup,
    OptimizerState,
    SlotValue,
    number_of,
    require_named,
    same_value,
)
from ckptkit.optimizer_state.naming import parameters_of
from ckptkit.param_groups.lock import ParamGroupsLock
from ckptkit.param_groups.plan import ParamGroupsPlan
from ckptkit.param_groups.spec import is_tensor

__all__ = ["GroupsLike", "Hyper", "describe_value", "equal_values", "order_like", "resplit", "with_members"]

Hyper = Literal["live", "saved", "error"]
# What a group is called, and not how it trains: new groups have names of their own, or none.
_LABELS = options_of_kind("name")
GroupsLike = OptimizerState | ParamGroupsPlan | ParamGroupsLock | Iterable[NamedGroup]


def resplit(state: OptimizerState, groups: GroupsLike, hyper: Hyper = "live") -> OptimizerState:
    """Return the state with its parameters in other groups: more of them, fewer, or in another order.

    ``groups`` are those of a spec that was planned, of a lock, of another state, or ``NamedGroup`` values. Options
    follow the parameters: where both the new group and the file have one, ``hyper`` takes the ``live`` value or the
    ``saved`` one, or raises where they differ (``error``); what the groups do not say is the saved value, and what the
    file does not say stays. A parameter that the file does not have starts anew.

    Raises ``PlanError`` where parameters of the file are in no group or in two, and where a saved value would be taken
    that is not the same for all parameters of a group, listing them.
    """
    if hyper not in ("live", "saved", "error"):
        raise PlanError(f"hyper is {quoted(str(hyper))}", hint="it is live, saved or error")
    wanted = _named_groups(groups, called=any("name" in group.options for group in require_named(state).groups))
    names = [name for group in wanted for name in group.names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise PlanError(f"{listed(twice)} would be in the groups more than once")
    known = set(names)
    left = [name for name in state.names if name not in known]
    if left:
        raise PlanError(
            f"{listed(left)} would be in no group", hint="give them a group, or drop them first: ckpt optim prune"
        )
    saved = {name: group.options for group in state.groups for name in group.names}
    merger = _Merger(saved, [group.options for group in state.groups], hyper)
    made = tuple(NamedGroup(group.names, merger.options(number, group)) for number, group in enumerate(wanted))
    changes = tuple(
        Change(name, (name,) if name in saved else (), "copy" if name in saved else "new") for name in names
    )
    kept = {name: state.state[name] for name in names if name in state.state}
    remarks = (*state.remarks, *_stale_rates(made, merger))
    return replace(state, state=kept, groups=made, changes=changes, remarks=tuple(dict.fromkeys(remarks)))


def _named_groups(groups: Any, *, called: bool) -> tuple[NamedGroup, ...]:
    if isinstance(groups, OptimizerState):
        return groups.groups
    if isinstance(groups, ParamGroupsPlan | ParamGroupsLock):
        return tuple(
            NamedGroup(
                tuple(parameter.name for parameter in group.parameters),
                {"name": group.name, **group.options} if called else group.options,
            )
            for group in groups.groups
        )
    given = tuple(groups) if isinstance(groups, Iterable) and not isinstance(groups, Mapping) else (groups,)
    if wrong := [group for group in given if not isinstance(group, NamedGroup)]:
        raise PlanError(f"the groups have {kind_of(wrong[0])}", hint="plan_param_groups(model, spec) makes groups")
    return given


@dataclass(frozen=True, slots=True)
class _Merger:
    """The options of new groups out of what they say and what their members had."""

    saved: Mapping[str, Mapping[str, SlotValue]]
    groups: Sequence[Mapping[str, SlotValue]]
    hyper: Hyper

    def options(self, number: int, group: NamedGroup) -> dict[str, SlotValue]:
        members = {name: self.saved[name] for name in group.names if name in self.saved}
        keys = dict.fromkeys(key for options in (*members.values(), *self.groups, group.options) for key in options)
        return {
            key: self._option(key, number, group, members)
            for key in keys
            if key not in _LABELS or key in group.options or self._agreed(key, members)
        }

    def _agreed(self, key: str, members: Mapping[str, Mapping[str, SlotValue]]) -> bool:
        """Return whether all that a group is made of was called the same."""
        made_of = list(members.values()) or self.groups
        return len({repr(options.get(key)) for options in made_of}) == 1

    def _option(
        self, key: str, number: int, group: NamedGroup, members: Mapping[str, Mapping[str, SlotValue]]
    ) -> SlotValue:
        had = {name: options[key] for name, options in members.items() if key in options}
        said = key in group.options
        if said and (self.hyper == "live" or not had or key in _LABELS):
            return group.options[key]
        if not had:  # of parameters that are all new: what every group of the file has
            everywhere = {str(at): options.get(key) for at, options in enumerate(self.groups)}
            return self._one(
                key, f"group {number} does not say its {quoted(key)}, and the groups of the file", everywhere
            )
        value = self._one(key, f"the parameters of group {number}", had)
        if said and self.hyper == "error" and not equal_values(value, group.options[key]):
            raise PlanError(
                f"{quoted(key)} of group {number} was {describe_value(value)} in the file and would be "
                f"{describe_value(group.options[key])}",
                hint="--hyper live takes the new value, --hyper saved the old one",
            )
        return value

    def _one(self, key: str, whose: str, values: Mapping[str, SlotValue]) -> SlotValue:
        (first, value), *others = values.items()
        for name, other in others:
            if not equal_values(value, other):
                raise PlanError(
                    f"{whose} had different values of {quoted(key)}: {describe_value(value)} ({printable(first)}), "
                    f"{describe_value(other)} ({printable(name)})",
                    hint=f"give the group a {key} of its own, and --hyper live",
                )
        return value


def equal_values(one: SlotValue, other: SlotValue) -> bool:
    """Return whether two options mean the same: a number and a tensor of one, a list and a tuple too."""
    left, right = number_of(one), number_of(other)
    if left is not None and right is not None and not isinstance(one, bool) and not isinstance(other, bool):
        return left == right or (isinstance(one, int | float) != isinstance(other, int | float) and _alike(left, right))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):  # a file of JSON has no tuples
        return len(one) == len(other) and all(map(equal_values, one, other))
    return same_value(one, other)


def _alike(left: float, right: float) -> bool:
    """Return whether a number and what a tensor of 32 bits holds of it are the same."""
    try:
        return struct.pack("<f", left) == struct.pack("<f", right)
    except OverflowError:
        return False


def describe_value(value: SlotValue) -> str:
    """Return an option for a sentence; of a tensor the number that it holds."""
    return str(number_of(value)) if isinstance(value, LazyTensor) or is_tensor(value) else printable(str(value))


def _stale_rates(groups: Iterable[NamedGroup], merger: _Merger) -> Iterator[str]:
    for number, group in enumerate(groups):
        before = next((merger.saved[name] for name in group.names if name in merger.saved), {})
        same = {key: equal_values(before[key], group.options[key]) for key in ("lr", "initial_lr") if key in before}
        if same == {"lr": False, "initial_lr": True}:
            yield (
                f"group {number} has another lr, and the initial_lr of the file: a scheduler that is made after "
                "loading begins with that"
            )


def with_members(
    groups: Sequence[NamedGroup], members: Sequence[Sequence[str]]
) -> tuple[tuple[NamedGroup, ...], list[str]]:
    """Return the groups with other members, without those that have none any more, and what is to be said of that."""
    kept = [at for at, (group, names) in enumerate(zip(groups, members, strict=True)) if names or not group.names]
    gone = [str(at) for at in range(len(groups)) if at not in set(kept)]
    said = [f"{plural(len(gone), 'group')} without parameters now, and left out: {', '.join(gone)}"] if gone else []
    return tuple(NamedGroup(tuple(members[at]), groups[at].options) for at in kept), said


def order_like(state: OptimizerState, model: Any) -> OptimizerState:
    """Return the state with the parameters of each group in the order of a model: a Module, a Checkpoint, or shapes.

    Raises ``PlanError`` where it has parameters that the model does not have, or of other shapes.
    """
    parameters = parameters_of(model)
    place = {name: number for number, name in enumerate(parameters.shapes)}
    place |= {other: place[first] for other, first in parameters.aliases.items() if first in place}
    unknown = [name for name in require_named(state).names if name not in place]
    if unknown:
        raise PlanError(
            f"{parameters.source} has no {listed(unknown)}", hint="rename it with rules, or drop it: ckpt optim prune"
        )
    groups = tuple(replace(group, names=tuple(sorted(group.names, key=place.__getitem__))) for group in state.groups)
    return replace(state, groups=groups)
