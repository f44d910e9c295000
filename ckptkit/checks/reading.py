"""Every stored byte read once: for its checksum, where it has one, and for the numbers that it is a part of."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.core.checkpoint import Checkpoint, Payload, Record, TensorInfo
from ckptkit.core.files import Extent, Inflated, LocalFile
from ckptkit.core.findings import Finding
from ckptkit.core.progress import Progress
from ckptkit.core.text import human_bytes, listed, plural, printable, quoted
from ckptkit.errors import ChangedError, CkptkitError
from ckptkit.formats.file_pool import Section
from ckptkit.formats.layout import BlockTensor, Strided
from ckptkit.statistics.accumulator import Accumulator, why_unsupported
from ckptkit.statistics.threads import Workspace
from ckptkit.statistics.value_stats import ValueStats

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = ["UNJUDGED", "Feed", "Judge", "Scan", "unreadable"]


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
    workspace: Workspace
    numbers: dict[str, ValueStats] = field(default_factory=dict)
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
                    numbers = Accumulator(info, self.workspace)
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
                reason = why_unsupported(info)
                if reason:
                    self.skipped[key] = reason
                else:
                    yield key

    def _plan(self, key: str) -> _Tensor | None:
        if key not in self.keys or key not in self.checkpoint or key in self.numbers or key in self.skipped:
            return None
        info = self.checkpoint[key]
        if not info.elements or why_unsupported(info):
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
            tensor = _Tensor([], places, info.dtype, Accumulator(info, self.workspace), info.nbytes)
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


UNJUDGED = "no number was judged (NaN, Inf, zeros, equal tensors, indices out of range)"
_AGAIN = "copy or download it again"
_WORTH_A_THREAD = 1 << 18  # bytes


def unreadable(error: CkptkitError, path: str) -> Finding:
    """Return the finding that ``path`` could not be opened, or not be read further."""
    other = f"{printable(error.path)}: " if error.path and error.path != path else ""
    code = "changed" if isinstance(error, ChangedError) else "unreadable"
    return Finding(code, "error", "", f"{other}{error.reason}", error.hint or "")


@dataclass(slots=True)
class Scan:
    """One reading of everything stored, and how far it came; with ``chosen``, of what holds one of these keys."""

    checkpoint: Checkpoint
    chosen: Collection[str] | None
    judge: Judge | None = None
    beside: ThreadPoolExecutor | None = None  # where checksums are computed while the judge is at work
    records: int = 0
    nbytes: int = 0
    compared: int = 0
    unchecked: int = 0
    unchecked_bytes: int = 0
    left_out: int = 0
    stopped: bool = False

    def read(self, report: Progress) -> Iterator[Finding]:
        """Yield what is wrong with a record, record by record; a file that changes meanwhile ends it."""
        try:
            for record in self.checkpoint.records():
                if self.chosen is not None and not any(key in self.chosen for key in record.keys):
                    self.left_out += 1
                    continue
                finding = self._one(record, report)
                if finding is not None:
                    yield finding
                    if finding.code == "changed":
                        self.stopped = True
                        return
            self.checkpoint.check_unchanged()
        except (CkptkitError, OSError) as error:
            self.stopped = True
            yield unreadable(_as_ours(error), self.checkpoint.path)

    def _one(self, record: Record, report: Progress) -> Finding | None:
        crc = done = 0
        feed = self.judge.feed(record) if self.judge is not None else None
        try:
            for chunk in record.payload.chunks():
                checksum = self._checksum(chunk, crc) if record.crc is not None else None
                if feed is not None and self.judge is not None:
                    self.judge.add(feed, done, chunk)
                crc = checksum() if checksum is not None else 0
                done += len(chunk)
                report(len(chunk))
        except (CkptkitError, OSError) as error:
            problem = _as_ours(error)
            code = "changed" if isinstance(problem, ChangedError) else "unreadable"
            return self._about(record, code, f"cannot be read: {problem.reason}", problem.hint or "")
        finally:
            self.nbytes += done
        self.records += bool(done)
        if record.crc is None:
            self.unchecked += bool(done)
            self.unchecked_bytes += done
            return None
        self.compared += bool(done)
        if crc == record.crc:
            return None
        return self._about(
            record, "checksum", f"does not match its checksum: CRC-32 {record.crc:08x} recorded, {crc:08x} read", _AGAIN
        )

    def _checksum(self, chunk: bytes | bytearray | memoryview, crc: int) -> Callable[[], int]:
        """Return what gives the checksum, at the latest when it is called."""
        if self.beside is None or len(chunk) < _WORTH_A_THREAD:
            return partial(zlib.crc32, chunk, crc)
        return self.beside.submit(zlib.crc32, chunk, crc).result

    def _about(self, record: Record, code: str, what: str, hint: str) -> Finding:
        file = "" if record.path == self.checkpoint.path else f" of {quoted(os.path.basename(record.path))}"
        holds = f"; it holds {listed(record.keys)}" if record.keys else ""
        key = record.keys[0] if record.keys else ""
        return Finding(code, "error", key, f"{quoted(record.name)}{file} {what}{holds}", hint)

    def without_checksum(self) -> Finding:
        """Return the note that damage to some of the bytes, or all, cannot be seen."""
        count = f"{self.unchecked:,} of {plural(self.records, 'record')} ({human_bytes(self.unchecked_bytes)})"
        said = f"{self.checkpoint.format}: no checksum is recorded for {count}, and damage there goes unseen"
        return Finding("no-checksum", "note", "", said)

    def summary(self) -> str:
        """Return what was read, and what nobody looked at."""
        if not self.checkpoint.files:
            return f"held in memory, not in a file: no byte of a file was read, {self._judged()}"
        read = f"{human_bytes(self.nbytes)} in {plural(self.records, 'record')} read, {self.compared:,} compared"
        parts = [f"{read} with a checksum; {self._judged()}", "code was not analysed"]
        within = [entry.path for entry in self.checkpoint.entries if not entry.is_file]
        if within:
            parts.append(f"what is beside the tensors was not interpreted ({listed(within)})")
        apart = [entry.path for entry in self.checkpoint.entries if entry.is_file]
        if apart:
            parts.append(f"other files were not read ({listed(apart)})")
        if self.left_out:
            parts.append(f"{plural(self.left_out, 'record')} without a chosen tensor not read")
        if self.stopped:
            parts.append("the rest was not read")
        return ", ".join(parts)

    def _judged(self) -> str:
        return UNJUDGED if self.judge is None else self.judge.summary()


def _as_ours(error: CkptkitError | OSError) -> CkptkitError:
    return error if isinstance(error, CkptkitError) else CkptkitError((error.strerror or str(error)).lower())
