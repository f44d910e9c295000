"""Write pairs of keys as few renames, each of which matches the keys of its pairs and no other key."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Rename",
    "as_template",
    "covering_patterns",
    "fill_numbers",
    "is_plain_text",
    "literal_rename",
    "numbers_in",
    "short_renames",
]

_SEGMENT = re.compile(r"[^./]*[./]?", re.DOTALL)
_NUMBER = re.compile(r"(?<![^./])(0|[1-9][0-9]{0,17})(?![^./])")
_SPECIAL = re.compile(r"[*{}=]|^re:")
_VARIABLES = "ijklmnopqrstuvwxyz"
_MAX_SEGMENTS = 32  # a hostile key can have a million


@dataclass(frozen=True, slots=True)
class Rename:
    """A pattern of found keys, their new names, and each expected key with its found key."""

    source: str
    target: str
    keys: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Names:
    """How many found keys begin with a text or with a template, which has ``#`` for each number."""

    texts: Counter[str] = field(default_factory=Counter)
    templates: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, keys: Iterable[str]) -> _Names:
        names = cls()
        for key in keys:
            beginnings = list(_beginnings(key))
            names.texts.update(beginnings)
            names.templates.update({as_template(text) for text in beginnings})
            names.whole[as_template(key)] += 1
        return names


def _beginnings(key: str) -> Iterator[str]:
    """Yield the beginnings of a key that end with a separator, and the empty text."""
    yield ""
    at = 0
    for _, found in zip(range(_MAX_SEGMENTS), re.finditer(r"[./]", key), strict=False):
        at = found.end()
        yield key[:at]


def as_template(text: str) -> str:
    """Return a key, or a part of one, with ``#`` in place of each number."""
    return _NUMBER.sub("#", text)


_Pair = tuple[str, str]  # an expected key and its found key, or the beginnings of both


def short_renames(pairs: Mapping[str, str], found: Collection[str]) -> list[Rename]:
    """Return renames that give each found key the expected key of its pair; pairs of equal keys need none.

    ``pairs`` maps expected keys to found keys, and ``found`` are all found keys. A rule file cannot hold a lone
    surrogate, so a pair of such a key is left out.
    """
    waiting = [pair for pair in pairs.items() if pair[0] != pair[1]]
    if not waiting:
        return []
    renames: list[Rename] = []
    for part_of in (_heads, _whole):
        is_growing = True
        while (
            is_growing and len(waiting) > 1
        ):  # the first rule that matches decides, so keys of earlier rules do not count
            renamed = {given for rename in renames for given in rename.keys.values()}
            names = _Names.of(key for key in found if key not in renamed)
            before = len(renames)
            for is_numbered in (True, False):
                waiting = _add_renames(renames, waiting, names, part_of, is_numbered=is_numbered)
            is_growing = len(renames) > before
    for expected, given in waiting:
        literals = literal_rename(given, expected)
        if literals is not None:
            renames.append(Rename(*literals, {expected: given}))
    return renames


def _add_renames(
    renames: list[Rename],
    waiting: Iterable[_Pair],
    names: _Names,
    part_of: Callable[[_Pair], _Pair | None],
    *,
    is_numbered: bool,
) -> list[_Pair]:
    """Append the renames of several pairs each that match no other key, and return the pairs without one."""
    groups: dict[_Pair | None, list[_Pair]] = defaultdict(list)
    for pair in waiting:
        part = part_of(pair)
        groups[(as_template(part[0]), as_template(part[1])) if part and is_numbered else part].append(pair)
    ending = "*" if part_of is _heads else ""
    counts = names.whole if not ending else names.templates if is_numbered else names.texts
    left = groups.pop(None, [])
    for name, group in groups.items():
        parts = [part for pair in group if (part := part_of(pair)) is not None]
        is_alone = name is not None and counts[name[1]] == len(group) > 1
        sides = _patterns(parts, is_numbered=is_numbered) if is_alone else None
        if sides is None:
            left += group
        else:
            renames.append(Rename(f"{sides[0]}{ending}", f"{sides[1]}{ending}", dict(group)))
    return left


def _whole(pair: _Pair) -> _Pair | None:
    return None if any(map(_SPECIAL.search, pair)) or len(_NUMBER.findall(pair[1])) == 0 else pair


def _heads(pair: _Pair) -> _Pair | None:
    """Return two keys without the equal segments at their end; None if they have none, or special characters."""
    expected, found = pair
    cut = 0
    for ours, theirs in zip(reversed(_SEGMENT.findall(expected)), reversed(_SEGMENT.findall(found)), strict=False):
        if ours != theirs:
            break
        cut += len(ours)
    heads = expected[: len(expected) - cut], found[: len(found) - cut]
    is_at_segments = cut and all(not head or head[-1] in "./" for head in heads)
    return heads if is_at_segments and not any(map(_SPECIAL.search, heads)) else None


def _patterns(parts: Sequence[_Pair], *, is_numbered: bool) -> tuple[str, str] | None:
    """Return the found and the expected side of one rename for all pairs; None if no arithmetic says all numbers."""
    if not is_numbered or len(parts) == 1:
        return parts[0][1], parts[0][0]
    expected, found = ([tuple(map(int, _NUMBER.findall(pair[side]))) for pair in parts] for side in (0, 1))
    if not found[0] or len(found[0]) > len(_VARIABLES):
        return None if len(set(parts)) > 1 else (parts[0][1], parts[0][0])
    numbers = []
    for at in range(len(expected[0])):
        wanted = [index[at] for index in expected]
        places = sorted(range(len(found[0])), key=lambda place: place != at)
        options = [
            (place, {want - index[place] for want, index in zip(wanted, found, strict=True)}) for place in places
        ]
        fitting = [(place, by.pop()) for place, by in options if len(by) == 1]
        fitting.sort(key=lambda option: option[1] != 0)
        if fitting and len({index[fitting[0][0]] for index in found}) > 1:
            place, by = fitting[0]
            numbers.append(f"{{{_VARIABLES[place]}{f'{by:+d}' if by else ''}}}")
        elif len(set(wanted)) == 1:
            numbers.append(str(wanted[0]))
        else:
            return None
    captures = [f"{{{variable}:int}}" for variable in _VARIABLES[: len(found[0])]]
    return fill_numbers(parts[0][1], captures), fill_numbers(parts[0][0], numbers)


def numbers_in(text: str) -> list[str]:
    """Return the segments of a key that are numbers."""
    return _NUMBER.findall(text)


def fill_numbers(text: str, numbers: Iterable[str]) -> str:
    """Return a key with other texts in place of its numbers."""
    waiting = iter(numbers)
    return _NUMBER.sub(lambda _: next(waiting), text)


def is_plain_text(text: str) -> bool:
    """Return whether a key means itself in a pattern and in a new name."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return not _SPECIAL.search(text)


def literal_rename(found: str, expected: str) -> tuple[str, str] | None:
    """Return both sides of a rename of this one key; None if a rule file cannot hold it."""
    if is_plain_text(found) and is_plain_text(expected):
        return found, expected
    try:
        (found + expected).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return None
    return f"re:{re.escape(found)}", expected.replace("\\", "\\\\")


def covering_patterns(keys: Collection[str], found: Collection[str]) -> list[str]:
    """Return patterns that match these found keys and no other found key."""
    wanted, all_texts = _Names.of(keys).texts, _Names.of(found).texts
    patterns: dict[str, None] = {}
    for key in keys:
        whole = next((text for text in _beginnings(key) if text and wanted[text] == all_texts[text] > 1), None)
        if whole is not None and not _SPECIAL.search(whole):
            patterns[f"{whole}*"] = None
        elif (sides := literal_rename(key, "")) is not None:
            patterns[sides[0]] = None
    return list(patterns)
