"""Compare two locks of param groups: one finding for each difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import option_texts, plural, printable, quoted
from ckptkit.core.torch_optim import overwritten_options
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.compare.groups import GroupView, compare_groups
from ckptkit.param_groups.lock import LockedParameter, LockLike, ParamGroupsLock, as_lock

__all__ = ["diff_locks", "group_views"]

_LOCK_AGAIN = "lock the groups again if the change is intended"
_BY_NAME = "load the optimizer state by name: torch loads it by position"


def diff_locks(expected: LockLike, found: LockLike) -> Report:
    """Return the differences of ``found`` from ``expected``; each is a lock, or the path of its file.

    Where one lock has no groups, only names, shapes, dtypes and ties are compared. Options are compared where
    ``expected`` has them. Codes of errors: ``groups.gone``, ``new``, ``shape``, ``moved``, ``order``, ``ties``; of
    warnings: ``dtype``, ``thawed``, ``options``. Raises ``GroupsError`` where an argument is not a lock, and what
    ``parse_lock`` raises.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> before = ckptkit.lock_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> after = ckptkit.lock_optimizer(model, torch.optim.SGD([model.weight], lr=0.1))
        >>> [finding.code for finding in ckptkit.diff_locks(before, after).findings]
        ['groups.thawed']
    """
    expected, found = as_lock(expected), as_lock(found)
    findings: list[Finding] = []
    if expected.fingerprint != found.fingerprint:
        findings += [*_name_findings(expected, found), *_shape_findings(expected, found)]
    if expected.groups and found.groups:
        findings += [*_membership_findings(expected, found), *_lock_group_findings(expected, found)]
    return Report(tuple(findings), GroupsError)


def _name_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    gone = [parameter for name, parameter in expected.parameters.items() if name not in found.parameters]
    new = [parameter for name, parameter in found.parameters.items() if name not in expected.parameters]
    renamed = _find_renamed(gone, new)
    for parameter in gone:
        other = renamed.get(parameter.name)
        message = f"{quoted(parameter.name)} {list(parameter.shape)} is gone"
        if other is None:
            yield codes.GONE.finding(parameter.name, message, "drop its state, or restore the name")
        else:
            message += f"; {quoted(other)} has the same shape and position"
            hint = f"rename its state: {printable(parameter.name)}={printable(other)}"
            yield codes.GONE.finding(parameter.name, message, hint)
    for parameter in new:
        if parameter.name not in renamed.values():
            suffix = "" if parameter.index is None else " and trains"
            message = f"{quoted(parameter.name)} {list(parameter.shape)} is new{suffix}"
            yield codes.NEW.finding(parameter.name, message, _LOCK_AGAIN)


def _find_renamed(gone: Sequence[LockedParameter], new: Sequence[LockedParameter]) -> dict[str, str]:
    """Return the new name of each parameter that is gone, where both lists have the same shapes in the same order."""
    if [parameter.shape for parameter in gone] != [parameter.shape for parameter in new]:
        return {}
    return {old.name: other.name for old, other in zip(gone, new, strict=True)}


def _shape_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    for name, before in expected.parameters.items():
        after = found.parameters.get(name)
        if after is None:
            continue
        if after.shape != before.shape:
            yield codes.SHAPE.finding(
                name,
                f"{quoted(name)} had shape {list(before.shape)} and now has {list(after.shape)}",
                "drop its optimizer state, which has the old shape, or resize the state like the parameter",
            )
        elif after.dtype != before.dtype and after.dtype and before.dtype:
            message = f"{quoted(name)} had dtype {before.dtype} and now has {after.dtype}"
            yield codes.DTYPE.finding(name, message, "torch casts its state to the new dtype")
        if set(after.aliases) != set(before.aliases):
            yield codes.TIES.finding(
                name,
                f"{quoted(name)} was tied to {_name_list(before.aliases)} and is now tied to "
                f"{_name_list(after.aliases)}",
                "tie the weights as before, or lock the groups again",
            )


def _membership_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    for name, before in expected.parameters.items():
        after = found.parameters.get(name)
        if after is not None and (before.index is None) != (after.index is None):
            change = (
                "was in no group and is now in one" if before.index is None else "was in a group and is now in none"
            )
            hint = "freeze or unfreeze it as before, or lock the groups again"
            yield codes.THAWED.finding(name, f"{quoted(name)} {change}", hint)


def _lock_group_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    differences = compare_groups(
        group_views(expected), group_views(found), ignored=lambda _, group: overwritten_options(group.options)
    )
    for difference in differences.groups:
        group = expected.groups[difference.expected]
        for name, number in difference.moved:
            other = quoted(found.groups[number].name)
            message = f"{quoted(name)} was in group {quoted(group.name)} and is now in {other}"
            yield codes.MOVED.finding(name, message, _BY_NAME)
        changes = [
            f"{option.key} {expected} -> {'nothing' if option.is_absent else found}"
            for option in difference.options
            for expected, found in [option_texts(option.expected, option.found)]
        ]
        if difference.optimizer is not None:
            changes.insert(0, f"optimizer {' -> '.join(difference.optimizer)}")
        if changes:
            message = f"group {quoted(group.name)} has other options: {', '.join(changes)}"
            yield codes.OPTIONS.finding(group.name, message, _LOCK_AGAIN, severity="warning")
    for order in differences.order:
        yield codes.ORDER.finding(
            order.expected,
            f"{plural(order.count, 'parameter')} changed position: the first position that held "
            f"{quoted(order.expected)} now holds {quoted(order.found)}",
            _BY_NAME,
        )


def _name_list(names: tuple[str, ...]) -> str:
    return ", ".join(map(quoted, names)) or "nothing"


def group_views(lock: ParamGroupsLock) -> list[GroupView]:
    """Return the groups of a lock in the form that ``compare_groups`` compares."""
    return [
        GroupView(group.name, tuple(parameter.name for parameter in group.parameters), group.options, group.optimizer)
        for group in lock.groups
    ]
