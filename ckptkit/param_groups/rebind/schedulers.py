"""Schedulers that get one group more: the values that they keep for each group, and the rate that it joins with."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_optim import initial_lr
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import unwrap_optimizer

__all__ = ["SchedulerExtension", "plan_extension"]

# These multiply whatever rate a group has, so that several of them act together in any order.
_FACTORS = frozenset(
    {"StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "MultiplicativeLR"}
)
# What a class reads of each group, or keeps in a list, that only its constructor could have made of its arguments.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "OneCycleLR": ("initial_lr", "max_lr", "min_lr"),
    "CyclicLR": ("max_lr",),
}
_CYCLED = ("base_momentum", "max_momentum")
_AGAIN = "build the scheduler again after the group was added"


@dataclass(frozen=True, slots=True, eq=False)
class SchedulerExtension:
    """What the new group begins with, and the lists to set: nothing was changed yet."""

    options: Mapping[str, Any]
    lists: tuple[tuple[Any, str, list[Any]], ...]

    def carry_out(self) -> None:
        """Set the lists, each a new one: two schedulers may share theirs."""
        for scheduler, name, values in self.lists:
            setattr(scheduler, name, values)


def plan_extension(schedulers: Sequence[Any], optimizer: Any, group: Mapping[str, Any]) -> SchedulerExtension:
    """Return how a group with the options ``group`` joins ``schedulers``, as if it had been there from their start.

    Its ``lr`` is its ``initial_lr``, and it goes on with the rate that the schedules have made of that by now; what
    ``ReduceLROnPlateau`` did to others is not done to it. Raises ``GroupsError`` for a scheduler that drives another
    optimizer, does not know the groups that there are, or cannot know a value for one more.
    """
    count = len(optimizer.param_groups)
    initial = initial_lr(group)
    lists: list[tuple[Any, str, list[Any]]] = []
    for scheduler in schedulers:
        for one in _parts(scheduler):
            _check(one, optimizer, group)
            lists.extend((one, name, values) for name, values in _values(one, count, group, initial))
    joined = _together(schedulers, {**group, "lr": copy.deepcopy(initial), "initial_lr": initial})
    for scheduler in schedulers:
        lists.extend(
            (one, "_last_lr", [*last[:count], copy.deepcopy(joined["lr"])])
            for one in _parts(scheduler)
            if isinstance(last := getattr(one, "_last_lr", None), list)
        )
    return SchedulerExtension(joined, tuple(lists))


def _parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _parts(inner)


def _check(scheduler: Any, optimizer: Any, group: Mapping[str, Any]) -> None:
    called = type(scheduler).__name__
    if unwrap_optimizer(scheduler.optimizer) is not optimizer:
        raise GroupsError(f"{called} drives another optimizer", hint="pass the schedulers of this one only")
    if not type(scheduler).__module__.startswith("torch.optim."):
        raise GroupsError(
            f"{called} is none of torch's schedulers, so how it takes one group more is unknown", hint=_AGAIN
        )
    if called == "SWALR":
        raise GroupsError(
            "SWALR blends from the rate that each group had at its start, and a new one had none", hint=_AGAIN
        )
    needs = _NEEDS.get(called, ())
    if needs and _cycles_momentum(scheduler):
        needs = (*needs, *_CYCLED)
    lacking = [key for key in needs if key not in group]
    if lacking:
        raise GroupsError(
            f"{called} made {', '.join(needs)} of each group when it was built, and the new group has no {lacking[0]}",
            hint=f"give the new group {', '.join(needs)}, or build the scheduler again after it was added",
        )


def _cycles_momentum(scheduler: Any) -> bool:
    return bool(getattr(scheduler, "cycle_momentum", False))


def _values(scheduler: Any, count: int, group: Mapping[str, Any], initial: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield each list that has a value for every group, with one more."""
    for name in ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"):
        values = getattr(scheduler, name, None)
        if not isinstance(values, list):
            continue
        called = type(scheduler).__name__
        if len(values) != count:
            raise GroupsError(
                f"{called} knows {plural(len(values), 'group')} ({name}), and the optimizer has {count}",
                hint="build the scheduler again: it was built for other groups",
            )
        key = name.removesuffix("s")
        if name == "base_lrs":
            value = copy.deepcopy(initial)
        elif key in group and name != "lr_lambdas":
            value = group[key]
        elif all(one is values[0] or one == values[0] for one in values):
            value = values[0]
        else:
            raise GroupsError(
                f"{called} has a {key} for each group, and they differ: which one is the new group's is unknown",
                hint=_AGAIN if name == "lr_lambdas" else f"give the new group its {quoted(key)}",
            )
        yield name, [*values, value]


def _together(schedulers: Sequence[Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group after all that ``schedulers`` have done to it since their start."""
    flat = [one for scheduler in schedulers for one in _acting(scheduler) if type(one).__name__ != "ReduceLROnPlateau"]
    if len(flat) > 1 and not all(type(one).__name__ in _FACTORS for one in flat):
        names = " and ".join(type(one).__name__ for one in flat)
        raise GroupsError(
            f"{names} act on one rate together, and what they have made of it by now cannot be told for a new group",
            hint=_AGAIN,
        )
    joined = dict(group)
    for one in flat:
        now = _now(one, group)
        rate = joined["lr"] * (now["lr"] / group["lr"]) if len(flat) > 1 and group["lr"] else now["lr"]
        joined = {**joined, **now, "lr": rate}
    return joined


def _acting(scheduler: Any) -> list[Any]:
    """Return the schedulers that have made the rate what it is now: of a sequence only the one whose turn it is."""
    called, inner = type(scheduler).__name__, getattr(scheduler, "_schedulers", ())
    if called == "SequentialLR":
        return _acting(inner[bisect_right(vars(scheduler)["_milestones"], scheduler.last_epoch)])
    if called == "ChainedScheduler":
        return [acting for one in inner for acting in _acting(one)]
    return [scheduler]


def _now(scheduler: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a lone group with this scheduler, now; torch's own code computes them, on a copy."""
    alone = dict(group)
    probe = copy.copy(scheduler)
    probe.optimizer = SimpleNamespace(param_groups=[alone])
    vars(probe)["_get_lr_called_within_step"] = True  # what it would warn of otherwise
    for name, values in _values(scheduler, len(scheduler.optimizer.param_groups), group, group["initial_lr"]):
        setattr(probe, name, values[-1:])
    if type(scheduler).__name__ == "MultiplicativeLR":
        for epoch in range(1, scheduler.last_epoch + 1):
            alone["lr"] = alone["lr"] * probe.lr_lambdas[0](epoch)
        return alone
    compute: Callable[[], list[Any]] = getattr(probe, "_get_closed_form_lr", probe.get_lr)
    (alone["lr"],) = compute()
    return alone
