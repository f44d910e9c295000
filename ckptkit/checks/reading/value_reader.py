"""Judge the values of all tensors of a checkpoint by the bytes that the checksum pass reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from ckptkit.core.checkpoint import Checkpoint, Payload, Record, TensorInfo
from ckptkit.core.files.payloads import Extent, Inflated
from ckptkit.core.files.source import ByteSource, Section
from ckptkit.core.text import plural
from ckptkit.errors import CkptkitError
from ckptkit.formats.layout import BlockTensor, Strided
from ckptkit.values.arrays import real_code
from ckptkit.values.extremes import Extremes
from ckptkit.values.kernels import (
    Columns,
    ColumnsKernel,
    Kernel,
    Tally,
    computed_together,
    is_short,
    parts_of,
    why_unsupported,
)
from ckptkit.values.reading import Read, Source, Span, read_bytes, reads
from ckptkit.values.workers import Workers

__all__ = ["ShortTensor", "ValueReader", "ValuesKernel"]

_Part = TypeVar("_Part")

# How often the values of one stored byte may be read: any number of views can overlap in a storage.
_MAX_OVERLAP = 4
_EXPANDED, _OVERLAPPING, _UNREAD = "expanded to more than is stored", "views that overlap many times", "not read"


class ValuesKernel(Kernel[_Part, Extremes], ColumnsKernel[Columns[Extremes]], Protocol[_Part]):
    """A kernel that computes counts and extremes, or more, also of many short tensors at once."""


class ShortTensor(NamedTuple):
    """A tensor whose bytes are a record without a checksum; it is read and judged together with its neighbours."""

    info: TensorInfo
    extent: Extent
    record: Record


class _ByteRange(NamedTuple):
    """A range of bytes of a source: a file, or the inflated content of a range of a file."""

    source: tuple[str, int]  # the path, and the offset of the compressed content; -1 for the file itself
    start: int
    stop: int


def _byte_range(payload: Payload) -> _ByteRange | None:
    if not isinstance(payload, Extent | Inflated):
        return None
    extent = payload if isinstance(payload, Extent) else payload.packed
    file: ByteSource = extent.file
    offset = extent.offset
    while isinstance(file, Section):
        offset += file.offset
        file = file.file
    if isinstance(payload, Extent):
        return _ByteRange((file.path, -1), offset, offset + payload.nbytes)
    return _ByteRange((file.path, offset), payload.start, payload.start + payload.nbytes)


@dataclass(slots=True)
class _TensorInProgress:
    """A tensor that is being read; its tally has several keys if they name the same bytes."""

    tally: Tally[Any]
    ranges: tuple[_ByteRange, ...]
    dtype: str


@dataclass(slots=True)
class ValueReader:
    """Compute what ``kernel`` says of the tensors ``keys``, from records that the caller reads.

    ``stats`` has each finished tensor, by key. ``skipped`` says why a tensor was not read.
    """

    checkpoint: Checkpoint
    keys: Collection[str]
    workers: Workers
    kernel: ValuesKernel[Any]
    stats: dict[str, Extremes] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _bytes_allowed: int = 0
    _by_key: dict[str, _TensorInProgress] = field(default_factory=dict)
    _by_ranges: dict[tuple[tuple[_ByteRange, ...], str], _TensorInProgress] = field(default_factory=dict)

    def spans_of(self, record: Record) -> tuple[Span[Tally[Any]], ...]:
        """Return where the numbers of tensors are in a record, which is read next."""
        self._bytes_allowed += _MAX_OVERLAP * record.payload.nbytes
        info = self._tensor_that_is(record) if len(record.keys) == 1 else None
        if info is not None:
            tally: Tally[Any] = Tally(info)
            self._bytes_allowed -= tally.bytes_left
            return (Span(tally, 0, tally.bytes_left, tally.width),)
        whole = _byte_range(record.payload)
        spans: dict[int, Span[Tally[Any]]] = {}
        for key in record.keys if whole is not None else ():
            tensor = self._by_key.get(key) or self._start_tensor(key)
            if tensor is None or whole is None:
                continue
            for part in tensor.ranges:
                if part.source == whole.source and whole.start <= part.start < part.stop <= whole.stop:
                    start, stop = part.start - whole.start, part.stop - whole.start
                    spans[id(tensor)] = Span(tensor.tally, start, stop, tensor.tally.width)
        return tuple(spans.values())

    def short_tensor(self, record: Record) -> ShortTensor | None:
        """Return the tensor that a record is exactly, if it is short."""
        if record.crc is not None or len(record.keys) != 1:
            return None
        info, extent = self._tensor_that_is(record), record.payload
        if info is None or not isinstance(extent, Extent) or not is_short(extent.nbytes, real_code(info.dtype)):
            return None
        self._bytes_allowed += (_MAX_OVERLAP - 1) * extent.nbytes
        return ShortTensor(info, extent, record)

    def judge(self, tensors: Sequence[ShortTensor]) -> Iterator[tuple[list[int], int]]:
        """Yield the positions of tensors that were read and judged, and the number of their bytes.

        Raises what reading raises.
        """
        extents, codes = [one.extent for one in tensors], [real_code(one.info.dtype) for one in tensors]
        for places, found, nbytes in computed_together(extents, codes, self.kernel, self.workers):
            self.stats.update(zip((tensors[at].info.key for at in places), found.rows(), strict=True))
            yield places, nbytes

    def _tensor_that_is(self, record: Record) -> TensorInfo | None:
        """Return the tensor whose bytes a record is exactly, if it can be judged."""
        key, stored = record.keys[0], record.payload
        if not isinstance(stored, Extent) or not stored.nbytes or key not in self.keys:
            return None
        try:
            info, payload = self.checkpoint[key], self.checkpoint.payload(key)
        except (CkptkitError, OSError, KeyError):
            return None
        is_exact = (
            isinstance(payload, Extent)
            and payload.offset == stored.offset
            and payload.nbytes == stored.nbytes
            and payload.file is stored.file
        )
        return info if is_exact and not why_unsupported(info) else None

    def parts_of(self, read: Read[Tally[Any]], data: memoryview) -> list[Any]:
        """Return what the kernel computes of each span of a read; a thread may call this."""
        return parts_of(read, data, self.kernel, self.workers) if read.spans else []

    def take(self, read: Read[Tally[Any]], parts: list[Any]) -> None:
        """Add the parts of a read, in the order of the reads."""
        for (tally, start, stop, _), part in zip(read.spans, parts, strict=True):
            if tally.add(part, stop - start):
                self._finish(tally)

    def read_remaining(self) -> None:
        """Read the tensors that no record holds as they are: byte-swapped, scattered or in memory."""
        for read, parts in self.workers.each(self._read, reads(self._remaining())):
            if parts is None:
                for label, _, _ in read.labels:  # the pass over the records has reported a damaged file
                    self.skipped[str(label)] = _UNREAD
            else:
                self.take(read, parts)

    def _read(self, read: Read[Tally[Any]]) -> tuple[Read[Tally[Any]], list[Any] | None]:
        try:
            return read, self.parts_of(read, read_bytes(read, self.workers))
        except (CkptkitError, OSError):
            return read, None

    def _remaining(self) -> Iterator[Source[Tally[Any]]]:
        for key in self._supported_keys():
            if key in self.skipped:
                continue
            info = self.checkpoint[key]
            try:
                payload, span = self.checkpoint.payload(key), self.checkpoint.span(key)
            except (CkptkitError, OSError):
                self.skipped[key] = _UNREAD
                continue
            if isinstance(payload, Strided) and span is not None and info.nbytes > span.nbytes:
                self.skipped[key] = _EXPANDED
            elif not self.checkpoint.files or self._allow(key, max(info.nbytes, span.nbytes if span else 0)):
                tally: Tally[Any] = Tally(info)
                yield Source(payload, (Span(tally, 0, info.nbytes, tally.width),), key)

    def summary(self) -> str:
        """Return the number and dtypes of the checked tensors, and the reasons why other tensors were not checked."""
        infos = dict(self.checkpoint.items())
        dtypes = sorted({infos[key].dtype for key in self.stats})
        checked = f"values of {plural(len(self.stats), 'tensor')} checked"
        parts = [f"{checked} ({', '.join(dtypes)})" if dtypes else checked]
        unchecked = [key for key in self.keys if key not in self.stats and infos[key].elements > 0]
        reasons = Counter(self.skipped.get(key, _UNREAD) for key in unchecked)
        parts += [f"{count:,} not checked: {reason}" for reason, count in reasons.items()]
        return ", ".join(parts)

    def _supported_keys(self) -> Iterator[str]:
        for key in self.keys:
            info = self.checkpoint[key]
            if info.elements and key not in self.stats:
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
            tensor = _TensorInProgress(Tally(info), ranges, info.dtype)
            self._by_ranges[ranges, info.dtype] = tensor
        else:
            tensor.tally.keys.append(key)
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

    def _finish(self, tally: Tally[Any]) -> None:
        found = self.kernel.together(tally.parts, tally.code)
        for key in tally.keys:
            self.stats[key] = found
            tensor = self._by_key.pop(key, None) if self._by_key else None
            if tensor is not None:
                self._by_ranges.pop((tensor.ranges, tensor.dtype), None)
