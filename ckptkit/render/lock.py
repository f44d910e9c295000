"""A lock as a page: a row for each parameter, in the order of the optimizer's state."""

from __future__ import annotations

from ckptkit.core.text import plural, printable
from ckptkit.param_groups.lock import LockedParameter, ParamGroupsLock
from ckptkit.render.page import Line, Page, Table

__all__ = ["lock_page"]


def lock_page(lock: ParamGroupsLock) -> Page:
    """Return the place, name, shape and group of each parameter, then the count and the fingerprint."""
    rows = [_row(one, group.name) for group in lock.groups for one in group.parameters]
    rows += [_row(one, "") for one in lock.outside]
    trained = sum(len(group.parameters) for group in lock.groups)
    count = f"{plural(trained, 'parameter')} in {plural(len(lock.groups), 'group')}, {len(lock.outside)} in none"
    return [
        Table(("index", "parameter", "dtype", "shape", "group"), tuple(rows), frozenset({"index"})),
        Line((count,)),
        Line((f"fingerprint sha256:{lock.fingerprint}",)),
    ]


def _row(one: LockedParameter, group: str) -> tuple[str, ...]:
    index = "" if one.index is None else str(one.index)
    return index, printable(one.name), one.dtype, str(list(one.shape)), printable(group)
