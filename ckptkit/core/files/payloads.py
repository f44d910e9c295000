"""Payloads: byte ranges of files, decompressed or with their bytes swapped, and how they are read and compared."""

from __future__ import annotations

import array
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeGuard

from ckptkit.core.checkpoint import Payload
from ckptkit.core.files.source import ByteSource
from ckptkit.core.frozen import slot_setters
from ckptkit.errors import FormatError

__all__ = [
    "CHUNK",
    "ByteSwapped",
    "Extent",
    "Inflated",
    "PayloadReader",
    "Region",
    "announce",
    "is_same_range",
    "is_seekable",
    "place_of",
    "same_bytes",
]

CHUNK = 4 << 20
_LONG = 4 * CHUNK
_COMPARED = 1 << 19  # bytes of two payloads that are compared while they are in the cache


class Region(Payload, Protocol):
    """A payload of which a range can be read alone."""

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return the ``nbytes`` bytes from byte ``start``."""
        ...


@dataclass(frozen=True, slots=True, init=False)
class Extent:
    """A range of bytes in a file."""

    file: ByteSource
    offset: int
    nbytes: int
    crc: int | None = None  # CRC-32 of the whole range, if the container records it

    def __init__(self, file: ByteSource, offset: int, nbytes: int, crc: int | None = None) -> None:
        """Set all fields through their slots: a large checkpoint has one range for each tensor."""
        _set_file(self, file)
        _set_offset(self, offset)
        _set_nbytes(self, nbytes)
        _set_crc(self, crc)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in one reused buffer."""
        if self.file.is_remote and self.nbytes > _LONG:  # short neighbours are read ahead as one
            self.file.will_read([(self.offset, self.nbytes)])
        buffer = memoryview(bytearray(min(self.nbytes, CHUNK)))
        for done in range(0, self.nbytes, CHUNK):
            chunk = buffer[: min(CHUNK, self.nbytes - done)]
            self.file.read_into(chunk, self.offset + done)
            yield chunk

    def readinto(self, buffer: memoryview) -> None:
        """Fill ``buffer``, which has ``nbytes`` items, from the file."""
        self.file.read_into(buffer, self.offset)

    def slice(self, start: int, nbytes: int) -> Extent:
        """Return the ``nbytes`` bytes of the range from its byte ``start``."""
        is_whole = start == 0 and nbytes == self.nbytes
        return self if is_whole else Extent(self.file, self.offset + start, nbytes)


_set_file, _set_offset, _set_nbytes, _set_crc = slot_setters(Extent)


@dataclass(frozen=True, slots=True)
class Inflated:
    """A range of the decompressed bytes of ``packed``, a range of a file in deflate format.

    ``size`` is the number of all decompressed bytes. The bytes after the range are not decompressed.
    """

    packed: Extent
    size: int
    start: int = 0
    nbytes: int = 0

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes. The bytes before the range are decompressed too, but not returned."""
        skip, left = self.start, self.nbytes
        if not left:
            return
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        for chunk in self.packed.chunks():
            data = self._inflate(inflater, chunk)
            while data:
                part = data[skip : skip + left]
                after = len(data) - skip - len(part)
                skip -= min(skip, len(data))
                left -= len(part)
                if part:
                    yield part
                if not left:
                    last = self.start + self.nbytes == self.size
                    if last and (after > 0 or (not inflater.eof and self._inflate(inflater, inflater.unconsumed_tail))):
                        raise FormatError(
                            f"compressed data continues after {self.size} bytes", path=self.packed.file.path
                        )
                    return
                data = self._inflate(inflater, inflater.unconsumed_tail)
        raise FormatError(f"compressed data ends {left} bytes early", path=self.packed.file.path)

    def _inflate(self, inflater: zlib._Decompress, data: bytes | memoryview) -> bytes:
        try:
            return inflater.decompress(data, CHUNK)
        except zlib.error as error:
            raise FormatError(f"compressed data is damaged: {error}", path=self.packed.file.path) from None

    def slice(self, start: int, nbytes: int) -> Inflated:
        """Return the ``nbytes`` bytes of the range from its byte ``start``."""
        return Inflated(self.packed, self.size, self.start + start, nbytes)


_ARRAY_TYPES: Final = {2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class ByteSwapped:
    """A range of big-endian numbers of ``width`` bytes (2, 4 or 8), read as little-endian numbers."""

    source: Extent | Inflated
    width: int

    @property
    def nbytes(self) -> int:
        """Number of bytes, the same as in the file."""
        return self.source.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the numbers with their bytes swapped."""
        rest = b""
        for chunk in self.source.chunks():
            data = rest + chunk if rest else chunk
            whole = len(data) - len(data) % self.width
            rest = bytes(data[whole:])
            numbers = array.array(_ARRAY_TYPES[self.width])
            numbers.frombytes(data[:whole])
            numbers.byteswap()
            yield memoryview(numbers).cast("B")

    def slice(self, start: int, nbytes: int) -> ByteSwapped:
        """Return the ``nbytes`` bytes from byte ``start``; both must be multiples of ``width``."""
        return ByteSwapped(self.source.slice(start, nbytes), self.width)


def is_seekable(payload: Payload) -> TypeGuard[Region]:
    """Return whether a range can be read without reading the bytes before the range."""
    source = payload.source if isinstance(payload, ByteSwapped) else payload
    return isinstance(source, Extent) or getattr(source, "is_seekable", False)


def is_same_range(first: Payload, second: Payload) -> bool:
    """Return whether two payloads are known to be one range of one file, perhaps under two names; nothing is read."""
    return (
        isinstance(first, Extent)
        and isinstance(second, Extent)
        and (first.offset, first.nbytes, first.file.identity) == (second.offset, second.nbytes, second.file.identity)
    )


def place_of(payload: Payload) -> tuple[str, int]:
    """Return the file and the offset of a payload, so that those of one file can be read in order."""
    extent = payload.source if isinstance(payload, ByteSwapped) else payload
    return (extent.file.path, extent.offset) if isinstance(extent, Extent) else ("", 0)


def announce(payloads: Iterable[Payload]) -> None:
    """Say that these payloads are read next, in this order: a store sends their bytes ahead."""
    ranges: dict[int, tuple[ByteSource, list[tuple[int, int]]]] = {}
    for payload in payloads:
        source = payload.source if isinstance(payload, ByteSwapped) else payload
        extent = source.packed if isinstance(source, Inflated) else source
        if isinstance(extent, Extent) and extent.file.is_remote:
            file = extent.file
            ranges.setdefault(id(file), (file, []))[1].append((extent.offset, extent.nbytes))
    for file, found in ranges.values():
        file.will_read(found)


def same_bytes(first: Payload, second: Payload) -> bool:
    """Return whether two payloads have equal bytes. Both are read in pieces, up to the first difference.

    Raises ``FormatError`` where a payload has fewer bytes than it says.
    """
    if first.nbytes != second.nbytes:
        return False
    announce((first, second))
    size = min(first.nbytes, _COMPARED)
    held, buffer = bytearray(size), memoryview(bytearray(size))
    left, right = PayloadReader(first), PayloadReader(second)
    with memoryview(held) as view:
        for start in range(0, first.nbytes, _COMPARED):
            count = min(_COMPARED, first.nbytes - start)
            left.read_into(view[:count])
            right.read_into(buffer[:count])
            if not held.startswith(buffer[:count]):  # compares the bytes where they are; == of views takes each item
                return False
    return True


class PayloadReader:
    """Read the bytes of a payload in order, into memory of the caller."""

    def __init__(self, payload: Payload) -> None:
        """Start at the first byte; nothing is read yet."""
        self._extent = payload if isinstance(payload, Extent) else None
        self._chunks = None if isinstance(payload, Extent) else _ChunkReader(payload.chunks())
        self._done = 0

    def read_into(self, buffer: memoryview) -> None:
        """Fill ``buffer`` with the next bytes. Raises ``FormatError`` where the payload has fewer bytes."""
        if self._extent is not None:  # straight from the file, without a buffer between
            self._extent.file.read_into(buffer, self._extent.offset + self._done)
            self._done += len(buffer)
            return
        assert self._chunks is not None  # noqa: S101 - one of both is set
        done = 0
        while done < len(buffer):
            count = min(len(self._chunks.current()), len(buffer) - done)
            if not count:
                raise FormatError(f"the values end {len(buffer) - done} bytes early")
            buffer[done : done + count] = self._chunks.take(count)
            done += count


class _ChunkReader:
    """Read the bytes of a payload in lengths that the caller chooses."""

    def __init__(self, chunks: Iterator[bytes | bytearray | memoryview]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def current(self) -> memoryview:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest = memoryview(chunk).cast("B")
        return self._rest

    def take(self, count: int) -> memoryview:
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken
