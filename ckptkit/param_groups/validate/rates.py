"""Check that each group has the learning rate that its schedulers set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckptkit.core.findings import Finding, Severity
from ckptkit.core.text import plural, short_number
from ckptkit.core.torch_optim import OPTIONS, overwritten_options
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroup, LiveOptimizer
from ckptkit.param_groups.schedules import expected_lrs, last_epoch, with_parts
from ckptkit.param_groups.validate.options import read_number

__all__ = ["FlatRate", "check_rates", "flat_lr", "is_close"]

# These start at the lr of the group. Others start with a warm-up or with an lr of their own. ExponentialLR multiplies
# by one factor in every step, so it makes the right lrs from any step.
_START_AT_GROUP_LR = frozenset(
    {
        "StepLR",
        "MultiStepLR",
        "PolynomialLR",
        "MultiplicativeLR",
        "CosineAnnealingLR",
        "CosineAnnealingWarmRestarts",
    }
)
# When built, these multiply the current lr of a group, also where it comes from a loaded state.
_MULTIPLY_WHEN_BUILT = frozenset({"LinearLR", "ConstantLR", "ChainedScheduler"})
# Before their first step, these do not decide the lr.
_WITHOUT_LR_AT_START = frozenset({"SWALR", "ReduceLROnPlateau"})
_MULTIPLIERS = tuple(option.name for option in OPTIONS.values() if option.multiplies == "lr")
_ORDER = (
    "build the scheduler first, then load the optimizer and the scheduler; or load the optimizer again, after the "
    "scheduler was built"
)


class FlatRate(NamedTuple):
    """One lr that all groups have, and the lowest and the highest lr that they should have."""

    lr: float
    lowest: float
    highest: float


def flat_lr(groups: Sequence[Mapping[str, Any]], own_lrs: Sequence[Any]) -> FlatRate | None:
    """Return the lr of all ``groups`` if they have the same, although ``own_lrs`` differ; else None.

    None is returned for an lr of 0, which every group has at the start of a warm-up and at the end of a schedule. None
    is also returned where a scheduler such as OneCycleLR replaced the lr of the groups.
    """
    lrs = [read_number(group.get("lr")) for group in groups]
    own = [number for lr in own_lrs if (number := read_number(lr)) is not None]
    if not lrs or len(own) < len(lrs) or any("lr" in overwritten_options(group) for group in groups):
        return None
    first = lrs[0]
    if not first or any(lr is None or not is_close(lr, first) for lr in lrs) or is_close(min(own), max(own)):
        return None
    return FlatRate(first, min(own), max(own))


def check_rates(optimizer: LiveOptimizer, schedulers: Sequence[Any]) -> Iterator[Finding]:
    """Yield a finding if the groups have other lrs than the schedulers of their optimizer set last.

    ``schedulers`` are all schedulers of this optimizer. Where their lrs cannot be known, nothing is reported.
    """
    live = [read_number(group.options.get("lr")) for group in optimizer.groups]
    kinds = [type(scheduler).__name__ for scheduler in schedulers]
    is_averaging = any("swa_lr" in group.options for group in optimizer.groups)
    if None in live or (is_averaging and "SWALR" not in kinds):
        return
    judged = [
        scheduler
        for scheduler, kind in zip(schedulers, kinds, strict=True)
        if not (kind in _WITHOUT_LR_AT_START and last_epoch(scheduler) == 0)
    ]
    last_lrs = [lrs for scheduler in judged if (lrs := _last_lrs(scheduler, len(live))) is not None]
    if not judged or len(last_lrs) < len(judged):
        return
    # The scheduler that was stepped last has the current lrs.
    if all(_different(optimizer.groups, lrs) for lrs in last_lrs):
        yield from _not_as_set(optimizer, judged[-1], last_lrs[-1])
    elif len(schedulers) == 1:
        yield from _not_as_computed(optimizer, judged[0])


def _last_lrs(scheduler: Any, count: int) -> list[float] | None:
    """Return the lrs that ``scheduler`` set last, or None where they are not known."""
    # A class outside torch with a step of its own may set lrs in another way than it records them.
    owner = next((base for base in type(scheduler).__mro__ if "step" in vars(base)), object)
    if not owner.__module__.startswith("torch.optim."):
        return None
    given = getattr(scheduler, "_last_lr", None)
    numbers = [read_number(value) for value in given] if isinstance(given, Sequence) else []
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) == count else None


def _different(groups: Sequence[LiveGroup], lrs: Sequence[float]) -> list[tuple[LiveGroup, float, float]]:
    """Return each group that has another lr than in ``lrs``, with that lr and its own."""
    different = []
    for group, lr in zip(groups, lrs, strict=True):
        own = read_number(group.options.get("lr")) or 0.0
        scales = [read_number(group.options.get(key)) for key in _MULTIPLIERS]
        if not any(is_close(lr * scale, own) for scale in (1.0, *scales) if scale is not None):
            different.append((group, lr, own))
    return different


def _not_as_set(optimizer: LiveOptimizer, scheduler: Any, lrs: Sequence[float]) -> Iterator[Finding]:
    kind, epoch = type(scheduler).__name__, last_epoch(scheduler)
    if epoch == 0 and kind == "ExponentialLR":
        return
    if epoch == 0 and kind in _START_AT_GROUP_LR and (new := list(_new_over_loaded(optimizer, scheduler))):
        yield from new
        return
    different = _different(optimizer.groups, lrs)
    group, lr, own = different[0]
    more = f" (and {plural(len(different) - 1, 'group')} more)" if len(different) > 1 else ""
    has_stepped = _has_stepped(optimizer.instance)
    cause = (
        "a script set the lr, or the optimizer was loaded before the scheduler was built"
        if has_stepped
        else f"the optimizer was loaded before {kind} was built, or only one of them was loaded"
    )
    yield codes.SCHEDULER_LR.finding(
        "",
        f"{group.where} has lr={short_number(own)}, but {kind} set {short_number(lr)} at step {epoch}{more}: {cause}",
        _ORDER,
        severity="warning" if has_stepped else "error",
    )


def _has_stepped(optimizer: Any) -> bool:
    """Return whether ``optimizer`` was stepped after a scheduler was built for it, as torch's schedulers record it."""
    return bool(getattr(optimizer, "_opt_called", False) or getattr(optimizer, "_step_count", 0))


def _new_over_loaded(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    """Yield a finding if a new scheduler starts from an ``initial_lr`` of a loaded state or of an older scheduler."""
    kind = type(scheduler).__name__
    expected = expected_lrs(scheduler) if kind in _MULTIPLY_WHEN_BUILT else None
    for number, group in enumerate(optimizer.groups):
        initial, lr = read_number(group.options.get("initial_lr")), read_number(group.options.get("lr"))
        if initial is None or lr is None:
            continue
        start = initial if kind in _START_AT_GROUP_LR else None if expected is None else expected[number]
        if start is not None and not is_close(start, lr):
            yield codes.SCHEDULER_INITIAL_LR.finding(
                "",
                f"{kind} is new and starts from initial_lr={short_number(initial)}, but {group.where} has "
                f"lr={short_number(lr)}: the initial_lr is from a loaded state or from an earlier scheduler",
                "load the state of the scheduler too; or, for a new schedule, remove initial_lr before you build the "
                'scheduler: group.pop("initial_lr", None)',
            )


def _not_as_computed(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    """Yield a finding if the lrs that a scheduler set differ from its own formula."""
    kind, epoch = type(scheduler).__name__, last_epoch(scheduler)
    if epoch == 0:
        yield from _new_over_loaded(optimizer, scheduler)
        return
    expected = expected_lrs(scheduler)
    if expected is None:
        return
    is_built_later = getattr(scheduler, "_step_count", None) == 1
    start = expected_lrs(scheduler, epoch=0) if kind in _MULTIPLY_WHEN_BUILT else None
    base_lrs = next((part.base_lrs for part in with_parts(scheduler) if hasattr(part, "base_lrs")), ())
    for number, (group, lr) in enumerate(zip(optimizer.groups, expected, strict=True)):
        own, base = read_number(group.options.get("lr")), read_number(base_lrs[number])
        if own is None or not base or abs(own - lr) <= 1e-3 * max(lr, own) + 1e-9 * base:
            continue
        # Exactly the start factor shows that the scheduler was built twice. Elsewhere a script may have set the lr.
        is_started_twice = start is not None and abs(own - lr * start[number] / base) <= 1e-3 * own
        severity: Severity = "warning" if _has_stepped(optimizer.instance) else "error"
        if is_built_later:
            cause = f"{kind} was built with last_epoch={(epoch or 1) - 1}, which does not fit the lr that was loaded"
        elif is_started_twice:
            cause = f"the optimizer was loaded before {kind} was built, which multiplied the lr once more"
        else:
            cause, severity = "a script set the lr, or only one of optimizer and scheduler was loaded", "note"
        yield codes.SCHEDULER_LR.finding(
            "",
            f"{group.where} has lr={short_number(own)}, but {kind} makes {short_number(lr)} of its base lr "
            f"{short_number(base)} at step {epoch}: {cause}",
            _ORDER,
            severity=severity,
        )
        return


def is_close(left: float, right: float) -> bool:
    """Return whether two learning rates are equal but for rounding."""
    return abs(left - right) <= 1e-6 * max(abs(left), abs(right))
