"""What changed since groups were locked: parameters gone, new, of another shape, in another group or place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from ckptkit.core.findings import Finding, Report, Severity
from ckptkit.core.text import kind_of, plural, printable, quoted
from ckptkit.core.torch_optim import options_of_kind
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError
from ckptkit.param_groups.live import read_groups
from ckptkit.param_groups.lock import LockedGroup, LockedParameter, ParamGroupsLock, lock_optimizer, lock_plan
from ckptkit.param_groups.parameters import bare_name
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import assign
from ckptkit.param_groups.properties import parameter_table

__all__ = ["compare_with_spec", "diff_locks", "driven_options", "match_groups"]


# Cycles and annealing to one value write rates of their own into a group, and leave no trace of those it had.
_DRIVEN = {"max_lr": ("lr",), "swa_lr": ("lr",), "max_momentum": ("lr", "momentum", "betas")}
_AGAIN = "lock the groups again, once the change is meant"
_BY_NAME = "carry the optimizer state over by name: torch loads it by place"


def diff_locks(expected: ParamGroupsLock, found: ParamGroupsLock) -> Report:
    """Return what is different in ``found``; a lock without groups is compared by names, shapes, dtypes and ties.

    Codes of errors: ``groups.gone``, ``new``, ``shape``, ``moved``, ``order``, ``ties``; of warnings: ``dtype``,
    ``thawed``, ``options``. Options are those that ``expected`` gives; others are the optimizer's own.
    """
    for lock in (expected, found):
        if not isinstance(lock, ParamGroupsLock):
            raise GroupsError(f"a lock cannot be {kind_of(lock)}", hint="parse_lock(json.load(file)) reads one")
    if expected.fingerprint == found.fingerprint:
        findings = []
    else:
        findings = [*_names(expected, found), *_shapes(expected, found)]
    if expected.groups and found.groups:
        findings += [*_frozen(expected, found), *_groups(expected, found), *_order(expected, found)]
    return Report(tuple(findings), GroupsError)


def _names(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    gone = [one for name, one in expected.parameters.items() if name not in found.parameters]
    new = [one for name, one in found.parameters.items() if name not in expected.parameters]
    renamed = _renamed(gone, new)
    for one in gone:
        meant = renamed.get(one.name)
        yield _finding(
            "gone",
            one.name,
            f"{quoted(one.name)} {list(one.shape)} is gone"
            + (f"; {quoted(meant)} has its shape and its place" if meant else ""),
            f"rename its state: {printable(one.name)}={printable(meant)}"
            if meant
            else "drop its state, or give the name back",
        )
    for one in new:
        if one.name not in renamed.values():
            place = "" if one.index is None else ", and it trains"
            yield _finding("new", one.name, f"{quoted(one.name)} {list(one.shape)} is new{place}", _AGAIN)


def _renamed(gone: list[LockedParameter], new: list[LockedParameter]) -> dict[str, str]:
    """Pair what is gone with what is new, where shapes agree one by one in order."""
    if [one.shape for one in gone] != [one.shape for one in new]:
        return {}
    return {old.name: now.name for old, now in zip(gone, new, strict=True)}


def _shapes(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    for name, one in expected.parameters.items():
        now = found.parameters.get(name)
        if now is None:
            continue
        if now.shape != one.shape:
            yield _finding(
                "shape",
                name,
                f"{quoted(name)} was {list(one.shape)} and is {list(now.shape)}",
                "its optimizer state fits no longer: drop it, or carry it over with the operation that resized it",
            )
        elif now.dtype != one.dtype and now.dtype and one.dtype:
            yield _finding(
                "dtype", name, f"{quoted(name)} was {one.dtype} and is {now.dtype}", "its state is cast", "warning"
            )
        if set(now.aliases) != set(one.aliases):
            yield _finding(
                "ties",
                name,
                f"{quoted(name)} was tied to {_all(one.aliases)} and is tied to {_all(now.aliases)}",
                "tie the weights as before, or lock the groups again",
            )


def _frozen(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    for name, one in expected.parameters.items():
        now = found.parameters.get(name)
        if now is not None and (one.index is None) != (now.index is None):
            before, after = ("in no group", "in one") if one.index is None else ("in a group", "in none")
            yield _finding(
                "thawed",
                name,
                f"{quoted(name)} was {before} and is {after}",
                "freeze or unfreeze it as before, or lock the groups again",
                "warning",
            )


def match_groups(expected: ParamGroupsLock, found: ParamGroupsLock) -> tuple[Mapping[str, int], Mapping[int, int]]:
    """Return the number of the found group of each parameter, and of the one that each expected group became.

    That is the one of its name, or else the one with most of its parameters.
    """
    where = {one.name: number for number, group in enumerate(found.groups) for one in group.parameters}
    named = {group.name: number for number, group in enumerate(found.groups)}
    heirs = {number: named[group.name] for number, group in enumerate(expected.groups) if group.name in named}
    taken = set(heirs.values())
    for number, group in enumerate(expected.groups):
        if number in heirs:
            continue
        votes = Counter(where[one.name] for one in group.parameters if one.name in where)
        free = [(count, -heir) for heir, count in votes.items() if heir not in taken]
        if free:
            heirs[number] = -max(free)[1]
            taken.add(heirs[number])
    return where, heirs


def driven_options(options: Mapping[str, Any]) -> frozenset[str]:
    """Return the options of a live group that a scheduler writes, so that what they were is not known."""
    return frozenset(key for mark, keys in _DRIVEN.items() if mark in options for key in keys)


def _groups(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    where, heirs = match_groups(expected, found)
    for number, group in enumerate(expected.groups):
        heir = heirs.get(number)
        for one in group.parameters:
            now = where.get(one.name)
            if now is not None and now != heir:
                yield _finding(
                    "moved",
                    one.name,
                    f"{quoted(one.name)} was in group {quoted(group.name)} and is in {quoted(found.groups[now].name)}",
                    _BY_NAME,
                )
        if heir is not None:
            yield from _options(group, found.groups[heir])


def _options(group: LockedGroup, now: LockedGroup) -> Iterator[Finding]:
    driven = driven_options(now.options)
    changed = [
        f"{key} {value!r} -> {now.options[key]!r}" if key in now.options else f"{key} {value!r} -> nothing"
        for key, value in group.options.items()
        if now.options.get(key, _Nothing) != value and key not in driven
    ]
    if group.optimizer and now.optimizer and group.optimizer != now.optimizer:
        changed.insert(0, f"optimizer {group.optimizer} -> {now.optimizer}")
    if changed:
        yield _finding(
            "options",
            group.name,
            f"group {quoted(group.name)} has other options: {', '.join(changed)}",
            _AGAIN,
            "warning",
        )


class _Nothing:
    """What no option equals."""


def _order(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    before, after = _sequence(expected), _sequence(found)
    for optimizer in before:
        both = set(before[optimizer]) & set(after.get(optimizer, before[optimizer]))
        was = [name for name in before[optimizer] if name in both]
        now = [name for name in after.get(optimizer, was) if name in both]
        moved = [(one, other) for one, other in zip_longest(was, now) if one != other]
        if moved:
            one, other = moved[0]
            yield _finding(
                "order",
                one or "",
                f"{plural(len(moved), 'parameter')} stand in another order: where {quoted(one or '')} was, "
                f"{quoted(other or '')} is",
                _BY_NAME,
            )


def _sequence(lock: ParamGroupsLock) -> Mapping[str | None, list[str]]:
    """Return the names of each optimizer in the order of its state; one optimizer needs no name."""
    sequences: dict[str | None, list[str]] = {}
    single = len({group.optimizer for group in lock.groups}) == 1
    for group in lock.groups:
        held = sequences.setdefault(None if single else group.optimizer, [])
        held.extend(one.name for one in group.parameters)
    return sequences


def _all(names: tuple[str, ...]) -> str:
    return ", ".join(map(quoted, names)) or "nothing"


def _finding(code: str, key: str, message: str, hint: str, severity: Severity = "error") -> Finding:
    return Finding(f"groups.{code}", severity, key, message, hint)


_AGAIN_agreement = "build the groups from the spec again (build_param_groups), and carry the state over by name"


def compare_with_spec(model: Module, groups: Any, spec: SpecLike) -> Iterator[Finding]:
    """Yield what is wrong with ``spec``, and where ``groups`` differ from what it makes of ``model``.

    A learning rate is the one before schedulers moved it, where they recorded that.
    """
    assignment = assign(parameter_table(model), spec)
    yield from assignment.report.findings
    if not assignment.report.ok:
        return
    expected, found = lock_plan(assignment.plan), lock_optimizer(model, groups)
    where, heirs = match_groups(expected, found)
    live = [group.options for group in read_groups(groups)[0]]
    for number, group in enumerate(expected.groups):
        heir = heirs.get(number)
        for one in group.parameters:
            now = where.get(one.name)
            if now is not None and now != heir:
                yield Finding(
                    "groups.moved",
                    "error",
                    one.name,
                    f"the live group of {quoted(one.name)} {one.shape} is {_called(found.groups, now)}, and the "
                    f"spec says {quoted(group.name)}",
                    _AGAIN_agreement,
                )
        if heir is not None:
            yield from _options_agreement(group, found.groups[heir], _called(found.groups, heir), live[heir])
    trainable = {bare_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for one in expected.outside:
        if one.name in where and one.name in trainable:  # of a frozen one it is said without a spec
            yield Finding(
                "groups.moved",
                "error",
                one.name,
                f"{quoted(one.name)} {one.shape} is in {_called(found.groups, where[one.name])}, and the spec "
                "freezes it",
                _AGAIN_agreement,
            )


def _options_agreement(group: LockedGroup, now: LockedGroup, where: str, live: Mapping[str, Any]) -> Iterator[Finding]:
    ignored = driven_options(live) | options_of_kind("speed")
    wrong = [
        (f"{key}={now.options[key]!r}" if key in now.options else f"no {key}", f"{key}={value!r}")
        for key, value in group.options.items()
        if key not in ignored and (key not in now.options or now.options[key] != value)
    ]
    if group.optimizer and now.optimizer and group.optimizer != now.optimizer:
        wrong.insert(0, (now.optimizer, group.optimizer))
    if wrong:
        has, says = (", ".join(side) for side in zip(*wrong, strict=True))
        yield Finding(
            "groups.options",
            "error",
            group.name,
            f"{where} trains with {has}, and the spec says {says}",
            "build the groups from the spec again; load_state_dict() puts the options of the file in their place",
        )


def _called(groups: tuple[LockedGroup, ...], number: int) -> str:
    name = groups[number].name
    return name if name == f"group {number}" else f"group {number} ({quoted(name)})"
