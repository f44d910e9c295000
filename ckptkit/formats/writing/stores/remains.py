"""What is left of an output that did not end, in one sentence."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError
from ckptkit.formats.writing.state import add_to_hint, leftover
from ckptkit.formats.writing.traces import note_replacing

__all__ = ["AGAIN", "tell_what_is_left", "what_is_where"]

AGAIN = "run it again with --force: that replaces all of it"
_MOST = 6  # names in a row


def what_is_where(
    url: str, *, new: Collection[str], old: Collection[str], gone: Collection[str], unknown: Collection[str]
) -> str:
    """Return the sentence about the files of a folder of which some are new, and what to do."""
    clauses = [
        f"{_named(names)} {one if len(names) == 1 else several}"
        for names, one, several in (
            (new, "is new", "are new"),
            (old, "is the old one", "are the old ones"),
            (gone, "is gone", "are gone"),
            (unknown, "may be new or old", "may be new or old"),
        )
        if names
    ]
    *first, last = clauses
    return f"in {printable(url)}, {', '.join(first)}{', and ' if first else ''}{last}; {AGAIN}"


def tell_what_is_left(error: BaseException | None, url: str, left: Sequence[str], told: str) -> None:
    """Add to an error, or to an interrupt, what could not be removed, and the sentence about old and new files."""
    clauses = [text for text in (leftover(left), told) if text]
    if isinstance(error, CkptkitError):
        for text in clauses:
            add_to_hint(error, text)
    elif clauses and error is not None:
        whole = "; ".join(clauses)
        note_replacing(url, lambda: whole)
        error.add_note(whole)  # for callers from Python


def _named(names: Collection[str]) -> str:
    shown = [printable(name) for name in sorted(names)]
    if len(shown) > _MOST:
        return f"{shown[0]} to {shown[-1]} ({len(shown)} files)"
    *first, last = shown
    return f"{', '.join(first)} and {last}" if first else last
