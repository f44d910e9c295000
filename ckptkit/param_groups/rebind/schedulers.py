"""Extend schedulers for a new group: the values that they keep for each group, and the learning rate it starts with."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_optim import initial_lr
from ckptkit.core.torch_types import Optimizer
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import unwrap_optimizer

__all__ = ["SchedulerExtension", "plan_extension"]

# These multiply the current rate of a group, so several of them can act together in any order.
_FACTORS = frozenset(
    {"StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "MultiplicativeLR"}
)
# Options of each group that only the constructor of the class writes, from its own arguments.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "OneCycleLR": ("initial_lr", "max_lr", "min_lr"),
    "CyclicLR": ("max_lr",),
}
_MOMENTUM_CYCLE = ("base_momentum", "max_momentum")
_REBUILD = "build the scheduler again after the group was added"


@dataclass(frozen=True, slots=True, eq=False)
class SchedulerExtension:
    """The planned extension of schedulers: the options of the new group, and the new value of each list."""

    options: Mapping[str, Any]
    lists: tuple[tuple[Any, str, list[Any]], ...]

    def apply(self) -> None:
        """Set the lists. Each is a new list, because two schedulers can share one."""
        for scheduler, name, values in self.lists:
            setattr(scheduler, name, values)


def plan_extension(schedulers: Sequence[Any], optimizer: Optimizer, group: Mapping[str, Any]) -> SchedulerExtension:
    """Return how ``schedulers`` are extended for a new group, as if the group had been there from their start.

    ``group`` has the options of the new group. Its ``lr`` becomes its ``initial_lr``, and its new ``lr`` is what the
    schedules have made of that by now, without the reductions of ``ReduceLROnPlateau``. Raises ``GroupsError`` for a
    scheduler of another optimizer, for one with values for other groups, and where a value cannot be known.
    """
    count = len(optimizer.param_groups)
    initial = initial_lr(group)
    lists: list[tuple[Any, str, list[Any]]] = []
    for scheduler in schedulers:
        for one in _parts(scheduler):
            _check(one, optimizer, group)
            lists.extend((one, name, values) for name, values in _values(one, count, group, initial))
    options = _scheduled_options(schedulers, {**group, "lr": copy.deepcopy(initial), "initial_lr": initial})
    for scheduler in schedulers:
        lists.extend(
            (one, "_last_lr", [*last[:count], copy.deepcopy(options["lr"])])
            for one in _parts(scheduler)
            if isinstance(last := getattr(one, "_last_lr", None), list)
        )
    return SchedulerExtension(options, tuple(lists))


def _parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _parts(inner)


def _check(scheduler: Any, optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    name = type(scheduler).__name__
    if unwrap_optimizer(scheduler.optimizer) is not optimizer:
        raise GroupsError(f"{name} drives another optimizer", hint="pass the schedulers of this optimizer only")
    if not type(scheduler).__module__.startswith("torch.optim."):
        raise GroupsError(
            f"{name} is not a scheduler of torch: how to extend it for a new group is not known", hint=_REBUILD
        )
    if name == "SWALR":
        raise GroupsError(
            "SWALR anneals from the rate that each group had at its start; a new group had none", hint=_REBUILD
        )
    required = _REQUIRED.get(name, ())
    if required and _cycles_momentum(scheduler):
        required = (*required, *_MOMENTUM_CYCLE)
    missing = [key for key in required if key not in group]
    if missing:
        raise GroupsError(
            f"{name} wrote {', '.join(required)} into each group when it was built: the new group has no {missing[0]}",
            hint=f"give the new group {', '.join(required)}, or {_REBUILD}",
        )


def _cycles_momentum(scheduler: Any) -> bool:
    return bool(getattr(scheduler, "cycle_momentum", False))


def _values(scheduler: Any, count: int, group: Mapping[str, Any], initial: object) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name of each list with a value for every group, and the list with a value for the new group."""
    for name in ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"):
        values = getattr(scheduler, name, None)
        if not isinstance(values, list):
            continue
        kind = type(scheduler).__name__
        if len(values) != count:
            raise GroupsError(
                f"{kind} has {name} for {plural(len(values), 'group')}, and the optimizer has {count}",
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
                f"{kind} has a different {key} for each group: the {key} of the new group is not known",
                hint=_REBUILD if name == "lr_lambdas" else f"give the new group an option {quoted(key)}",
            )
        yield name, [*values, value]


def _scheduled_options(schedulers: Sequence[Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a group would have now, if ``schedulers`` had driven it from their start."""
    flat = [one for scheduler in schedulers for one in _acting(scheduler) if type(one).__name__ != "ReduceLROnPlateau"]
    if len(flat) > 1 and not all(type(one).__name__ in _FACTORS for one in flat):
        names = " and ".join(type(one).__name__ for one in flat)
        raise GroupsError(
            f"{names} change the same learning rate: its value for a new group is not known",
            hint=_REBUILD,
        )
    options = dict(group)
    for one in flat:
        now = _options_now(one, group)
        rate = options["lr"] * (now["lr"] / group["lr"]) if len(flat) > 1 and group["lr"] else now["lr"]
        options = {**options, **now, "lr": rate}
    return options


def _acting(scheduler: Any) -> list[Any]:
    """Return the schedulers that set the current rate: in a SequentialLR, only the active one."""
    kind, inner = type(scheduler).__name__, getattr(scheduler, "_schedulers", ())
    if kind == "SequentialLR":
        return _acting(inner[bisect_right(vars(scheduler)["_milestones"], scheduler.last_epoch)])
    if kind == "ChainedScheduler":
        return [acting for one in inner for acting in _acting(one)]
    return [scheduler]


def _options_now(scheduler: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ``scheduler`` would give a group now, computed by torch on a copy of the scheduler."""
    alone = dict(group)
    probe = copy.copy(scheduler)
    probe.optimizer = SimpleNamespace(param_groups=[alone])
    vars(probe)["_get_lr_called_within_step"] = True  # else get_lr() warns
    for name, values in _values(scheduler, len(scheduler.optimizer.param_groups), group, group["initial_lr"]):
        setattr(probe, name, values[-1:])
    if type(scheduler).__name__ == "MultiplicativeLR":
        for epoch in range(1, scheduler.last_epoch + 1):
            alone["lr"] = alone["lr"] * probe.lr_lambdas[0](epoch)
        return alone
    compute: Callable[[], list[Any]] = getattr(probe, "_get_closed_form_lr", probe.get_lr)
    (alone["lr"],) = compute()
    return alone
