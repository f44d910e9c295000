"""Check that learning rate schedulers fit the groups of their optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted, short_number
from ckptkit.core.torch_bridge import get_or_none
from ckptkit.core.torch_optim import initial_lr
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroup, LiveOptimizer, unwrap_optimizer
from ckptkit.param_groups.schedules import with_parts
from ckptkit.param_groups.validate.optimizer_rules import trained_options
from ckptkit.param_groups.validate.options import read_number
from ckptkit.param_groups.validate.rates import check_rates, flat_lr, is_close

__all__ = ["check_schedulers", "read_schedulers"]

# The lists of torch's schedulers that have one value for each group, and base_values of timm's.
_LISTS = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "base_values")
# These multiply the current lr of each group by one factor, so they also work for a group that was added later.
_MULTIPLY_CURRENT = frozenset({"StepLR", "MultiStepLR", "ExponentialLR", "PolynomialLR"})
# The key that these schedulers write into each group. They write one value into all groups, unless given a list.
_WRITTEN_KEYS = {"OneCycleLR": "max_lr", "CyclicLR": "max_lr", "SWALR": "swa_lr"}
_SHOWN = 3
# The lowest lr of all groups: of torch's cosines, and of schedulers outside torch.
_MINIMUM_KEYS = ("eta_min", "lr_min", "min_lr")
_BUILD_AGAIN = (
    "rebind(optimizer, model, add_missing=..., schedulers=...) adds a group and extends the scheduler, which then "
    "continues; a scheduler that is built again restarts"
)


def read_schedulers(given: Any) -> tuple[Any, ...]:
    """Return the given schedulers (none, one or several) as a tuple, without the wrappers of accelerate.

    Raises ``GroupsError`` for an object that has no ``optimizer`` or no ``step()``.
    """
    schedulers = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    schedulers = [_unwrap(scheduler) for scheduler in schedulers]
    for scheduler in schedulers:
        if get_or_none(scheduler, "optimizer") is None or not callable(get_or_none(scheduler, "step")):
            raise GroupsError(
                f"a scheduler cannot be of type {type(scheduler).__name__}",
                hint="pass one scheduler of torch.optim.lr_scheduler, or a list of them",
            )
    return tuple(schedulers)


def _unwrap(scheduler: Any) -> Any:
    inner = get_or_none(scheduler, "scheduler")
    has_own = get_or_none(scheduler, "optimizer") is not None
    return scheduler if has_own or get_or_none(inner, "optimizer") is None else inner


def check_schedulers(optimizers: Sequence[LiveOptimizer], schedulers: Sequence[Any]) -> Iterator[Finding]:
    """Yield a finding for each scheduler that was built for another optimizer, for other groups, or for another lr.

    Raises ``GroupsError`` for schedulers without any optimizer.
    """
    if schedulers and all(optimizer.instance is None for optimizer in optimizers):
        raise GroupsError(
            "schedulers are compared with their optimizer, but only groups were given",
            hint="pass the optimizer instead of its groups",
        )
    by_instance = {id(optimizer.instance): optimizer for optimizer in optimizers}
    schedulers_of: dict[int, list[Any]] = {}
    unequal: set[int] = set()  # optimizers with another initial_lr than their schedulers, which explains a wrong lr
    for scheduler in schedulers:
        optimizer = by_instance.get(id(unwrap_optimizer(scheduler.optimizer)))
        if optimizer is None:
            yield _other_optimizer(type(scheduler).__name__, scheduler.optimizer)
            continue
        schedulers_of.setdefault(id(optimizer.instance), []).append(scheduler)
        for part in with_parts(scheduler):
            if by_instance.get(id(unwrap_optimizer(part.optimizer))) is not optimizer:
                yield _other_optimizer(f"{type(part).__name__} in {type(scheduler).__name__}", part.optimizer)
                continue
            # SequentialLR computes each lr from the start, so inside it no scheduler multiplies the current lr.
            is_stepped_alone = part is scheduler or type(scheduler).__name__ == "ChainedScheduler"
            multiplies_current = is_stepped_alone and type(part).__name__ in _MULTIPLY_CURRENT
            yield from _check_lengths(optimizer, part, multiplies_current=multiplies_current)
            for finding in _check_base_lrs(optimizer, part):
                unequal.add(id(optimizer.instance))
                yield finding
            yield from _check_minimum(optimizer, part)
            yield from _check_flat(optimizer, part)
        yield from _check_progress(optimizer, scheduler)
    for key, same_optimizer in schedulers_of.items():
        if key not in unequal:
            yield from check_rates(by_instance[key], same_optimizer)
        yield from _check_flat_now(by_instance[key], same_optimizer)


def _other_optimizer(label: str, optimizer: Any) -> Finding:
    return codes.SCHEDULER_OPTIMIZER.finding(
        "",
        f"{label} belongs to another {type(optimizer).__name__}, so it never changes the lr of the given groups",
        "build the scheduler again for the optimizer that trains, or pass the other optimizer too",
    )


def _check_lengths(optimizer: LiveOptimizer, scheduler: Any, *, multiplies_current: bool) -> Iterator[Finding]:
    count, label = len(optimizer.groups), type(scheduler).__name__
    wrong = {
        name: len(values)
        for name in _LISTS
        if isinstance(values := getattr(scheduler, name, None), Sequence) and len(values) != count
    }
    if wrong:
        name, length = next(iter(wrong.items()))
        is_harmless = multiplies_current and set(wrong) <= {"base_lrs"}
        effect = (
            "its steps are still right, but the state that it saves is not"
            if is_harmless
            else "its next steps fail, or give some groups a wrong lr"
        )
        yield codes.SCHEDULER_LENGTH.finding(
            "",
            f"{label} was built for {plural(length, 'group')} ({name}), but {optimizer.label} has {count}: {effect}",
            _BUILD_AGAIN,
            severity="warning" if is_harmless else "error",
        )
    key = _WRITTEN_KEYS.get(label)
    lacking = [group for group in optimizer.groups if key and not wrong and not _has_key(group, key, scheduler)]
    if key and lacking:
        yield codes.SCHEDULER_LENGTH.finding(
            "",
            f"{lacking[0].where} has no {key}, which {label} reads in every step: the group was added after {label} "
            "was built, or its options were loaded from a file",
            _BUILD_AGAIN,
        )


def _has_key(group: LiveGroup, key: str, scheduler: Any) -> bool:
    return key in group.options or hasattr(scheduler, f"{key}s")


def _check_base_lrs(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    base_lrs = getattr(scheduler, "base_lrs", None)
    if not isinstance(base_lrs, Sequence) or len(base_lrs) != len(optimizer.groups):
        return
    if type(scheduler).__name__ in _WRITTEN_KEYS:
        return
    for value, group in zip(base_lrs, optimizer.groups, strict=True):
        initial_lr, base_lr = read_number(group.options.get("initial_lr")), read_number(value)
        if initial_lr is not None and base_lr is not None and not is_close(initial_lr, base_lr):
            yield codes.SCHEDULER_BASE_LR.finding(
                "",
                f"{type(scheduler).__name__} has base lr {short_number(base_lr)} for {group.where}, but the group has "
                f"initial_lr={short_number(initial_lr)}: only one side was loaded, or the order of the groups changed",
                "load optimizer and scheduler from one checkpoint, or build the scheduler again",
            )


def _minimums(optimizer: LiveOptimizer, scheduler: Any) -> tuple[str, list[float | None]] | None:
    """Return the name of the lowest lr in ``scheduler``, and its value for each group; None where it has none."""
    # Attributes of the instance only: a property of a class outside torch would run its code.
    attributes: Mapping[str, Any] = getattr(scheduler, "__dict__", {})
    values = attributes.get("min_lrs")
    if isinstance(values, Sequence) and len(values) == len(optimizer.groups):
        return "min_lr", [read_number(value) for value in values]
    for key in _MINIMUM_KEYS:
        if (value := read_number(attributes.get(key))) is not None:
            return key, [value] * len(optimizer.groups)
    return None


def _check_minimum(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    """Yield a finding if the lowest lr of a scheduler is above the lr from which the schedule of a group starts."""
    found, label = _minimums(optimizer, scheduler), type(scheduler).__name__
    if found is None:
        return
    key, minimums = found
    lower = [
        (group.where, minimum, lr)
        for group, minimum in zip(optimizer.groups, minimums, strict=True)
        if minimum and (lr := read_number(initial_lr(group.options))) is not None
        if minimum > lr and not is_close(minimum, lr)
    ]
    if not lower:
        return
    more = f" and {plural(len(lower) - _SHOWN, 'more group')}" if len(lower) > _SHOWN else ""
    names = ", ".join(f"{where} (lr={short_number(lr)})" for where, _, lr in lower[:_SHOWN]) + more
    is_plateau = hasattr(scheduler, "min_lrs")
    effect = "never reduces it" if is_plateau else "raises it"
    yield codes.SCHEDULER_MINIMUM.finding(
        "",
        f"{label} has {key}={short_number(lower[0][1])}, which is above the lr of {names}: {label} {effect}",
        "give min_lr a list with one value for each group"
        if is_plateau
        else f"choose {key} below the lowest lr, or use LambdaLR, which multiplies the lr of each group",
    )


def _check_flat_now(optimizer: LiveOptimizer, schedulers: Sequence[Any]) -> Iterator[Finding]:
    """Yield a finding if all groups have one lr now, although they started with different lrs."""
    options = [group.options for group in optimizer.groups]
    flat = flat_lr(options, list(map(initial_lr, options)))
    parts = [part for scheduler in schedulers for part in with_parts(scheduler)]
    lowest = [minimum for part in parts for minimum in (_minimums(optimizer, part) or ("", []))[1]]
    if flat is None or any(minimum is not None and is_close(flat.lr, minimum) for minimum in lowest):
        return
    labels = " and ".join(dict.fromkeys(type(scheduler).__name__ for scheduler in schedulers))
    yield codes.SCHEDULER_FLAT.finding(
        "",
        f"all {len(options)} groups have lr={short_number(flat.lr)} under {labels}, although they started with lrs "
        f"from {short_number(flat.lowest)} to {short_number(flat.highest)}: their own lr is lost",
        "a schedule must multiply the base lr of each group, and not set one lr for all",
    )


def _check_flat(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    label = type(scheduler).__name__
    key = _WRITTEN_KEYS.get(label)
    if key is None or len(optimizer.groups) < 2:
        return
    values = getattr(scheduler, f"{key}s", None) or [group.options.get(key) for group in optimizer.groups]
    # CyclicLR moves each group between two lrs of its own.
    lows = getattr(scheduler, "base_lrs", ()) if label == "CyclicLR" else ()
    if any(len({read_number(value) for value in one}) > 1 for one in (values, lows)):
        return
    scales = {repr(group.options.get("lr_scale")) for group in optimizer.groups}
    alike = Counter(trained_options(group, "lr", "momentum", "betas") for group in optimizer.groups)
    # Groups that differ in other options are separate for that reason. Equal groups were separated for their lr.
    if max(alike.values()) > 1 or len(scales) > 1:
        names = " and ".join(group.where for group in optimizer.groups[:2])
        yield codes.SCHEDULER_FLAT.finding(
            "",
            f"{label} has one {key} for all {len(optimizer.groups)} groups, although some of them differ only in "
            f"their lr ({names}): their own lr is lost",
            f"give {label} a list with one value for each group: {key}=[...]",
            # The average of weights is often taken at one lr on purpose, after other schedulers had their epochs.
            severity="note" if label == "SWALR" else "warning",
        )


def _check_progress(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    """Yield a finding if the scheduler has counted steps and the optimizer has no state yet."""
    epoch = getattr(scheduler, "last_epoch", None)
    state = getattr(optimizer.instance, "state", None)
    if not isinstance(epoch, int) or epoch < 1 or optimizer.schema is None or not isinstance(state, Mapping) or state:
        return
    if optimizer.schema.has_shared_state or any(
        optimizer.schema.slots_for(group.options, ()) for group in optimizer.groups
    ):
        yield codes.STATE_EMPTY.finding(
            "",
            f"{type(scheduler).__name__} is at {plural(epoch, 'step')}, but {optimizer.label} has no state: the state "
            "was not loaded, or the loaded file had no state for these parameters",
            f"load the state, then check {quoted('len(optimizer.state)')}, the number of parameters with state",
        )
