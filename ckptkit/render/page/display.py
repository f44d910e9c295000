"""How many columns of a terminal a text takes, and parts of texts by their columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate

__all__ = ["are_plain", "display_width", "end_of", "start_of"]

_NOT_ASCII = re.compile("[^\\x00-\\x7f]")


def display_width(text: str) -> int:
    """Return the number of columns that a terminal needs for a text: 2 for a wide character, 0 for an accent."""
    return len(text) if text.isascii() else len(text) + sum(_char_width(char) - 1 for char in _NOT_ASCII.findall(text))


def are_plain(texts: Sequence[str]) -> bool:
    """Return whether each character of many texts takes one column, as in ASCII and in bars."""
    return all(map(str.isascii, texts)) or all(_char_width(char) == 1 for char in set("".join(texts)))


def _char_width(char: str) -> int:
    if char.isascii():
        return 1
    import unicodedata

    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def start_of(text: str, size: int) -> str:
    """Return the longest start of a text that takes at most ``size`` columns."""
    if text.isascii():
        return text[: max(size, 0)]
    return text[: sum(width <= size for width in accumulate(map(_char_width, text)))]


def end_of(text: str, size: int) -> str:
    """Return the longest end of a text that takes at most ``size`` columns."""
    if text.isascii():
        return text[max(len(text) - size, 0) :]
    fits = sum(width <= size for width in accumulate(map(_char_width, reversed(text))))
    end = text[len(text) - fits :]
    while end and not _char_width(end[0]):  # an accent belongs to the character before it
        end = end[1:]
    return end
