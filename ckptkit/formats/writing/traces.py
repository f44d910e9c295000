"""Whether this process has left anything on a disk: what a message after an interrupt may say."""

from __future__ import annotations

import os

__all__ = ["has_left_nothing", "note_new_output", "note_removed", "note_temporary"]

_temporaries: set[str] = set()
_outputs: list[str] = []  # only the first


def note_temporary(path: str) -> None:
    """Note, before it exists, that a temporary file or directory is made."""
    _temporaries.add(path)


def note_removed(path: str) -> None:
    """Note that a temporary file or directory no longer exists under its name."""
    _temporaries.discard(path)


def note_new_output(path: str) -> None:
    """Note, before it happens, that an output gets its name; in a temporary directory this does not count."""
    if not _outputs and os.path.dirname(path) not in _temporaries:
        _outputs.append(path)


def has_left_nothing() -> bool:
    """Return whether no output got its name, and no temporary file or directory is left."""
    return not _outputs and not _temporaries
