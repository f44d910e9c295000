"""Extend schedulers for a new group: their lists with one value for each group, and the learning rate of the group."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_optim import initial_lr
from ckptkit.core.torch_types import Optimizer
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import unwrap_optimizer
from ckptkit.param_groups.schedules import FACTORS, active_parts, closed_form_lrs, is_torch_scheduler, with_parts

__all__ = ["SchedulerExtension", "plan_extension"]

# Options of each group that only the constructor of the class writes, from its own arguments.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "OneCycleLR": ("initial_lr", "max_lr", "min_lr"),
    "CyclicLR": ("max_lr",),
}
_MOMENTUM_CYCLE = ("base_momentum", "max_momentum")
_REBUILD = "build the scheduler again after the group was added"


@dataclass(frozen=True, slots=True, eq=False)
class SchedulerExtension:
    """The planned extension of schedulers: the options of each new group, and the new value of each list."""

    options: tuple[Mapping[str, Any], ...]
    lists: tuple[tuple[Any, str, list[Any]], ...]

    def apply(self) -> None:
        """Set the lists. Each is a new list, because two schedulers can share one."""
        for scheduler, name, values in self.lists:
            setattr(scheduler, name, values)


def plan_extension(
    schedulers: Sequence[Any], optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]
) -> SchedulerExtension:
    """Return how ``schedulers`` are extended for new groups, as if the groups had been there from their start.

    ``groups`` has the options of each new group. Its ``lr`` becomes its ``initial_lr``. Its new ``lr`` is the rate
    that the schedulers would have set by now, without the reductions of ``ReduceLROnPlateau``. Raises ``GroupsError``
    for a scheduler of another optimizer, for a scheduler of other groups, and where a value cannot be known.
    """
    count = len(optimizer.param_groups)
    extended: dict[tuple[int, str], tuple[Any, str, list[Any]]] = {}
    options = []
    every = [part for scheduler in schedulers for part in with_parts(scheduler)]
    for group in groups:
        initial = initial_lr(group)
        new_values = []
        for scheduler in every:
            _check_extensible(scheduler, optimizer, group)
            new_values += [(scheduler, *entry) for entry in _extended_lists(scheduler, count, group, initial)]
        options.append(_scheduled_options(schedulers, {**group, "lr": copy.deepcopy(initial), "initial_lr": initial}))
        new_values += [
            (scheduler, "_last_lr", [*last[:count], copy.deepcopy(options[-1]["lr"])])
            for scheduler in every
            if isinstance(last := getattr(scheduler, "_last_lr", None), list)
        ]
        for scheduler, name, values in new_values:
            _, _, known = extended.setdefault((id(scheduler), name), (scheduler, name, values[:-1]))
            known.append(values[-1])
    return SchedulerExtension(tuple(options), tuple(extended.values()))


def _check_extensible(scheduler: Any, optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    name = type(scheduler).__name__
    if unwrap_optimizer(scheduler.optimizer) is not optimizer:
        raise GroupsError(
            f"{name} is a scheduler of another optimizer", hint="pass the schedulers of this optimizer only"
        )
    if not is_torch_scheduler(scheduler):
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


def _extended_lists(
    scheduler: Any, count: int, group: Mapping[str, Any], initial: object
) -> Iterator[tuple[str, list[Any]]]:
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
        elif all(known is values[0] or known == values[0] for known in values):
            value = values[0]
        else:
            raise GroupsError(
                f"{kind} has a different {key} for each group: the {key} of the new group is not known",
                hint=_REBUILD if name == "lr_lambdas" else f"give the new group an option {quoted(key)}",
            )
        yield name, [*values, value]


def _scheduled_options(schedulers: Sequence[Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a group would have now, if ``schedulers`` had changed them from their start."""
    active = [
        inner
        for scheduler in schedulers
        for inner in active_parts(scheduler)
        if type(inner).__name__ != "ReduceLROnPlateau"
    ]
    kinds = [type(scheduler).__name__ for scheduler in active]
    if len(active) > 1 and not all(kind in FACTORS for kind in kinds):
        names = " and ".join(kinds)
        raise GroupsError(
            f"{names} change the same learning rate: its value for a new group is not known",
            hint=_REBUILD,
        )
    options = dict(group)
    for scheduler in active:
        now = _options_now(scheduler, group)
        rate = options["lr"] * (now["lr"] / group["lr"]) if len(active) > 1 and group["lr"] else now["lr"]
        options = {**options, **now, "lr": rate}
    return options


def _options_now(scheduler: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ``scheduler`` would give a group now, computed by torch on a copy of the scheduler."""
    options = dict(group)
    count = len(scheduler.optimizer.param_groups)
    lists = {name: values[-1:] for name, values in _extended_lists(scheduler, count, group, group["initial_lr"])}
    if type(scheduler).__name__ == "MultiplicativeLR":
        for epoch in range(1, scheduler.last_epoch + 1):
            options["lr"] = options["lr"] * lists["lr_lambdas"][0](epoch)
        return options
    (options["lr"],) = closed_form_lrs(scheduler, [options], lists)
    return options
