"""Write bytes at offsets of an output file; the bytes of input files are copied by the kernel where it can."""

from __future__ import annotations

import errno
import functools
import os
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Self

from ckptkit.core.checkpoint import Payload
from ckptkit.core.checkpoint.payload import joining, self_writing
from ckptkit.core.files import Extent
from ckptkit.errors import ChangedError
from ckptkit.formats.writing.reflink import clone_range

__all__ = ["Checksums", "OffsetWriter", "merge_extents", "worth_a_thread"]

_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_EARLY = 16 << 20  # bytes; the disk begins to write so many while the next ones are copied
_WORTH_A_THREAD = 1 << 20  # bytes whose checksums are computed while they are copied
_PIECE = 1 << 18  # bytes; they stay in the cache between the reading and what follows
_PAGE = 4096
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


class OffsetWriter:
    """An output file of known size that is written at offsets. A subclass opens and closes the file."""

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
        if isinstance(payload, Extent) and (payload.crc is not None or not checksum):
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
        if self._block and (extent.offset - offset) % self._block == 0:
            before = -offset % self._block
            whole = (extent.nbytes - before) // self._block * self._block
            if whole > 0 and clone_range(
                extent.file.fileno(), extent.offset + before, whole, self._fd, offset + before
            ):
                self.shared += whole
                yield whole
                if before:
                    yield from self._copy_bytes(extent.slice(0, before), offset)
                done = before + whole
                yield from self._copy_bytes(extent.slice(done, extent.nbytes - done), offset + done)
                return
        yield from self._copy_bytes(extent, offset)

    def _copy_bytes(self, extent: Extent, offset: int) -> Iterator[int]:
        done = 0
        # Where the bytes begin at another place of a page, the kernel takes half as long again as reading and writing.
        if not self._by_kernel or (extent.offset - offset) % _PAGE:
            buffer = memoryview(bytearray(min(_PIECE, extent.nbytes)))
            while done < extent.nbytes:
                piece = buffer[: extent.nbytes - done]
                extent.file.read_into(piece, extent.offset + done)
                self.write(piece, offset + done)
                done += len(piece)
                yield len(piece)
            return
        while done < extent.nbytes:
            count = min(extent.nbytes - done, _EARLY)
            try:
                copied = os.copy_file_range(extent.file.fileno(), self._fd, count, extent.offset + done, offset + done)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                self._by_kernel = False
                yield from self._copy_bytes(extent.slice(done, extent.nbytes - done), offset + done)
                return
            if copied == 0:
                raise ChangedError("the file became shorter while it was read", path=extent.file.path)
            self._start_writing(copied)
            done += copied
            yield copied

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


class Checksums:
    """The CRC-32 of ranges of files, which a thread reads while the kernel copies the ranges.

    Use it as a context manager: the thread has ended at the end of the block, also after an error.
    """

    def __init__(self, extents: Iterable[Extent]) -> None:
        """Take the ranges, in the order in which they are copied."""
        self._extents = list(extents)
        self._found: list[int] = []
        self._error: BaseException | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        """Begin to read."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the reading, and wait until it ended: the caller may close the files."""
        self._is_stopped = True
        self._thread.join()

    def result(self) -> list[int]:
        """Wait for the end and return the CRC-32 of each range. Raises the error of the reading."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _read(self) -> None:
        buffer = memoryview(bytearray(_PIECE))
        try:
            for extent in self._extents:
                crc, at, end = 0, extent.offset, extent.offset + extent.nbytes
                while at < end and not self._is_stopped:
                    piece = buffer[: end - at]
                    extent.file.read_into(piece, at)
                    crc = zlib.crc32(piece, crc)
                    at += len(piece)
                self._found.append(crc)
        except BaseException as error:  # noqa: BLE001 - raised again where the result is taken
            self._error = error


def worth_a_thread(extents: Iterable[Extent]) -> bool:
    """Return whether these ranges are so large that a thread should read them for their checksums."""
    return sum(extent.nbytes for extent in extents) >= _WORTH_A_THREAD


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
