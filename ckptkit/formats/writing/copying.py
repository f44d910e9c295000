"""Write bytes at offsets of an output file; the bytes of input files are copied by the kernel where it can."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Payload
from ckptkit.core.checkpoint.payload import joining, self_writing
from ckptkit.core.crc32 import joined_crc32
from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.payloads import Extent
from ckptkit.errors import ChangedError
from ckptkit.formats.writing.reflink import clone_range

if TYPE_CHECKING:
    from ckptkit.values.workers import Workers

__all__ = ["OffsetWriter", "merge_extents"]

_EARLY = 16 << 20  # bytes; the disk begins to write so many while the next ones are copied
_PART = 1 << 20  # bytes that one thread reads and writes for a checksum, in pieces
_PIECE = 1 << 18  # bytes; they stay in the cache between the reading and what follows
_PAGE = 4096
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


class OffsetWriter:
    """An output file of known size that is written at offsets. A subclass opens and closes the file."""

    in_order = False  # whether bytes must come in order, but for those that threads make at the same time

    def __init__(self, size: int, block: int = 0, *, by_kernel: bool = True) -> None:
        """Take the size in bytes; no file is open yet.

        ``block`` is the size of the blocks that the file can share with inputs, or 0. Without ``by_kernel`` all bytes
        are read and written: the kernel shares blocks too where it can.
        """
        self.size = size
        self.shared = 0  # bytes of blocks that belong to an input too
        self._block = block
        self._by_kernel = by_kernel
        self._fd = -1
        self._not_started = 0  # bytes since the disk was last told to begin
        self._workers: Workers | None = None

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``. Several threads may write at once, each into a range of its own."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)
        self._start_writing(done)

    def copy(self, payload: Payload, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Copy a payload to ``offset``, and yield the number of bytes of each step.

        Returns the CRC-32 of the bytes with ``checksum``, else 0. A range of a file that has a recorded CRC-32 keeps
        it, so that damage in the input stays detectable. Raises ``ChangedError`` where the source became shorter.
        """
        if isinstance(payload, Extent):
            if checksum and payload.crc is None:
                return (yield from self._copy_with_checksum(payload, offset))
            yield from self._copy_extent(payload, offset)
            return payload.crc or 0
        computed = self_writing(payload)
        if computed is not None:
            return (yield from computed.write_to(self, offset, checksum=checksum))
        crc, done = 0, 0
        for chunk in payload.chunks():
            if checksum:
                crc = zlib.crc32(chunk, crc)
            self.write(chunk, offset + done)
            done += len(chunk)
            yield len(chunk)
        if done != payload.nbytes:
            raise ChangedError(f"a tensor has {done} bytes in place of {payload.nbytes}")
        return crc

    def _copy_extent(self, extent: Extent, offset: int) -> Iterator[int]:
        before, whole = self._share(extent, offset)
        if whole:
            yield whole
            yield from self._copy_bytes(extent.slice(0, before), offset)
        done = before + whole
        yield from self._copy_bytes(extent.slice(done, extent.nbytes - done), offset + done)

    def _share(self, extent: Extent, offset: int) -> tuple[int, int]:
        """Share the whole blocks of a range; return the bytes before them and their number, or zeros."""
        file = extent.file
        if self._block and isinstance(file, LocalFile) and (extent.offset - offset) % self._block == 0:
            before = -offset % self._block
            whole = (extent.nbytes - before) // self._block * self._block
            if whole > 0:
                with file.descriptor() as source:
                    is_shared = clone_range(source, extent.offset + before, whole, self._fd, offset + before)
                if is_shared:
                    self.shared += whole
                    return before, whole
        return 0, 0

    def _copy_with_checksum(self, extent: Extent, offset: int) -> Generator[int, None, int]:
        """Copy a range in all threads, each of which reads its part once, and return the CRC-32 of the range."""
        from ckptkit.values.workers import Workers, pieces

        workers = self._workers = self._workers or Workers()
        before, whole = self._share(extent, offset)

        def copy(part: tuple[int, int]) -> tuple[int, int]:
            crc, (start, end) = 0, part
            for at in range(start, end, _PIECE):
                stop = min(at + _PIECE, end)
                piece = workers.read("copied", extent.slice(at, stop - at))
                crc = zlib.crc32(piece, crc)
                for first, last in ((at, min(before, stop)), (max(at, before + whole), stop)):
                    if first < last:
                        self.write(piece[first - at : last - at], offset + first)
            return crc, end - start

        crc = 0
        for found, nbytes in workers.each(copy, pieces(extent.nbytes, _PART)):
            crc = joined_crc32(crc, found, nbytes)
            yield nbytes
        return crc

    def _copy_bytes(self, extent: Extent, offset: int) -> Iterator[int]:
        done, file = 0, extent.file
        # Where the bytes begin at another place of a page, the kernel takes half as long again as reading and writing.
        in_pages = (extent.offset - offset) % _PAGE == 0
        while self._by_kernel and in_pages and isinstance(file, LocalFile) and done < extent.nbytes:
            count = min(extent.nbytes - done, _EARLY)
            try:
                with file.descriptor() as source:
                    copied = os.copy_file_range(source, self._fd, count, extent.offset + done, offset + done)
            except OSError:
                copied = 0
            if copied == 0:  # some file systems cannot; else reading or writing tells which of both files has an error
                self._by_kernel = False
                break
            self._start_writing(copied)
            done += copied
            yield copied
        buffer = memoryview(bytearray(min(_PIECE, extent.nbytes - done)))
        while done < extent.nbytes:
            piece = buffer[: extent.nbytes - done]
            file.read_into(piece, extent.offset + done)
            self.write(piece, offset + done)
            done += len(piece)
            yield len(piece)

    def _end_threads(self) -> None:
        """Wait for the threads that copy; a subclass does so before it closes the file."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def _start_writing(self, count: int) -> None:
        """Let the disk begin to write what the last calls wrote, so that the end need not wait for all of it."""
        if self.size < 2 * _EARLY:
            return
        self._not_started += count  # if two threads count at once, the disk only begins a little later
        if self._not_started >= _EARLY:
            self._not_started = 0
            start = _early_start()
            if start is not None:
                start(self._fd, 0, 0, _START_WRITING)  # an error comes again at the end, from fsync


@functools.cache
def _early_start() -> Callable[[int, int, int, int], int] | None:
    """Return ``sync_file_range`` of the C library, or None where the system has no such call."""
    import ctypes

    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def start(fd: int, offset: int, count: int, flags: int) -> int:
        return int(call(fd, offset, count, flags))

    return start


def merge_extents(payloads: Iterable[Payload]) -> Iterator[Payload]:
    """Yield the payloads, joining adjacent ranges of one file so that the kernel copies them in one call.

    Other neighbours are joined where they say so.
    """
    run: list[Payload] = []
    for payload in payloads:
        if run and not _is_neighbour(run[-1], payload):
            yield _joined(run)
            run = []
        run.append(payload)
    if run:
        yield _joined(run)


def _is_neighbour(first: Payload, second: Payload) -> bool:
    if isinstance(first, Extent):
        return isinstance(second, Extent) and first.file is second.file and first.offset + first.nbytes == second.offset
    later = joining(second)
    return later is not None and later.joins(first)


def _joined(run: Sequence[Payload]) -> Payload:
    first = run[0]
    if len(run) == 1:
        return first
    if isinstance(first, Extent):
        return Extent(first.file, first.offset, sum(payload.nbytes for payload in run))
    earlier = joining(first)
    return first if earlier is None else earlier.join(run[1:])
