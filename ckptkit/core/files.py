"""Byte ranges of local files: opened once, checked to be regular, read with ``pread``."""

from __future__ import annotations

import array
import errno
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeGuard

from ckptkit.core.checkpoint import Payload
from ckptkit.core.text import quoted
from ckptkit.errors import ChangedError, FormatError, PathError

__all__ = ["CHUNK", "ByteSwapped", "Extent", "Inflated", "LocalFile", "Region", "is_seekable", "same_bytes"]

CHUNK = 4 << 20

_REASONS = {
    errno.ENOENT: "no such file or directory",
    errno.EACCES: "permission denied",
    errno.ELOOP: "too many levels of symbolic links",
    errno.ENXIO: "not a regular file",
}


def _reason_of(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or os.strerror(error.errno or 0).lower()


class LocalFile:
    """A regular file open for reading.

    Never mapped into memory: a map dies with SIGBUS when somebody truncates the file, ``pread`` says so.
    """

    def __init__(self, path: str) -> None:
        """Open ``path``; raises ``PathError`` where it is missing, unreadable or not a regular file."""
        self.path = path
        try:
            # Without O_NONBLOCK the open of a FIFO that nobody writes to never returns.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            reason = _reason_of(error)
            if error.errno == errno.ENOENT and os.path.islink(path):
                reason = f"a symbolic link to {quoted(os.readlink(path))}, which does not exist"
            raise PathError(reason, path=path) from None
        except ValueError as error:  # a NUL byte in the name
            raise PathError(str(error), path=path) from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise PathError("not a regular file", path=path)
        self.size = status.st_size
        self._seen = (status.st_ino, status.st_size, status.st_mtime_ns)

    def fileno(self) -> int:
        """Return the descriptor, for the kernel's own copying."""
        return self._fd

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes.

        Raises ``ChangedError`` where the file has become shorter, and ``PathError`` where the disk cannot read it.
        """
        data = self._read(offset, count)
        if len(data) == count:
            return data
        parts = [data]
        missing = count - len(data)
        while missing:
            data = self._read(offset + count - missing, missing)
            if not data:
                raise ChangedError("the file became shorter while it was read", path=self.path)
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _read(self, offset: int, count: int) -> bytes:
        try:
            return os.pread(self._fd, count, offset)
        except OSError as error:
            raise PathError(_reason_of(error), path=self.path) from None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; raises as ``read`` does."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise PathError(_reason_of(error), path=self.path) from None
            if count == 0:
                raise ChangedError("the file became shorter while it was read", path=self.path)
            done += count

    def check_unchanged(self) -> None:
        """Raise ``ChangedError`` where size or modification time are no longer those of the opening."""
        status = os.fstat(self._fd)
        if (status.st_ino, status.st_size, status.st_mtime_ns) != self._seen:
            raise ChangedError("the file changed while it was read", path=self.path)

    def close(self) -> None:
        """Close the descriptor, once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Region(Payload, Protocol):
    """A payload of which a part can be taken without reading the rest first."""

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return ``nbytes`` of it from byte ``start``."""
        ...


@dataclass(frozen=True, slots=True)
class Extent:
    """A plain range of bytes in a file: the payload that the kernel can copy by itself."""

    file: LocalFile
    offset: int
    nbytes: int
    crc: int | None = None  # CRC-32 of the whole range, where a container has recorded it

    def chunks(self) -> Iterator[memoryview]:
        """Yield the range through one reused buffer."""
        buffer = memoryview(bytearray(min(self.nbytes, CHUNK)))
        for done in range(0, self.nbytes, CHUNK):
            piece = buffer[: min(CHUNK, self.nbytes - done)]
            self.file.read_into(piece, self.offset + done)
            yield piece

    def slice(self, start: int, nbytes: int) -> Extent:
        """Return a part of the range."""
        whole = start == 0 and nbytes == self.nbytes
        return self if whole else Extent(self.file, self.offset + start, nbytes)


@dataclass(frozen=True, slots=True)
class Inflated:
    """A range of what a deflated range of a file expands to; expanded while it is read, never further than asked."""

    packed: Extent
    size: int
    start: int = 0
    nbytes: int = 0

    def chunks(self) -> Iterator[bytes]:
        """Yield the range, inflating what lies before it too."""
        skip, left = self.start, self.nbytes
        if not left:
            return
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        for piece in self.packed.chunks():
            data = self._expand(machine, piece)
            while data:
                part = data[skip : skip + left]
                behind = len(data) - skip - len(part)
                skip -= min(skip, len(data))
                left -= len(part)
                if part:
                    yield part
                if not left:
                    last = self.start + self.nbytes == self.size
                    if last and (behind > 0 or (not machine.eof and self._expand(machine, machine.unconsumed_tail))):
                        raise FormatError(
                            f"compressed data goes on behind {self.size} bytes", path=self.packed.file.path
                        )
                    return
                data = self._expand(machine, machine.unconsumed_tail)
        raise FormatError(f"compressed data ends {left} bytes early", path=self.packed.file.path)

    def _expand(self, machine: zlib._Decompress, data: bytes | memoryview) -> bytes:
        try:
            return machine.decompress(data, CHUNK)
        except zlib.error as error:
            raise FormatError(f"compressed data is damaged: {error}", path=self.packed.file.path) from None

    def slice(self, start: int, nbytes: int) -> Inflated:
        """Return a part of the range."""
        return Inflated(self.packed, self.size, self.start + start, nbytes)


_WORDS: Final = {2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class ByteSwapped:
    """A range of big-endian numbers of ``width`` bytes each (2, 4 or 8), as little-endian ones."""

    source: Extent | Inflated
    width: int

    @property
    def nbytes(self) -> int:
        """As many bytes as in the file."""
        return self.source.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the range, its numbers swapped."""
        rest = b""
        for chunk in self.source.chunks():
            data = rest + chunk if rest else chunk
            whole = len(data) - len(data) % self.width
            rest = bytes(data[whole:])
            numbers = array.array(_WORDS[self.width])
            numbers.frombytes(data[:whole])
            numbers.byteswap()
            yield memoryview(numbers).cast("B")

    def slice(self, start: int, nbytes: int) -> ByteSwapped:
        """Return a part of the range; it begins and ends between two numbers."""
        return ByteSwapped(self.source.slice(start, nbytes), self.width)


def is_seekable(payload: Payload) -> TypeGuard[Region]:
    """Return whether a part of it can be read without reading what lies before it."""
    return isinstance(payload.source if isinstance(payload, ByteSwapped) else payload, Extent)


def same_bytes(one: Payload, other: Payload) -> bool:
    """Return whether two payloads are equal, byte by byte; reads both in pieces, and no further than they agree."""
    if one.nbytes != other.nbytes:
        return False
    left, right = (_Pieces(payload.chunks()) for payload in (one, other))
    done = 0
    while done < one.nbytes:
        count = min(len(left.current()), len(right.current()))
        # As bytes: two views are compared item by item.
        if not count or left.take(count).tobytes() != right.take(count).tobytes():
            return False
        done += count
    return True


class _Pieces:
    """The pieces of a payload, taken in lengths of one's own."""

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
        piece, self._rest = self._rest[:count], self._rest[count:]
        return piece
