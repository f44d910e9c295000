"""Find the parts of a learning rate scheduler, and the learning rates that it makes at its current step."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ckptkit.core.torch_bridge import get_or_none

__all__ = [
    "FACTORS",
    "active_parts",
    "closed_form_lrs",
    "expected_lrs",
    "is_torch_scheduler",
    "last_epoch",
    "with_parts",
]

# These multiply the current rate of a group, so several of them can act together in any order.
FACTORS = frozenset(
    {"StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "MultiplicativeLR"}
)
# The closed form of these is known without a call of a function that the user wrote.
_CLOSED_FORM = FACTORS - {"MultiplicativeLR"} | {
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "OneCycleLR",
}


def with_parts(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler, then the schedulers inside a SequentialLR or ChainedScheduler."""
    yield scheduler
    parts = get_or_none(scheduler, "_schedulers")
    for part in parts if isinstance(parts, list | tuple) else ():
        if part is not scheduler and get_or_none(part, "optimizer") is not None:
            yield from with_parts(part)


def active_parts(scheduler: Any) -> list[Any]:
    """Return the schedulers that set the current rate: in a SequentialLR, only the active one."""
    kind, parts = type(scheduler).__name__, getattr(scheduler, "_schedulers", ())
    if kind == "SequentialLR":
        return active_parts(parts[bisect_right(vars(scheduler)["_milestones"], scheduler.last_epoch)])
    if kind == "ChainedScheduler":
        return [active for part in parts for active in active_parts(part)]
    return [scheduler]


def is_torch_scheduler(scheduler: Any) -> bool:
    """Return whether torch defines the class of ``scheduler``."""
    return type(scheduler).__module__.startswith("torch.optim.")


def last_epoch(scheduler: Any) -> int | None:
    """Return how often ``scheduler`` was stepped after it was built, or None where it does not count."""
    counts = [getattr(part, "last_epoch", None) for part in with_parts(scheduler)]
    return next((count for count in counts if isinstance(count, int)), None)


def closed_form_lrs(
    scheduler: Any, groups: Sequence[dict[str, Any]], lists: Mapping[str, Sequence[Any]], epoch: int | None = None
) -> list[Any]:
    """Return the rates that ``scheduler`` makes for ``groups``, computed by torch on a copy of the scheduler.

    ``lists`` replace the lists of the scheduler that have one value for each group. A scheduler that also drives the
    momentum writes it into ``groups``. ``epoch`` is the step; None is the current step.
    """
    probe = copy.copy(scheduler)
    vars(probe).update(lists)
    probe.optimizer = SimpleNamespace(param_groups=groups)
    vars(probe)["_get_lr_called_within_step"] = True  # else get_lr() warns
    if epoch is not None:
        probe.last_epoch = epoch
    compute: Callable[[], list[Any]] = getattr(probe, "_get_closed_form_lr", probe.get_lr)
    return compute()


def expected_lrs(scheduler: Any, *, epoch: int | None = None) -> list[float] | None:
    """Return the rate of each group after the steps that ``scheduler`` counted, from its base lrs and its settings.

    ``epoch`` is another number of steps, for a scheduler without parts. None where the rates follow from functions
    of the user, from a metric, or from earlier rates.
    """
    try:
        active = active_parts(scheduler)
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    kinds = {type(part).__name__ for part in active}
    if not all(is_torch_scheduler(part) for part in active) or not kinds <= _CLOSED_FORM:
        return None
    if (len(active) > 1 and not kinds <= FACTORS) or any(
        getattr(part, "_scale_fn_custom", None) is not None for part in active
    ):
        return None
    options = [
        {key: value for key, value in group.items() if key != "params"} for group in scheduler.optimizer.param_groups
    ]
    try:
        bases = [float(base) for base in active[0].base_lrs]
        lrs = list(bases)
        for part in active:
            made = closed_form_lrs(part, [dict(group) for group in options], {}, epoch)
            lrs = [
                float(rate) if len(active) == 1 or not base else lr * float(rate) / base
                for lr, rate, base in zip(lrs, made, bases, strict=True)
            ]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    return lrs if len(lrs) == len(options) else None
