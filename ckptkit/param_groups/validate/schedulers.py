"""Whether schedulers of learning rates fit the groups that they write into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import LiveGroup, LiveOptimizer, unwrap_optimizer
from ckptkit.param_groups.spec import number_fault
from ckptkit.param_groups.validate.optimizer_rules import trained_options

__all__ = ["check_schedulers", "read_schedulers"]

# Lists with a value for each group, where a scheduler has them: torch's, and timm's base_values.
_LISTS = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "base_values")
# These multiply the lr that a group has by one factor, so that a group which came later follows all the same.
_FOLLOW = frozenset({"StepLR", "MultiStepLR", "ExponentialLR", "PolynomialLR"})
# These start at the lr of the group; others warm up or have their own beginning.
_FROM_FULL = frozenset({*_FOLLOW, "MultiplicativeLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts"})
# What these write into each group when they are built, one value for all unless they get a list.
_WRITES = {"OneCycleLR": "max_lr", "CyclicLR": "max_lr", "SWALR": "swa_lr"}
_AGAIN = "build the scheduler again after the last add_param_group"


def read_schedulers(given: Any) -> tuple[Any, ...]:
    """Return the schedulers that were given: none, one, or several.

    Raises ``GroupsError`` where one of them is no scheduler: nothing that has an ``optimizer`` and a ``step``.
    """
    several = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    several = [_inner(scheduler) for scheduler in several]
    for scheduler in several:
        if not hasattr(scheduler, "optimizer") or not callable(getattr(scheduler, "step", None)):
            raise GroupsError(
                f"a scheduler cannot be a {type(scheduler).__name__}",
                hint="pass one scheduler of torch.optim.lr_scheduler, or a list of them",
            )
    return tuple(several)


def _inner(scheduler: Any) -> Any:
    """Return the scheduler that accelerate has wrapped, or what was given."""
    inner = getattr(scheduler, "scheduler", None)
    return inner if hasattr(inner, "optimizer") and not hasattr(scheduler, "optimizer") else scheduler


def check_schedulers(optimizers: Sequence[LiveOptimizer], schedulers: Sequence[Any]) -> Iterator[Finding]:
    """Yield where a scheduler drives another optimizer, other groups, or from another learning rate."""
    if schedulers and all(optimizer.instance is None for optimizer in optimizers):
        raise GroupsError(
            "schedulers are held against the optimizer that they drive, and groups alone have none",
            hint="pass the optimizer instead of its groups",
        )
    known = {id(optimizer.instance): optimizer for optimizer in optimizers}
    driven = Counter(id(unwrap_optimizer(scheduler.optimizer)) for scheduler in schedulers)
    for scheduler in schedulers:
        optimizer = known.get(id(unwrap_optimizer(scheduler.optimizer)))
        if optimizer is None:
            yield _elsewhere(type(scheduler).__name__, scheduler.optimizer)
            continue
        for one in _parts(scheduler):
            inner = known.get(id(unwrap_optimizer(one.optimizer)))
            if inner is None or inner is not optimizer:
                yield _elsewhere(f"{type(one).__name__} in {type(scheduler).__name__}", one.optimizer)
                continue
            # SequentialLR asks for each lr from the start, so that there no scheduler follows.
            alone = one is scheduler or type(scheduler).__name__ == "ChainedScheduler"
            yield from _lengths(optimizer, one, follows=alone and type(one).__name__ in _FOLLOW)
            yield from _bases(optimizer, one)
            yield from _flattened(optimizer, one)
        if driven[id(unwrap_optimizer(scheduler.optimizer))] == 1:
            yield from _began_elsewhere(optimizer, scheduler)
        yield from _ahead(optimizer, scheduler)


def _parts(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and all that it is made of."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _parts(inner)


def _elsewhere(called: str, optimizer: Any) -> Finding:
    return Finding(
        "groups.scheduler-optimizer",
        "error",
        "",
        f"{called} drives another {type(optimizer).__name__} than was given: these groups keep the lr that they have",
        "build the scheduler again for the optimizer that trains, or pass that optimizer too",
    )


def _lengths(optimizer: LiveOptimizer, scheduler: Any, *, follows: bool) -> Iterator[Finding]:
    count, called = len(optimizer.groups), type(scheduler).__name__
    wrong = {
        name: len(values)
        for name in _LISTS
        if isinstance(values := getattr(scheduler, name, None), Sequence) and len(values) != count
    }
    if wrong:
        name, length = next(iter(wrong.items()))
        effect = (
            "its steps are right for the others too, but what it saves and what it resumes from is not"
            if follows and set(wrong) <= {"base_lrs"}
            else "its next steps fail, or give the others a wrong lr"
        )
        yield Finding(
            "groups.scheduler-length",
            "warning" if follows and set(wrong) <= {"base_lrs"} else "error",
            "",
            f"{called} knows {plural(length, 'group')} ({name}), {optimizer.label} has {count}: {effect}",
            _AGAIN,
        )
    key = _WRITES.get(called)
    lacking = [group for group in optimizer.groups if key and not wrong and not _has(group, key, scheduler)]
    if key and lacking:
        yield Finding(
            "groups.scheduler-length",
            "error",
            "",
            f"{lacking[0].where} has no {key}, which {called} writes into every group when it is built and reads in "
            "every step: the group came later, or its options were loaded from elsewhere",
            _AGAIN,
        )


def _has(group: LiveGroup, key: str, scheduler: Any) -> bool:
    return key in group.options or hasattr(scheduler, f"{key}s")


def _bases(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    bases = getattr(scheduler, "base_lrs", None)
    if not isinstance(bases, Sequence) or len(bases) != len(optimizer.groups) or type(scheduler).__name__ in _WRITES:
        return
    for base, group in zip(bases, optimizer.groups, strict=True):
        initial = _number(group.options.get("initial_lr"))
        known = _number(base)
        if initial is not None and known is not None and not _close(initial, known):
            yield Finding(
                "groups.scheduler-base-lr",
                "warning",
                "",
                f"{type(scheduler).__name__} counts from a base lr of {known:g} for {group.where}, which says "
                f"initial_lr={initial:g}: one of them was loaded without the other, or for groups in another order",
                "load optimizer and scheduler from one checkpoint, or build the scheduler again",
            )


def _began_elsewhere(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    """Find a new scheduler that counts from an ``initial_lr`` which a file or an older scheduler left behind."""
    if type(scheduler).__name__ not in _FROM_FULL or getattr(scheduler, "last_epoch", None) != 0:
        return
    for group in optimizer.groups:
        initial, rate = _number(group.options.get("initial_lr")), _number(group.options.get("lr"))
        if initial is not None and rate is not None and not _close(initial, rate):
            yield Finding(
                "groups.scheduler-initial-lr",
                "warning",
                "",
                f"{type(scheduler).__name__} is new and counts from initial_lr={initial:g}, but {group.where} has "
                f"lr={rate:g}: the initial_lr came with a loaded state or from an earlier scheduler",
                'before the scheduler is built, take it out or set it: group.pop("initial_lr", None)',
            )


def _flattened(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    called = type(scheduler).__name__
    key = _WRITES.get(called)
    if key is None or len(optimizer.groups) < 2:
        return
    values = getattr(scheduler, f"{key}s", None) or [group.options.get(key) for group in optimizer.groups]
    if len({_number(value) for value in values}) > 1:
        return
    scales = {repr(group.options.get("lr_scale")) for group in optimizer.groups}
    alike = Counter(trained_options(group, "lr", "momentum", "betas") for group in optimizer.groups)
    # Groups that differ in other options have a reason to be; those that differ in none were split for their lr.
    if max(alike.values()) > 1 or len(scales) > 1:
        names = " and ".join(group.where for group in optimizer.groups[:2])
        yield Finding(
            "groups.scheduler-flat",
            "warning",
            "",
            f"{called} has one {key} for all {len(optimizer.groups)} groups, of which some differ in nothing but their "
            f"lr ({names}): whatever lr they had is gone",
            f"give it a list with a value for each group: {key}=[...]",
        )


def _ahead(optimizer: LiveOptimizer, scheduler: Any) -> Iterator[Finding]:
    """Find the schedule of a run that goes on, beside an optimizer that has yet to begin."""
    epoch = getattr(scheduler, "last_epoch", None)
    state = getattr(optimizer.instance, "state", None)
    if not isinstance(epoch, int) or epoch < 1 or optimizer.schema is None or not isinstance(state, Mapping) or state:
        return
    if optimizer.schema.has_shared_state or any(
        optimizer.schema.slots_for(group.options, ()) for group in optimizer.groups
    ):
        yield Finding(
            "groups.state-empty",
            "warning",
            "",
            f"{type(scheduler).__name__} is at {plural(epoch, 'step')}, but {optimizer.label} has no state at all: it "
            "was not loaded, or nothing of it was",
            f"load it, and look: {quoted('len(optimizer.state)')} is the number of parameters with state",
        )


def _number(value: Any) -> float | None:
    return None if value is None or number_fault(value) is not None else float(value)


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
