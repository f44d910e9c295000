"""What this process has left on a disk or in a store: what a message after an interrupt may say."""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = [
    "forget",
    "has_left_nothing",
    "kept",
    "left_between",
    "note_kept",
    "note_new_output",
    "note_removed",
    "note_replaced",
    "note_replacing",
    "note_temporary",
]

_temporaries: set[str] = set()
_outputs: list[str] = []  # only the first
_replacing: dict[str, Callable[[], str]] = {}
_kept: list[str] = []


def forget() -> None:
    """Forget everything: a command tells of what it has left itself, and one process may run several."""
    for notes in (_temporaries, _outputs, _replacing, _kept):
        notes.clear()


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


def note_kept(sentence: str) -> None:
    """Note a sentence about finished files that stay for a run that goes on."""
    _kept.append(sentence)


def kept() -> str:
    """Return the last sentence about finished files that stay, or an empty string."""
    return _kept[-1] if _kept else ""


def has_left_nothing() -> bool:
    """Return whether no output got its name, and no temporary file or directory is left."""
    return not _outputs and not _temporaries


def note_replacing(path: str, tell: Callable[[], str]) -> None:
    """Note that an output is replaced in steps; ``tell`` says where it stands, or returns an empty string."""
    _replacing[path] = tell


def note_replaced(path: str) -> None:
    """Note that the output is replaced, or is the old one."""
    _replacing.pop(path, None)


def left_between() -> str:
    """Return what is to be said of outputs that did not end, or an empty string."""
    return "; ".join(text for tell in tuple(_replacing.values()) if (text := tell()))
