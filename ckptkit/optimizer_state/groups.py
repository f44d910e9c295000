"""Put the parameters of a state into the groups of a spec, a lock or another state, or into another order."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ckptkit.core.arguments import require_choice
from ckptkit.core.patterns import drop_options
from ckptkit.core.text import kind_of, listed, option_texts, plural, printable, quoted
from ckptkit.core.torch_optim import options_of_kind, scheduled_options
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
from ckptkit.optimizer_state.naming import ModelLike, parameters_of
from ckptkit.param_groups.lock import LockLike, ParamGroupsLock, as_lock
from ckptkit.param_groups.plan import ParamGroupsPlan
from ckptkit.param_groups.spec.fields import is_tensor

__all__ = ["GroupsLike", "Hyper", "describe_values", "equal_values", "order_like", "resplit", "with_members"]

Hyper = Literal["live", "saved", "error"]
# These options name a group and do not change how it trains. A new group has a name of its own, or none.
_NAME_OPTIONS = options_of_kind("name")
GroupsLike = OptimizerState | ParamGroupsPlan | LockLike | Iterable[NamedGroup]


def resplit(state: OptimizerState, groups: GroupsLike, hyper: Hyper = "live") -> OptimizerState:
    """Return the state with its parameters in other groups: more groups, fewer groups, or another order.

    ``groups`` are those of a planned spec, of a lock or the path of its file, of another state, or ``NamedGroup``
    values. The saved options follow the parameters. ``hyper`` decides if the new group and the file both have an
    option. ``live`` takes the value of the new group, and ``saved`` the value of the file. ``error`` raises if they
    differ, unless a scheduler of the run made the difference. An option that only one of them has is kept. A parameter
    that the file does not have starts without state.

    Raises ``PlanError`` if a parameter of the file is in no new group or in two. Raises it too if a saved value would
    be taken that differs between the parameters of a new group; the message names them.

    Example:
        >>> from ckptkit.optimizer_state import resplit, to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> spec = {"group": [{"name": "decayed", "params": "weight"}, {"name": "rest", "rest": True}]}
        >>> [group.names for group in resplit(state, ckptkit.plan_param_groups(model, spec)).groups]
        [('weight',), ('bias',)]
    """
    require_choice(hyper, get_args(Hyper), "hyper")
    has_names = any("name" in group.options for group in require_named(state).groups)
    new_groups = _named_groups(groups, with_names=has_names)
    names = [name for group in new_groups for name in group.names]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise PlanError(f"{listed(repeated)} would be in the groups more than once")
    known = set(names)
    left = [name for name in state.names if name not in known]
    if left:
        raise PlanError(
            f"{listed(left)} would be in no group",
            hint=f"give them a group, or drop them first: ckpt optim prune PATH -o OUT {drop_options(left)}",
        )
    saved = {name: group.options for group in state.groups for name in group.names}
    merger = _OptionMerger(saved, [group.options for group in state.groups], hyper)
    merged = tuple(NamedGroup(group.names, merger.options(number, group)) for number, group in enumerate(new_groups))
    changes = tuple(
        Change(name, (name,) if name in saved else (), "copy" if name in saved else "new") for name in names
    )
    kept = {name: state.state[name] for name in names if name in state.state}
    has_own = ["initial_lr" in group.options and hyper == "live" for group in new_groups]
    remarks = (*state.remarks, *_initial_lr_remarks(merged, saved, has_own))
    return replace(state, state=kept, groups=merged, changes=changes, remarks=tuple(dict.fromkeys(remarks)))


def _named_groups(groups: object, *, with_names: bool) -> tuple[NamedGroup, ...]:
    if isinstance(groups, OptimizerState):
        return groups.groups
    if isinstance(groups, str | os.PathLike):
        groups = as_lock(groups)
    if isinstance(groups, ParamGroupsPlan | ParamGroupsLock):
        return tuple(
            NamedGroup(
                tuple(parameter.name for parameter in group.parameters),
                {"name": group.name, **group.options} if with_names else group.options,
            )
            for group in groups.groups
        )
    given = tuple(groups) if isinstance(groups, Iterable) and not isinstance(groups, Mapping) else (groups,)
    if wrong := [group for group in given if not isinstance(group, NamedGroup)]:
        raise PlanError(
            f"the groups must be NamedGroup values, not {kind_of(wrong[0])}",
            hint="plan_param_groups(model, spec) makes groups",
        )
    return given


@dataclass(frozen=True, slots=True)
class _OptionMerger:
    """Merges the options of each new group with the saved options of its members."""

    saved: Mapping[str, Mapping[str, SlotValue]]  # of each saved parameter
    saved_groups: Sequence[Mapping[str, SlotValue]]
    hyper: Hyper

    def options(self, number: int, group: NamedGroup) -> dict[str, SlotValue]:
        members = {name: self.saved[name] for name in group.names if name in self.saved}
        # Groups of one optimizer can have different options, so another group has no say where there are members.
        of_new = () if members else [dict.fromkeys(self._common_options())]
        sources = (*members.values(), *of_new, group.options)
        keys = dict.fromkeys(key for options in sources for key in options)
        return {
            key: self._option(key, number, group, members)
            for key in keys
            if key not in _NAME_OPTIONS or key in group.options or self._has_one_value(key, members)
        }

    def _common_options(self) -> list[str]:
        """Return the options that all saved groups have."""
        first, *others = self.saved_groups or [{}]
        return [key for key in first if all(key in options for options in others)]

    def _has_one_value(self, key: str, members: Mapping[str, Mapping[str, SlotValue]]) -> bool:
        """Return whether all members, or all saved groups if no member was saved, have one value of ``key``."""
        sources = list(members.values()) or self.saved_groups
        return len({repr(options.get(key)) for options in sources}) == 1

    def _option(
        self, key: str, number: int, group: NamedGroup, members: Mapping[str, Mapping[str, SlotValue]]
    ) -> SlotValue:
        saved = {name: options[key] for name, options in members.items() if key in options}
        if key in group.options and (self.hyper == "live" or not saved or key in _NAME_OPTIONS):
            return group.options[key]
        if not saved:  # all parameters are new, so they get the value that all saved groups have
            of_groups = {f"group {at}": options.get(key) for at, options in enumerate(self.saved_groups)}
            return self._only_value(key, f"group {number} has no {quoted(key)}, and the groups of the file", of_groups)
        value = self._only_value(key, f"the parameters of group {number}", saved)
        is_refused = self.hyper == "error" and key in group.options and not self._is_scheduled(key, group, members)
        if is_refused and not equal_values(value, group.options[key]):
            before, after = describe_values(value, group.options[key])
            raise PlanError(
                f"{quoted(key)} of group {number} was {before} in the file and would be {after}",
                hint="--hyper live takes the new value, --hyper saved takes the value of the file",
            )
        return value

    def _is_scheduled(self, key: str, group: NamedGroup, members: Mapping[str, Mapping[str, SlotValue]]) -> bool:
        return all(key in scheduled_options(group.options, options, equal_values) for options in members.values())

    def _only_value(self, key: str, owners: str, values: Mapping[str, SlotValue]) -> SlotValue:
        (first, value), *others = values.items()
        for name, other in others:
            if not equal_values(value, other):
                texts = describe_values(value, other)
                raise PlanError(
                    f"{owners} had different values of {quoted(key)}: {texts[0]} ({printable(first)}), "
                    f"{texts[1]} ({printable(name)})",
                    hint=f"give the new group its own {key}, as a key of the group in its spec"
                    + ("" if self.hyper == "live" else ", and use --hyper live"),
                )
        return value


def equal_values(left: SlotValue, right: SlotValue) -> bool:
    """Return whether two options are equal; a number equals a tensor of one element, and a list equals a tuple."""
    first, second = number_of(left), number_of(right)
    if first is not None and second is not None and not isinstance(left, bool) and not isinstance(right, bool):
        is_mixed = isinstance(left, int | float) != isinstance(right, int | float)
        return first == second or (is_mixed and _is_same_float32(first, second))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):  # JSON has no tuples
        return len(left) == len(right) and all(map(equal_values, left, right))
    return same_value(left, right)


def _is_same_float32(first: float, second: float) -> bool:
    try:
        return struct.pack("<f", first) == struct.pack("<f", second)
    except OverflowError:
        return False


def describe_values(first: SlotValue, second: SlotValue) -> tuple[str, str]:
    """Return two options that differ as texts for a message; for a tensor, the number in it."""
    plain = [number_of(one) if isinstance(one, LazyTensor) or is_tensor(one) else one for one in (first, second)]
    return option_texts(plain[0], plain[1])


def _initial_lr_remarks(
    groups: Iterable[NamedGroup], saved: Mapping[str, Mapping[str, SlotValue]], has_own: Sequence[bool]
) -> Iterator[str]:
    """Yield a remark on each group that trains at another lr than the file; ``has_own`` groups chose an initial_lr."""
    for number, group in enumerate(groups):
        if has_own[number]:
            continue
        before = next((saved[name] for name in group.names if name in saved), {})
        is_equal = {key: equal_values(before[key], group.options[key]) for key in ("lr", "initial_lr") if key in before}
        is_initial = equal_values(group.options.get("lr"), group.options.get("initial_lr"))
        if is_equal == {"lr": False, "initial_lr": True} and not is_initial:
            yield (
                f"group {number} has a new lr but the initial_lr of the file: a scheduler that is built after loading "
                "starts from that initial_lr"
            )


def with_members(
    groups: Sequence[NamedGroup], members: Sequence[Sequence[str]]
) -> tuple[tuple[NamedGroup, ...], list[str]]:
    """Return the groups with other members, without groups that lost all of theirs, and remarks on these."""
    kept = [at for at, (group, names) in enumerate(zip(groups, members, strict=True)) if names or not group.names]
    left_out = [str(at) for at in range(len(groups)) if at not in set(kept)]
    remarks = [f"left out {plural(len(left_out), 'group')} without parameters: {', '.join(left_out)}"]
    return tuple(NamedGroup(tuple(members[at]), groups[at].options) for at in kept), remarks if left_out else []


def order_like(state: OptimizerState, model: ModelLike) -> OptimizerState:
    """Return the state with the parameters of each group in the order of ``model``.

    ``model`` is a Module, a Checkpoint, or a mapping of names to shapes. Raises ``PlanError`` for parameters that the
    model does not have.

    Example:
        >>> from ckptkit.optimizer_state import order_like, to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> order_like(state, {"bias": (2,), "weight": (2, 2)}).names
        ('bias', 'weight')
    """
    parameters = parameters_of(model)
    place = {name: number for number, name in enumerate(parameters.shapes)}
    place |= {alias: place[first] for alias, first in parameters.aliases.items() if first in place}
    unknown = [name for name in require_named(state).names if name not in place]
    if unknown:
        sources = {change.name: change.sources for change in state.changes}  # the names before the rules
        saved = list(dict.fromkeys(source for name in unknown for source in sources.get(name, (name,))))
        raise PlanError(
            f"{parameters.source} has no {listed(unknown)}",
            hint=f"rename it with rules, or drop it: ckpt optim prune PATH -o OUT {drop_options(saved)}",
        )
    groups = tuple(replace(group, names=tuple(sorted(group.names, key=place.__getitem__))) for group in state.groups)
    return replace(state, groups=groups)
