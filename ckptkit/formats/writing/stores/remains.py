"""What is left of a replacement that did not end, in one sentence."""

from __future__ import annotations

from collections.abc import Collection

from ckptkit.core.text import printable

__all__ = ["AGAIN", "what_is_where"]

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


def _named(names: Collection[str]) -> str:
    shown = [printable(name) for name in sorted(names)]
    if len(shown) > _MOST:
        return f"{shown[0]} to {shown[-1]} ({len(shown)} files)"
    *first, last = shown
    return f"{', '.join(first)} and {last}" if first else last
