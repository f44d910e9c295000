"""The files and folders that a path with wildcards fits."""

from __future__ import annotations

import glob
import re

from ckptkit.core.files.places import is_url, kind_at
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["expand_path"]

_WILDCARDS = lazy_pattern(r"[*?\[]")
_DIGITS = lazy_pattern(r"([0-9]+)")


def expand_path(path: str) -> list[str] | None:
    """Return the files and folders that a path with wildcards fits, with numbers in their natural order.

    What follows ``::`` in ``path`` follows each of them. None is the answer for a path without wildcards, and for one
    that exists as it is written.
    """
    file, sign, part = path.partition("::")
    if is_url(path) or not _WILDCARDS.search(file) or kind_at(path) or kind_at(file):
        return None
    return [f"{found}{sign}{part}" for found in sorted(glob.glob(file), key=_natural)]


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a key for sorting by which ``step_9`` is before ``step_10``."""
    return [(int(part), part) if part.isdecimal() else (0, part) for part in re.split(_DIGITS.pattern, path)]
