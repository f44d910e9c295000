"""How the name of a live model begins, and what tells it from a file; every command asks this of its paths."""

from __future__ import annotations

import os

__all__ = ["LIVE_PREFIX", "is_live_path"]

LIVE_PREFIX = "py:"


def is_live_path(path: str) -> bool:
    """Return whether ``path`` is ``py:`` and the name of a callable, whose code may run.

    A file or a link of that name is meant where a shell or a hook lists the files of a folder, also with ``::`` and a
    key behind it. No code runs for it.
    """
    if not path.startswith(LIVE_PREFIX):
        return False
    parts = path.split("::")
    return not any(os.path.lexists("::".join(parts[:count])) for count in range(1, len(parts) + 1))
