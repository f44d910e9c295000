"""The numbers of tensors, taken from the bytes of the records that they lie in, while these are read anyhow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint, Payload, Record, TensorInfo
from ckptkit.core.files import Extent, Inflated, LocalFile
from ckptkit.core.text import plural
from ckptkit.errors import CkptkitError
from ckptkit.formats.blocks import BlockTensor
from ckptkit.formats.file_pool import Section
from ckptkit.formats.layout import Strided
from ckptkit.statistics.values_door import Accumulator, Bench, Numbers, why_not_judged

__all__ = ["Feed", "Judge"]

_MOST_FOLD = 4  # how often a stored byte may be judged: views of one storage can overlap without end
_EXPANDED, _OVERLAPPING, _UNREAD = "expanded to more than is stored", "views that overlap many times", "not read"


class _Place(NamedTuple):
    """A range of bytes: in a file, or in what a range of it inflates to."""

    of: tuple[str, int]
    start: int
    stop: int


def _place(payload: Payload) -> _Place | None:
    if not isinstance(payload, Extent | Inflated):
        return None
    extent = payload if isinstance(payload, Extent) else payload.packed
    file: LocalFile = extent.file
    offset = extent.offset
    while isinstance(file, Section):
        offset += file.offset
        file = file.file
    if isinstance(payload, Extent):
        return _Place((file.path, -1), offset, offset + payload.nbytes)
    return _Place((file.path, offset), payload.start, payload.start + payload.nbytes)


@dataclass(slots=True)
class _Tensor:
    """A tensor, or several that are one, whose numbers are being taken."""

    keys: list[str]
    places: tuple[_Place, ...]
    dtype: str
    numbers: Accumulator
    left: int


@dataclass(slots=True)
class Feed:
    """What of the bytes of a record belongs to which tensor."""

    tensors: list[tuple[int, int, _Tensor]]  # from byte, to byte, in the order of the record
    following: int = 0
    active: list[tuple[int, int, _Tensor]] = field(default_factory=list)


@dataclass(slots=True)
class Judge:
    """Takes the numbers of the tensors ``keys``; ``numbers`` has them by key as each is done, ``skipped`` why not."""

    checkpoint: Checkpoint
    keys: Collection[str]
    bench: Bench
    numbers: dict[str, Numbers] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _budget: int = 0  # bytes
    _known: dict[str, _Tensor] = field(default_factory=dict)
    _tensors: dict[tuple[tuple[_Place, ...], str], _Tensor] = field(default_factory=dict)

    def feed(self, record: Record) -> Feed:
        """Return what to do with the bytes of a record that is about to be read."""
        whole = _place(record.payload)
        tensors: dict[int, tuple[int, int, _Tensor]] = {}
        self._budget += _MOST_FOLD * record.payload.nbytes
        for key in record.keys if whole is not None else ():
            tensor = self._known.get(key) or self._plan(key)
            if tensor is None or whole is None:
                continue
            for place in tensor.places:
                if place.of == whole.of and whole.start <= place.start < place.stop <= whole.stop:
                    tensors[id(tensor)] = (place.start - whole.start, place.stop - whole.start, tensor)
        return Feed(sorted(tensors.values(), key=lambda item: item[:2]))

    def add(self, feed: Feed, offset: int, chunk: bytes | bytearray | memoryview) -> None:
        """Take in a chunk of the record, which begins at byte ``offset`` of it."""
        end = offset + len(chunk)
        while feed.following < len(feed.tensors) and feed.tensors[feed.following][0] < end:
            feed.active.append(feed.tensors[feed.following])
            feed.following += 1
        for start, stop, tensor in feed.active:
            part = chunk[max(start - offset, 0) : stop - offset]
            tensor.numbers.add(part)
            tensor.left -= len(part)
            if not tensor.left:
                self._done(tensor)
        feed.active = [item for item in feed.active if item[1] > end]

    def read_the_rest(self) -> None:
        """Read what lay in no record as it is: swapped, scattered, or in memory alone."""
        for key in self._wanted():
            if key in self.numbers or key in self.skipped:
                continue
            info = self.checkpoint[key]
            try:
                payload, span = self.checkpoint.payload(key), self.checkpoint.span(key)
                if isinstance(payload, Strided) and span is not None and info.nbytes > span.nbytes:
                    self.skipped[key] = _EXPANDED
                elif not self.checkpoint.files or self._afford(key, max(info.nbytes, span.nbytes if span else 0)):
                    numbers = Accumulator(info, self.bench)
                    for chunk in payload.chunks():
                        numbers.add(chunk)
                    self.numbers[key] = numbers.result()
            except (CkptkitError, OSError):
                self.skipped[key] = _UNREAD  # where a file is to blame, its record has said so

    def summary(self) -> str:
        """Return how many tensors were judged, of which dtypes, and why others were not."""
        dtypes = sorted({self.checkpoint[key].dtype for key in self.numbers})
        judged = f"numbers of {plural(len(self.numbers), 'tensor')} judged"
        parts = [f"{judged} ({', '.join(dtypes)})" if dtypes else judged]
        reasons = Counter(self.skipped.get(key, _UNREAD) for key in self.keys if self._is_left(key))
        parts += [f"of {count:,} not: {reason}" for reason, count in reasons.items()]
        return ", ".join(parts)

    def _is_left(self, key: str) -> bool:
        return key not in self.numbers and self.checkpoint[key].elements > 0

    def _wanted(self) -> Iterator[str]:
        for key in self.keys:
            info = self.checkpoint[key]
            if info.elements:
                reason = why_not_judged(info)
                if reason:
                    self.skipped[key] = reason
                else:
                    yield key

    def _plan(self, key: str) -> _Tensor | None:
        if key not in self.keys or key not in self.checkpoint or key in self.numbers or key in self.skipped:
            return None
        info = self.checkpoint[key]
        if not info.elements or why_not_judged(info):
            return None
        try:
            places = self._places(info)
        except (CkptkitError, OSError):
            return None
        if not places:
            return None
        tensor = self._tensors.get((places, info.dtype))
        if tensor is None:
            if not self._afford(key, info.nbytes):
                return None
            tensor = _Tensor([], places, info.dtype, Accumulator(info, self.bench), info.nbytes)
            self._tensors[places, info.dtype] = tensor
        tensor.keys.append(key)
        self._known[key] = tensor
        return tensor

    def _places(self, info: TensorInfo) -> tuple[_Place, ...]:
        payload: Payload | None = self.checkpoint.payload(info.key)
        if isinstance(payload, BlockTensor):
            places = [_place(block.open()) for block in payload.blocks]
        else:
            if isinstance(payload, Strided):  # in what order its numbers lie is all the same, where there are no others
                payload = self.checkpoint.span(info.key)
            places = [_place(payload) if payload is not None else None]
        found = tuple(place for place in places if place is not None)
        exact = sum(place.stop - place.start for place in found) == info.nbytes
        return found if exact and len(found) == len(places) else ()

    def _afford(self, key: str, nbytes: int) -> bool:
        self._budget -= nbytes
        if self._budget < 0:
            self.skipped[key] = _OVERLAPPING
        return self._budget >= 0

    def _done(self, tensor: _Tensor) -> None:
        found = tensor.numbers.result()
        self.numbers |= dict.fromkeys(tensor.keys, found)
        for key in tensor.keys:
            del self._known[key]
        del self._tensors[tensor.places, tensor.dtype]
