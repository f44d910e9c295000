"""How many columns of a terminal a text takes, and texts that are shortened to a number of columns."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

from ckptkit.core.text import shared_start

__all__ = ["are_plain", "display_width", "shortened", "start_of"]

_NOT_ASCII = re.compile("[^\\x00-\\x7f]")
_CUT = "…"
_LEAST_WORD = 8  # a name in a sentence is shortened to this before the end of the sentence is left out
_COUNT = re.compile(r" ×[0-9,]+$")  # how many keys a joined row stands for
_INSIDE_NAME = re.compile(r"[._/]\w")
_SEGMENT = re.compile(r"\.(?![^{]*\})")  # a dot between segments of a key, not one of a range such as {0..3}
_TAIL_SHARES = (1 / 2, 1 / 4, 9 / 10, 1 / 10)  # other places of the cut, where two names would look the same


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


def _end_of(text: str, size: int) -> str:
    if text.isascii():
        return text[max(len(text) - size, 0) :]
    fits = sum(width <= size for width in accumulate(map(_char_width, reversed(text))))
    end = text[len(text) - fits :]
    while end and not _char_width(end[0]):  # an accent belongs to the character before it
        end = end[1:]
    return end


def shortened(texts: Sequence[str], size: int) -> list[str]:
    """Return the texts with at most ``size`` columns each: names without their middle, sentences without their end.

    Different texts stay different where that is possible.
    """
    long = [text for text in dict.fromkeys(texts) if display_width(text) > size]
    if not long:
        return list(texts)
    short = {text: _shorten(text, size) for text in long}
    alike: dict[str, list[str]] = defaultdict(list)
    for text in dict.fromkeys(texts):
        alike[short.get(text, text)].append(text)
    for group in alike.values():
        if len(group) > 1:
            short |= _told_apart([text for text in group if text in short], size)
    return [short.get(text, text) for text in texts]


def _shorten(text: str, size: int) -> str:
    name, count = _without_count(text)
    if display_width(count) + _LEAST_WORD > size:
        name, count = text, ""
    if " " not in name:
        return f"{_without_middle(name, size - display_width(count))}{count}"
    words = name.split(" ")
    sizes = list(map(display_width, words))
    excess = display_width(name) + display_width(count) - size
    names = [number for number, word in enumerate(words) if _INSIDE_NAME.search(word)]
    while excess > 0 and max((sizes[number] for number in names), default=0) > _LEAST_WORD:
        longest = max(names, key=sizes.__getitem__)
        second = max((sizes[number] for number in names if number != longest), default=0)
        less = min(excess, sizes[longest] - max(_LEAST_WORD, min(second, sizes[longest] - 1)))
        sizes[longest] -= less
        excess -= less
    name = " ".join(_without_middle(word, fit) for word, fit in zip(words, sizes, strict=True))
    if excess > 0:
        name = start_of(name, size - display_width(count) - 1).rstrip() + _CUT
    return name + count


def _without_count(text: str) -> tuple[str, str]:
    match = _COUNT.search(text) if "×" in text else None
    return (text[: match.start()], match[0]) if match else (text, "")


def _without_middle(name: str, size: int, share: float = 2 / 3) -> str:
    """Return a name without its middle, cut between segments where these are about as long as the room for them.

    ``share`` is the part of the room that the end of the name gets: the end tells most names apart.
    """
    if display_width(name) <= size:
        return name
    room = max(size - 1, 0)
    most = round(room * share)
    end = _end_between_segments(name, most, most)
    return f"{_start_between_segments(name, room - display_width(end))}{_CUT}{end}" if size > 0 else ""


def _start_between_segments(name: str, size: int) -> str:
    """Return the start of a name: whole segments if they fill half of the room, and no part of a range."""
    start = start_of(name, size)
    if start.rfind("{") > start.rfind("}"):
        start = start[: start.rfind("{")].removesuffix(".")
    dots = [match.start() for match in _SEGMENT.finditer(name, 0, len(start) + 1)]
    return start[: dots[-1]] if dots and dots[-1] * 2 >= len(start) else start


def _end_between_segments(name: str, size: int, room: int) -> str:
    """Return the end of a name: whole segments of at most ``size``, else the last one if there is ``room`` for it."""
    ends = [name[match.end() :] for match in _SEGMENT.finditer(name)]
    whole = next((end for end in ends if display_width(end) <= size), ends[-1] if ends else name)
    return whole if size <= 2 * display_width(whole) and display_width(whole) <= room else _end_of(name, size)


def _told_apart(texts: Sequence[str], size: int) -> dict[str, str]:
    """Return other short forms of texts that look the same without their middle: they keep what differs, if it fits."""
    if any(" " in _without_count(text)[0] for text in texts):
        return {}
    start = shared_start(min(texts), max(texts))
    ends = [text[start:][::-1] for text in texts]
    end = shared_start(min(ends), max(ends))
    forms = [{text: _around(text, start, len(text) - end, size) for text in texts}]
    forms += [{text: _without_middle(text, size, share) for text in texts} for share in _TAIL_SHARES]
    forms.append({text: _without_middle(text[start : len(text) - end], size) for text in texts})
    return max(forms, key=lambda form: len(set(form.values())))


def _around(text: str, start: int, end: int, size: int) -> str:
    """Return a text with what is between two places, and as much of both ends as there is room for."""
    kept = text[start:end]
    rest, count = _without_count(text[end:])
    room = size - 2 - display_width(kept) - display_width(count)
    if room < 0:
        return f"{_CUT}{_without_middle(kept + rest, size - 1 - display_width(count))}{count}"
    most = room - room // 3
    after = (rest if display_width(rest) <= room else _end_between_segments(rest, most, room)) + count
    before = start_of(text[:start], room + display_width(count) - display_width(after))
    gaps = (before != text[:start]), (after != text[end:])
    return f"{before}{_CUT * gaps[0]}{kept}{_CUT * gaps[1]}{after}"
