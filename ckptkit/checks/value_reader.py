"""Statistics of all tensors of a checkpoint, computed from the bytes that the checksum pass reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint, Payload, Record, TensorInfo
from ckptkit.core.files import Extent, Inflated, LocalFile
from ckptkit.core.text import plural
from ckptkit.errors import CkptkitError
from ckptkit.formats.file_pool import Section
from ckptkit.formats.layout import BlockTensor, Strided
from ckptkit.statistics.accumulator import Accumulator, why_unsupported
from ckptkit.statistics.threads import Workspace
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["RecordTensors", "ValueReader"]

# How often the values of one stored byte may be read: any number of views can overlap in a storage.
_MAX_OVERLAP = 4
_EXPANDED, _OVERLAPPING, _UNREAD = "expanded to more than is stored", "views that overlap many times", "not read"


class _ByteRange(NamedTuple):
    """A range of bytes of a source: a file, or the inflated content of a range of a file."""

    source: tuple[str, int]  # the path, and the offset of the compressed content; -1 for the file itself
    start: int
    stop: int


def _byte_range(payload: Payload) -> _ByteRange | None:
    if not isinstance(payload, Extent | Inflated):
        return None
    extent = payload if isinstance(payload, Extent) else payload.packed
    file: LocalFile = extent.file
    offset = extent.offset
    while isinstance(file, Section):
        offset += file.offset
        file = file.file
    if isinstance(payload, Extent):
        return _ByteRange((file.path, -1), offset, offset + payload.nbytes)
    return _ByteRange((file.path, offset), payload.start, payload.start + payload.nbytes)


@dataclass(slots=True)
class _TensorInProgress:
    """A tensor that is being read; it has several keys if they name the same bytes."""

    keys: list[str]
    ranges: tuple[_ByteRange, ...]
    dtype: str
    accumulator: Accumulator
    bytes_left: int


@dataclass(slots=True)
class RecordTensors:
    """The tensors in a record that is being read, with the byte range of each tensor."""

    tensors: list[tuple[int, int, _TensorInProgress]]  # first byte, end, tensor; in the order of the record
    next_tensor: int = 0
    active: list[tuple[int, int, _TensorInProgress]] = field(default_factory=list)


@dataclass(slots=True)
class ValueReader:
    """Compute the statistics of the tensors ``keys`` from records that the caller reads.

    ``stats`` has each finished tensor, by key. ``skipped`` says why a tensor was not read.
    """

    checkpoint: Checkpoint
    keys: Collection[str]
    workspace: Workspace
    stats: dict[str, ValueStats] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _bytes_allowed: int = 0
    _by_key: dict[str, _TensorInProgress] = field(default_factory=dict)
    _by_ranges: dict[tuple[tuple[_ByteRange, ...], str], _TensorInProgress] = field(default_factory=dict)

    def start_record(self, record: Record) -> RecordTensors:
        """Return the tensors in a record, before the first call of ``add`` for the record."""
        whole = _byte_range(record.payload)
        tensors: dict[int, tuple[int, int, _TensorInProgress]] = {}
        self._bytes_allowed += _MAX_OVERLAP * record.payload.nbytes
        for key in record.keys if whole is not None else ():
            tensor = self._by_key.get(key) or self._start_tensor(key)
            if tensor is None or whole is None:
                continue
            for part in tensor.ranges:
                if part.source == whole.source and whole.start <= part.start < part.stop <= whole.stop:
                    tensors[id(tensor)] = (part.start - whole.start, part.stop - whole.start, tensor)
        return RecordTensors(sorted(tensors.values(), key=lambda item: item[:2]))

    def add(self, record: RecordTensors, offset: int, chunk: bytes | bytearray | memoryview) -> None:
        """Add a chunk of a record, which begins at byte ``offset`` of the record."""
        end = offset + len(chunk)
        while record.next_tensor < len(record.tensors) and record.tensors[record.next_tensor][0] < end:
            record.active.append(record.tensors[record.next_tensor])
            record.next_tensor += 1
        for start, stop, tensor in record.active:
            part = chunk[max(start - offset, 0) : stop - offset]
            tensor.accumulator.add(part)
            tensor.bytes_left -= len(part)
            if not tensor.bytes_left:
                self._finish(tensor)
        record.active = [item for item in record.active if item[1] > end]

    def read_remaining(self) -> None:
        """Read the tensors that no record holds as they are: byte-swapped, scattered or in memory."""
        for key in self._supported_keys():
            if key in self.stats or key in self.skipped:
                continue
            info = self.checkpoint[key]
            try:
                payload, span = self.checkpoint.payload(key), self.checkpoint.span(key)
                if isinstance(payload, Strided) and span is not None and info.nbytes > span.nbytes:
                    self.skipped[key] = _EXPANDED
                elif not self.checkpoint.files or self._allow(key, max(info.nbytes, span.nbytes if span else 0)):
                    accumulator = Accumulator(info, self.workspace)
                    for chunk in payload.chunks():
                        accumulator.add(chunk)
                    self.stats[key] = accumulator.result()
            except (CkptkitError, OSError):
                self.skipped[key] = _UNREAD  # the pass over the records has reported a damaged file

    def summary(self) -> str:
        """Return the number and dtypes of the checked tensors, and the reasons why other tensors were not checked."""
        dtypes = sorted({self.checkpoint[key].dtype for key in self.stats})
        checked = f"values of {plural(len(self.stats), 'tensor')} checked"
        parts = [f"{checked} ({', '.join(dtypes)})" if dtypes else checked]
        unchecked = [key for key in self.keys if key not in self.stats and self.checkpoint[key].elements > 0]
        reasons = Counter(self.skipped.get(key, _UNREAD) for key in unchecked)
        parts += [f"{count:,} not checked: {reason}" for reason, count in reasons.items()]
        return ", ".join(parts)

    def _supported_keys(self) -> Iterator[str]:
        for key in self.keys:
            info = self.checkpoint[key]
            if info.elements:
                reason = why_unsupported(info)
                if reason:
                    self.skipped[key] = reason
                else:
                    yield key

    def _start_tensor(self, key: str) -> _TensorInProgress | None:
        if key not in self.keys or key not in self.checkpoint or key in self.stats or key in self.skipped:
            return None
        info = self.checkpoint[key]
        if not info.elements or why_unsupported(info):
            return None
        try:
            ranges = self._ranges(info)
        except (CkptkitError, OSError):
            return None
        if not ranges:
            return None
        tensor = self._by_ranges.get((ranges, info.dtype))
        if tensor is None:
            if not self._allow(key, info.nbytes):
                return None
            tensor = _TensorInProgress([], ranges, info.dtype, Accumulator(info, self.workspace), info.nbytes)
            self._by_ranges[ranges, info.dtype] = tensor
        tensor.keys.append(key)
        self._by_key[key] = tensor
        return tensor

    def _ranges(self, info: TensorInfo) -> tuple[_ByteRange, ...]:
        """Return where the values of a tensor are stored; empty if these bytes are not exactly its values."""
        payload: Payload | None = self.checkpoint.payload(info.key)
        if isinstance(payload, BlockTensor):
            ranges = [_byte_range(block.open()) for block in payload.blocks]
        else:
            if isinstance(payload, Strided):  # statistics do not depend on the order of the values
                payload = self.checkpoint.span(info.key)
            ranges = [_byte_range(payload) if payload is not None else None]
        found = tuple(part for part in ranges if part is not None)
        is_exact = sum(part.stop - part.start for part in found) == info.nbytes
        return found if is_exact and len(found) == len(ranges) else ()

    def _allow(self, key: str, nbytes: int) -> bool:
        self._bytes_allowed -= nbytes
        if self._bytes_allowed < 0:
            self.skipped[key] = _OVERLAPPING
        return self._bytes_allowed >= 0

    def _finish(self, tensor: _TensorInProgress) -> None:
        self.stats |= dict.fromkeys(tensor.keys, tensor.accumulator.result())
        for key in tensor.keys:
            del self._by_key[key]
        del self._by_ranges[tensor.ranges, tensor.dtype]
