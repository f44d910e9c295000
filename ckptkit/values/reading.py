"""Plan how bytes are read for arithmetic: long payloads in pieces, short neighbours in a file together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, NamedTuple, TypeVar

from ckptkit.core.checkpoint.payload import Payload
from ckptkit.core.files.payloads import Extent, is_seekable
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.values.workers import Workers

__all__ = ["READ_BYTES", "Read", "Source", "Span", "neighbours", "planned_reads", "read_bytes", "reads"]

READ_BYTES: Final = 1 << 21  # what a thread reads at once stays in its cache
_SMALL: Final = 1 << 17  # bytes; shorter payloads are read together
_MAX_GAP: Final = 1 << 12  # bytes between two payloads that are read together
_MAX_TOGETHER: Final = 1024  # payloads; some kernels need memory for each
_Item = TypeVar("_Item")


class Span(NamedTuple, Generic[_Item]):
    """The numbers of an item, such as a tensor, in a payload: ``width`` bytes each, from ``start`` to ``stop``."""

    item: _Item
    start: int
    stop: int
    width: int


class Source(NamedTuple, Generic[_Item]):
    """A payload, the numbers in it, and a ``label`` that its reads have."""

    payload: Payload
    spans: tuple[Span[_Item], ...]
    label: object = None


@dataclass(frozen=True, slots=True)
class Read(Generic[_Item]):
    """Bytes to read at once, and what they mean; all positions count from the first byte of the read.

    Attributes:
        payload: What to read; None if ``data`` has the bytes already.
        data: The bytes, of a payload that can be read only in order.
        start: The first byte of the payload.
        nbytes: The number of bytes.
        spans: Whole numbers of each item; an item has its numbers in the order of the reads.
        error: Why the bytes could not be read, if that is known already.
        labels: The label of each source, and its range of bytes here. The ranges of a source do not overlap, and
            leave nothing out.
    """

    payload: Payload | None
    data: memoryview
    start: int
    nbytes: int
    spans: tuple[Span[_Item], ...]
    labels: tuple[tuple[object, int, int], ...]
    error: CkptkitError | OSError | None = None


def read_bytes(read: Read[_Item], workers: Workers) -> memoryview:
    """Return the bytes of a read, in a buffer of this thread. Raises what reading them raises."""
    if read.error is not None:
        raise read.error
    return read.data if read.payload is None else workers.read("bytes", read.payload, read.start, read.nbytes)


def reads(sources: Iterable[Source[_Item]]) -> Iterator[Read[_Item]]:
    """Yield the reads of all sources, in order; none has many more than 2 MiB.

    The reads of a source depend on nothing but its length and its spans: sums over them are always the same. A payload
    that is not ``is_seekable`` is read by this iterator.
    """
    return _reads(sources, _in_order)


def planned_reads(sources: Iterable[Source[_Item]]) -> Iterator[Read[_Item]]:
    """Yield what ``reads`` yields, but read nothing: payloads that are not ``is_seekable`` have no bytes."""
    return _reads(sources, _pieces)


def _reads(
    sources: Iterable[Source[_Item]], in_order: Callable[[Source[_Item]], Iterator[Read[_Item]]]
) -> Iterator[Read[_Item]]:
    small: list[Source[_Item]] = []
    for source in sources:
        if small and not _are_neighbours(small[0].payload, small[-1].payload, source.payload, len(small)):
            yield _together(small)
            small = []
        if isinstance(source.payload, Extent) and source.payload.nbytes < _SMALL:
            small.append(source)
        elif is_seekable(source.payload):
            for read in _pieces(source):
                yield replace(read, payload=source.payload)
        else:
            yield from in_order(source)
    if small:
        yield _together(small)


def neighbours(extents: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    """Yield the first position and the end of each run of extents that are read together.

    The extents are in the order of their files, and short.
    """
    first = 0
    for at in range(1, len(extents)):
        if not _are_neighbours(extents[first], extents[at - 1], extents[at], at - first):
            yield first, at
            first = at
    if extents:
        yield first, len(extents)


def _are_neighbours(first: Payload, last: Payload, payload: Payload, count: int) -> bool:
    """Return whether a payload is read together with ``count`` others, from ``first`` to ``last``."""
    if not isinstance(payload, Extent) or not isinstance(first, Extent) or not isinstance(last, Extent):
        return False
    return (
        payload.nbytes < _SMALL
        and payload.file is first.file
        and 0 <= payload.offset - last.offset - last.nbytes <= _MAX_GAP
        and payload.offset + payload.nbytes - first.offset <= READ_BYTES
        and count < _MAX_TOGETHER
    )


def _together(sources: list[Source[_Item]]) -> Read[_Item]:
    first, last = sources[0].payload, sources[-1].payload
    if len(sources) == 1 or not isinstance(first, Extent) or not isinstance(last, Extent):
        source = sources[0]
        labels = ((source.label, 0, source.payload.nbytes),)
        return Read(source.payload, memoryview(b""), 0, source.payload.nbytes, source.spans, labels)
    nbytes = last.offset + last.nbytes - first.offset
    spans, labelled = [], []
    for source in sources:
        at = source.payload.offset - first.offset if isinstance(source.payload, Extent) else 0
        spans += [Span(item, at + start, at + stop, width) for item, start, stop, width in source.spans]
        labelled.append((source.label, at, at + source.payload.nbytes))
    return Read(Extent(first.file, first.offset, nbytes), memoryview(b""), 0, nbytes, tuple(spans), tuple(labelled))


def _pieces(source: Source[_Item]) -> Iterator[Read[_Item]]:
    """Yield the reads of a long payload, without the payload. A number that a piece cuts belongs to the first piece."""
    nbytes = source.payload.nbytes
    spans = sorted(source.spans, key=lambda span: span.start)
    active: list[Span[_Item]] = []
    following = 0
    for start in range(0, max(nbytes, 1), READ_BYTES):
        stop = min(start + READ_BYTES, nbytes)
        while following < len(spans) and spans[following].start < stop:
            active.append(spans[following])
            following += 1
        parts = []
        for item, first, end, width in active:
            begin = first + -(-max(start - first, 0) // width) * width
            ending = min(first + -(-(stop - first) // width) * width, end)
            if begin < ending:
                parts.append(Span(item, begin - start, ending - start, width))
        count = max([stop - start, *(part.stop for part in parts)])
        yield Read(None, memoryview(b""), start, count, tuple(parts), ((source.label, 0, stop - start),))
        active = [span for span in active if span.stop > stop]


def _in_order(source: Source[_Item]) -> Iterator[Read[_Item]]:
    """Yield the reads of a payload that can be read only from its beginning, with their bytes."""
    chunks: Iterator[bytes | bytearray | memoryview] | None = None
    rest = memoryview(b"")
    failed: CkptkitError | OSError | None = None
    for read in _pieces(source):
        if failed is not None:
            yield replace(read, error=failed)
            continue
        try:
            chunks = source.payload.chunks() if chunks is None else chunks
            data = _next_bytes(rest, chunks, read.nbytes)
            if read.start + read.nbytes >= source.payload.nbytes:
                for _ in chunks:  # the end may show that the bytes are damaged
                    pass
        except (CkptkitError, OSError) as error:
            failed = error
            yield replace(read, error=error)
            continue
        rest = data[read.labels[0][2] :]
        yield replace(read, data=data[: read.nbytes])


def _next_bytes(rest: memoryview, chunks: Iterator[bytes | bytearray | memoryview], count: int) -> memoryview:
    """Return ``rest`` and the chunks that follow, ``count`` bytes at least."""
    parts, have = [rest] if rest else [], len(rest)
    while have < count:
        chunk = next(chunks, None)
        if chunk is None:
            raise FormatError(f"the bytes of the tensor end {count - have} bytes early")
        parts.append(memoryview(bytes(chunk)))  # a payload may fill its buffer again for the next chunk
        have += len(chunk)
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
