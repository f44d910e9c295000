"""Texts of a column of a table in fewer columns of the terminal: names without their middle, sentences without an end.

A name loses first the segments that it has in common with most others. So ``bert.encoder.layer.0.attention.self.key``
becomes ``…0.attention.self.key`` in a small room.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter

from ckptkit.core.text import shared_start
from ckptkit.render.page.display import are_plain, display_width, end_of, start_of

__all__ = ["shortened"]

_CUT = "…"
_LEAST_WORD = 8  # a name in a sentence is shortened to this before the end of the sentence is left out
_COUNT = re.compile(r" ×[0-9,]+$")  # how many keys a joined row stands for
_INSIDE_NAME = re.compile(r"[._/]\w")
_SEGMENT = re.compile(r"\.(?![^{]*\})")  # a dot between segments of a key, not one of a range such as {0..3}
_TAIL_SHARES = (1 / 2, 1 / 4, 9 / 10, 1 / 10)  # other places of the cut, where two names would look the same
_MOST_SEGMENTS = 64  # the work for a name grows with the square of their number
# Names with the same outline have their dots at the same places, so they lose the same characters.
_OUTLINE = bytes(ord("1") if chr(char).isdigit() else char for char in range(256))


def shortened(texts: Sequence[str], size: int) -> list[str]:
    """Return the texts with at most ``size`` columns each.

    Different texts stay different where that is possible.
    """
    distinct = list(dict.fromkeys(texts))
    widths = map(len if are_plain(distinct) else display_width, distinct)
    long = [text for text, width in zip(distinct, widths, strict=True) if width > size]
    if not long:
        return list(texts)
    forms = {text: text for text in distinct} | _shorter(long, distinct, size)
    alike: dict[str, list[str]] = defaultdict(list)
    for text, form in forms.items():
        alike[form].append(text)
    groups = [group for group in alike.values() if len(group) > 1]
    without_end = _without_common_segments(chain.from_iterable(groups), distinct, size, with_last=False)
    used = set(alike)
    for group in groups:
        cut = [text for text in group if forms[text] != text]
        others = [{text: without_end[text] for text in cut if text in without_end}, *_other_forms(cut, group, size)]
        _tell_apart(forms, cut, others, used, size)
    return [forms[text] for text in texts]


def _shorter(texts: Sequence[str], among: Iterable[str], size: int) -> dict[str, str]:
    forms = _without_common_segments(texts, among, size)
    return {text: forms[text] if text in forms else _shorten(text, size) for text in texts}


def _tell_apart(
    forms: dict[str, str], texts: Sequence[str], others: Sequence[Mapping[str, str]], used: set[str], size: int
) -> None:
    """Give texts that look the same another form each, of the others that tell most of them apart and are not used."""
    best = sorted(others, key=lambda other: len({*other.values()} - used), reverse=True)
    for text in texts:
        its = (other[text] for other in best if text in other)
        forms[text] = next((form for form in its if form not in used and display_width(form) <= size), forms[text])
        used.add(forms[text])


def _segments(text: str) -> list[str]:
    return _SEGMENT.split(text) if "{" in text else text.split(".")


def _without_common_segments(
    texts: Iterable[str], among: Iterable[str], size: int, *, with_last: bool = True
) -> dict[str, str]:
    """Return names without the segments that most of the names ``among`` them have, where what is left says enough.

    ``with_last``: the last segment stays.
    """
    bodies = (_divided(text)[1] for text in among)
    counts = Counter(chain.from_iterable(map(_segments, bodies)))
    known: dict[bytes | str, Callable[[str], tuple[str, ...]] | None] = {}
    forms = {}
    for text in texts:
        outline = text.encode().translate(_OUTLINE) if text.isascii() else text
        if outline not in known:
            slices = _kept_slices(text, counts, size, with_last=with_last)
            known[outline] = itemgetter(*slices) if slices else None
        if (kept := known[outline]) is not None:
            forms[text] = _CUT.join(kept(text))
    return forms


def _divided(text: str) -> tuple[str, str, str]:
    """Return the words before a name, the name, and the count behind it; the name of a sentence is empty."""
    body, count = _without_count(text)
    head, space, name = body.rpartition(" ")
    is_name = not head or (_INSIDE_NAME.search(name) and not _INSIDE_NAME.search(head))
    return (head + space, name, count) if is_name else (text, "", "")


def _kept_slices(text: str, counts: Mapping[str, int], size: int, *, with_last: bool) -> list[slice]:
    """Return the parts of a text that are kept, with a cut between each two; none if its rarest segment does not fit.

    The first part is empty where the start is cut, so there are at least two.
    """
    before, name, count = _divided(text)
    segments = _segments(name)
    if not 1 < len(segments) <= _MOST_SEGMENTS:
        return []
    room = size - display_width(before) - display_width(count) + 1
    widths = [display_width(segment) + 1 for segment in segments]
    order = sorted(range(len(segments) - with_last), key=lambda at: (-counts[segments[at]], at))
    kept = set(range(len(segments)))

    def width(places: set[int]) -> int:
        return sum(widths[at] for at in places) + (0 not in places) + (len(segments) - 1 not in places)

    for place in order[:-1]:
        if width(kept) <= room:
            break
        kept.discard(place)
    if width(kept) > room:
        return []
    for place in reversed(order):  # behind the first one, there may be room again for one that is short
        if place > min(kept) and width(kept | {place}) <= room:
            kept.add(place)
    return [*_runs(segments, kept, len(before), len(count))]


def _runs(segments: Sequence[str], kept: set[int], before: int, after: int) -> Iterator[slice]:
    """Yield a slice of the whole text for each run of segments that are kept; the first one is what is ``before``."""
    start, end = 0, before
    was_kept = True
    for place, segment in enumerate(segments):
        if place not in kept and was_kept:
            yield slice(start, end - (place > 0))
        elif place in kept and not was_kept:
            start = end
        was_kept = place in kept
        end += len(segment) + 1
    if not was_kept:
        start = end - 1
    yield slice(start, end - 1 + after)


def _shorten(text: str, size: int) -> str:
    name, count = _without_count(text)
    if display_width(count) + _LEAST_WORD > size:
        name, count = text, ""
    if " " not in name:
        return f"{_without_middle(name, size - display_width(count))}{count}"
    if name[0] in "{[":  # JSON
        return start_of(name, size - 1) + _CUT
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
    return whole if size <= 2 * display_width(whole) and display_width(whole) <= room else end_of(name, size)


def _other_forms(texts: Sequence[str], group: Sequence[str], size: int) -> list[dict[str, str]]:
    """Return other short forms of texts that look the same as all of a group: what the group has in common goes."""
    forms = [_shorter(texts, group, size), _without_common_segments(texts, group, size, with_last=False)]
    if not any(" " in _without_count(text)[0] for text in texts):
        start = shared_start(min(group), max(group))
        ends = [text[start:][::-1] for text in group]
        end = shared_start(min(ends), max(ends))
        forms.append({text: _around(text, start, len(text) - end, size) for text in texts})
        forms += [{text: _without_middle(text, size, share) for text in texts} for share in _TAIL_SHARES]
        forms.append({text: _inside(text, start, len(text) - end, size) for text in texts if start + end < len(text)})
    return forms


def _inside(text: str, start: int, end: int, size: int) -> str:
    """Return what is between two places of a text, without its middle."""
    rest, count = _without_count(text[end:])
    before, after = _CUT * (start > 0), _CUT * bool(rest) + count
    return before + _without_middle(text[start:end], size - display_width(before + after)) + after


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
    if not kept:
        return f"{before}{_CUT * any(gaps)}{after}"
    return f"{before}{_CUT * gaps[0]}{kept}{_CUT * gaps[1]}{after}"
