"""How the name of a live model begins, and what tells it from a file; every command asks this of its paths."""

from __future__ import annotations

import os

__all__ = ["LIVE_PREFIX", "is_live_path"]

LIVE_PREFIX = "py:"


def is_live_path(path: str) -> bool:
    """Return whether ``path`` is ``py:`` and the name of a callable, so that its code may run.

    Where a file or a link has that name, it is meant, also with ``::`` and a key behind it: a shell and a hook list the
    files of a folder. No code runs for it.
    """
    if not path.startswith(LIVE_PREFIX):
        return False
    parts = path.split("::")
    return not any(os.path.lexists("::".join(parts[:count])) for count in range(1, len(parts) + 1))
