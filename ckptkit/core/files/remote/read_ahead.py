"""Decide what is fetched before it is read: what was announced, or more and more of a file that is read in order."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Final

__all__ = ["AHEAD", "NEAR", "PART", "ReadAhead"]

PART: Final = 8 << 20  # bytes of one request
AHEAD: Final = 32 << 20  # bytes that are fetched ahead of a reader
NEAR: Final = 64 << 10  # ranges are fetched together if fewer bytes are between them
_LEAST_WINDOW = 256 << 10
_MOST_STREAMS = 16  # readers of one file at once
_MOST_PARTS = 32  # requests for announced ranges at once

Span = tuple[int, int]


@dataclass(slots=True)
class _Stream:
    """A reader that goes through the file in order."""

    position: int
    taken: int  # bytes that it read
    frontier: int  # to which it was fetched


@dataclass
class ReadAhead:
    """What one file is read for. A range that nobody announced is fetched alone, unless it continues another."""

    size: int
    _parts: list[Span] = field(default_factory=list)
    _begun: list[bool] = field(default_factory=list)
    _first: int = 0  # all parts before it have begun
    _by_start: list[tuple[int, int]] = field(default_factory=list)  # the start of each part, and its number
    _streams: list[_Stream] = field(default_factory=list)

    def announce(self, ranges: Iterable[Span]) -> None:
        """Take ranges, as start and end, that are read next in this order."""
        if self._first_not_begun() == len(self._parts):  # nothing is left of what was announced before
            self._parts, self._begun, self._by_start, self._first = [], [], [], 0
        first = len(self._parts)
        for start, end in _joined(ranges, self.size):
            if not first or not self._has_announced(start, end):
                self._parts += [(at, min(at + PART, end)) for at in range(start, end, PART)]
        self._begun += [False] * (len(self._parts) - first)
        added = [(start, number) for number, (start, _) in enumerate(self._parts[first:], first)]
        if len(added) > 8:
            self._by_start = sorted((*self._by_start, *added))
        else:
            for item in added:
                insort(self._by_start, item)

    def next_announced(self) -> Iterator[Span]:
        """Yield the announced ranges that are fetched before anybody reads: half of what is fetched ahead.

        A range counts as fetched when the next one is asked for.
        """
        return self._from_part(self._first_not_begun(), AHEAD // 2)

    def after(self, start: int, end: int) -> Iterator[Span]:
        """Yield what is fetched together with this range, which is read now, from the end of the range on."""
        number = self._part_at(end - 1)
        if number is None:
            return iter(self._after_stream(start, end))
        part_end = self._parts[number][1]
        self._begun[number] = True
        rest = [(end, part_end)] if end < part_end else []
        return chain(rest, self._from_part(number + 1, AHEAD))

    def _first_not_begun(self) -> int:
        while self._first < len(self._begun) and self._begun[self._first]:
            self._first += 1
        return self._first

    def is_announced(self, offset: int) -> bool:
        """Return whether the byte is in a range that was announced."""
        return self._part_at(offset) is not None

    def _has_announced(self, start: int, end: int) -> bool:
        """Return whether the whole range was announced before, such as a tensor of a file that is read in order."""
        while start < end:
            number = self._part_at(start)
            if number is None:
                return False
            start = self._parts[number][1]
        return True

    def _part_at(self, offset: int) -> int | None:
        at = bisect_right(self._by_start, (offset, len(self._parts))) - 1
        if at < 0:
            return None
        number = self._by_start[at][1]
        return number if offset < self._parts[number][1] else None

    def _from_part(self, first: int, most: int) -> Iterator[Span]:
        nbytes = 0
        for number in range(first, min(first + _MOST_PARTS, len(self._parts))):
            start, end = self._parts[number]
            nbytes += end - start
            if nbytes > most:
                return
            if not self._begun[number]:  # what was fetched is not fetched again ahead: it may have been read already
                yield start, end
                if self._parts[number : number + 1] == [(start, end)]:  # nothing was announced anew meanwhile
                    self._begun[number] = True

    def _after_stream(self, start: int, end: int) -> list[Span]:
        stream = next((one for one in self._streams if _continues(one, start)), None)
        if stream is None:
            self._streams.append(_Stream(end, end - start, end))
            del self._streams[:-_MOST_STREAMS]
            return []
        stream.taken += end - start
        stream.position = max(stream.position, end)
        window = min(AHEAD, max(stream.taken, _LEAST_WINDOW))
        ahead = max(stream.frontier, end)
        if ahead - end < window // 2:  # large requests from time to time, not a small one for each read
            ahead = min(end + window, self.size)
        stream.frontier = ahead
        return [(end, ahead)] if ahead > end else []


def _continues(stream: _Stream, start: int) -> bool:
    near = max(NEAR, min(AHEAD, stream.taken))
    return stream.position - near <= start <= stream.position + near


def _joined(ranges: Iterable[Span], size: int) -> Iterator[Span]:
    """Yield the ranges; those that follow each other with few bytes between them are one."""
    spans = ((max(start, 0), min(end, size)) for start, end in ranges)
    whole = iter([span for span in spans if span[0] < span[1]])
    for first in islice(whole, 1):
        start, end = first
        for begin, stop in whole:
            if start <= begin <= end + NEAR:
                end = max(end, stop)
            else:
                yield start, end
                start, end = begin, stop
        yield start, end
