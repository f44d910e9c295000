"""The base classes of payloads that compute their bytes: by all threads, in any order, with their losses."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.checkpoint.payload import Payload, Sink, part_of, read_into
from ckptkit.core.crc32 import joined_crc32
from ckptkit.core.dtypes import DTYPES
from ckptkit.values.losses import Losses
from ckptkit.values.sinks import MemorySink, NullSink
from ckptkit.values.workers import PIECE, Workers

__all__ = ["BlockPayload", "JoinedPayload", "ThreadedPayload", "bytes_of"]

_TASK: Final = 1 << 18  # bytes that one thread computes at least, of several small payloads
_Block = TypeVar("_Block")


class ThreadedPayload(ABC):
    """A payload that computes its bytes while it writes them, in all threads."""

    __slots__ = ()

    @abstractmethod
    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out`` in all threads, as ``SelfWriting`` says."""

    def readinto(self, buffer: memoryview) -> None:
        """Fill ``buffer``, which has ``nbytes`` items, in all threads."""
        for _ in self.write_to(MemorySink(buffer), 0):
            pass

    def find_losses(self) -> None:
        """Compute all bytes only for their losses."""
        for _ in self.write_to(NullSink(), 0):
            pass


class BlockPayload(ThreadedPayload, Generic[_Block]):
    """A payload that is computed in blocks, which lie one after the other; ``out`` describes the result.

    The threads are those of ``workers``, which may be shared.
    """

    __slots__ = ()

    out: TensorInfo
    workers: Workers

    @abstractmethod
    def blocks(self, low: int = 0, high: int | None = None) -> Iterator[_Block]:
        """Yield the blocks that have the elements from ``low`` to ``high``, by default all, in order."""

    @abstractmethod
    def first_element(self, block: _Block) -> int:
        """Return the number of elements before a block."""

    def first_byte(self, block: _Block) -> int:
        """Return the number of bytes before a block."""
        return self.first_element(block) * DTYPES[self.out.dtype].bits // 8

    @abstractmethod
    def make(self, block: _Block, workers: Workers) -> tuple[memoryview, Losses]:
        """Return the bytes of a block in a buffer of this thread, and the losses of their rounding."""

    @abstractmethod
    def keep(self, losses: Losses) -> None:
        """Store the losses of all blocks."""

    @property
    def nbytes(self) -> int:
        """Number of bytes of the result."""
        return self.out.nbytes

    @property
    def is_seekable(self) -> bool:
        """Whether a range is read without the bytes before it: it is."""
        return True

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces, all of them computed in this thread."""
        own = Workers(1)  # a piece is valid until the next one, also where a caller reads two payloads in turn
        found = Losses()
        for block in self.blocks():
            made, losses = self.make(block, own)
            found = found.plus(losses)
            yield made
        self.keep(found)

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out`` in all threads, as ``SelfWriting`` says."""

        def work(block: _Block) -> tuple[int, Losses, int]:
            made, losses = self.make(block, self.workers)
            out.write(made, offset + self.first_byte(block))
            return len(made), losses, zlib.crc32(made) if checksum else 0

        crc, found = 0, Losses()
        for count, losses, part in self.workers.each(work, self.blocks()):
            found = found.plus(losses)
            if checksum:
                crc = joined_crc32(crc, part, count)
            yield count
        self.keep(found)
        return crc

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return some of the bytes, for which only their blocks are computed."""
        return _Slice(self, start, nbytes)

    def read_range(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from byte ``start`` on."""
        bits = DTYPES[self.out.dtype].bits
        if not len(buffer):
            return
        stop = start + len(buffer)
        for block in self.blocks(start * 8 // bits, -(-stop * 8 // bits)):
            made, _ = self.make(block, self.workers)
            place = self.first_byte(block)
            begin, end = max(start, place), min(stop, place + len(made))
            buffer[begin - start : end - start] = made[begin - place : end - place]


@dataclass(frozen=True, slots=True)
class JoinedPayload(ThreadedPayload):
    """Payloads that lie one after the other, each of which one thread computes."""

    parts: Sequence[BlockPayload[Any]]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes of each part in turn."""
        for part in self.parts:
            yield from part.chunks()

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out`` in all threads, as ``SelfWriting`` says."""
        workers = self.parts[0].workers

        def work(task: tuple[int, Sequence[BlockPayload[Any]]]) -> tuple[int, list[Losses], int]:
            begin, parts = task
            place, crc, losses = offset + begin, 0, []
            for part in parts:
                found = Losses()
                for block in part.blocks():
                    made, lost = part.make(block, workers)
                    out.write(made, place)
                    place += len(made)
                    found = found.plus(lost)
                    if checksum:
                        crc = zlib.crc32(made, crc)
                losses.append(found)
            return place - begin - offset, losses, crc

        crc, remaining = 0, iter(self.parts)
        for count, losses, found in workers.each(work, self._tasks()):
            for lost in losses:
                next(remaining).keep(lost)
            if checksum:
                crc = joined_crc32(crc, found, count)
            yield count
        return crc

    def _tasks(self) -> Iterator[tuple[int, Sequence[BlockPayload[Any]]]]:
        """Yield the parts that one thread computes, and the number of bytes before them."""
        begin = place = 0
        task: list[BlockPayload[Any]] = []
        for part in self.parts:
            task.append(part)
            place += part.nbytes
            if place - begin >= _TASK:
                yield begin, task
                begin, task = place, []
        if task:
            yield begin, task


@dataclass(frozen=True, slots=True)
class _Slice:
    whole: BlockPayload[Any]
    start: int
    nbytes: int

    @property
    def is_seekable(self) -> bool:
        return True

    def chunks(self) -> Iterator[memoryview]:
        for start in range(0, self.nbytes, PIECE):
            data = memoryview(bytearray(min(PIECE, self.nbytes - start)))
            self.whole.read_range(self.start + start, data)
            yield data

    def readinto(self, buffer: memoryview) -> None:
        self.whole.read_range(self.start, buffer)

    def slice(self, start: int, nbytes: int) -> Payload:
        return part_of(self.whole, self.start + start, nbytes)


def bytes_of(source: Payload) -> bytearray:
    """Return all bytes of a payload."""
    data = bytearray(source.nbytes)
    read_into(source, memoryview(data))
    return data
