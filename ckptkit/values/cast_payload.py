"""Tensors that are cast while they are read: in pieces of bounded size, by all threads, with the losses of each."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.core.checkpoint.payload import Sink, read_into
from ckptkit.core.crc32 import joined_crc32
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, is_seekable
from ckptkit.errors import ChangedError
from ckptkit.values.casting import cast_bytes
from ckptkit.values.computed import ThreadedPayload
from ckptkit.values.losses import Losses, count_losses
from ckptkit.values.workers import PIECE, Workers

__all__ = ["CastPayload"]


@dataclass(frozen=True, slots=True)
class CastPayload(ThreadedPayload):
    """A payload that casts its elements while they are read, as ``Tensor.to`` does.

    ``found`` describes the source, ``out`` the result. Once all bytes were read, ``losses`` has the losses of the cast
    by key. The threads are those of ``workers``, which may be shared.
    """

    source: Payload
    found: TensorInfo
    out: TensorInfo
    losses: MutableMapping[str, CastLoss] | None = None
    workers: Workers = field(default_factory=Workers, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Number of bytes after the cast."""
        return self.out.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes after the cast in pieces, all of them computed in this thread."""
        own = Workers(1)  # a piece is valid until the next one, also where a caller reads two payloads in turn
        run = _Run((self,))
        for task in run.tasks():
            yield run.cast(task, own)[0]
        run.keep_losses()

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out`` in all threads, as ``SelfWriting`` says."""
        return _Run((self,)).write_to(out, offset, checksum=checksum)

    def joins(self, other: Payload) -> bool:
        """Return whether ``other`` is cast between the same dtypes."""
        if not isinstance(other, CastPayload):
            return False
        return (other.found.dtype, other.out.dtype) == (self.found.dtype, self.out.dtype)

    def join(self, others: Sequence[Payload]) -> Payload:
        """Return one payload of this tensor and ``others``: many small tensors are read, cast and written together."""
        return _Run((self, *(other for other in others if isinstance(other, CastPayload))))


@dataclass(frozen=True, slots=True)
class _Segment:
    """Some elements of one tensor of a run: where their bytes are read, or the bytes themselves."""

    number: int
    source: Payload | bytes
    nbytes: int


@dataclass(slots=True)
class _Task:
    """Neighbouring elements, of one or several tensors, that are cast and written together."""

    start: int  # the first element of the run
    segments: list[_Segment] = field(default_factory=list)
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class _Run:
    """Tensors one after the other, all cast between the same two dtypes."""

    parts: tuple[CastPayload, ...]
    _found: dict[int, Losses] = field(default_factory=dict, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def chunks(self) -> Iterator[memoryview]:
        for part in self.parts:
            yield from part.chunks()

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        first = self.parts[0]
        width, workers = DTYPES[first.out.dtype].bits // 8, first.workers

        def work(task: _Task) -> tuple[int, dict[int, Losses], int]:
            made, losses = self.cast(task, workers, keep=False)
            out.write(made, offset + task.start * width)
            return len(made), losses, zlib.crc32(made) if checksum else 0

        crc = 0
        for count, losses, found in workers.each(work, self.tasks()):
            self._add(losses)
            if checksum:
                crc = joined_crc32(crc, found, count)
            yield count
        self.keep_losses()
        return crc

    def cast(self, task: _Task, workers: Workers, *, keep: bool = True) -> tuple[memoryview, dict[int, Losses]]:
        """Return the bytes of a task after the cast, in a buffer of this thread, and the losses of each tensor."""
        first = self.parts[0]
        codes = first.found.dtype, first.out.dtype
        data = workers.buffer("source", "u1", task.nbytes).data
        _read(task.segments, data)
        made = cast_bytes(data, *codes, workers)
        losses: dict[int, Losses] = {}
        if first.losses is not None:
            whole = count_losses(data, made, *codes, workers)
            if whole and len(task.segments) == 1:
                losses = {task.segments[0].number: whole}
            elif whole:
                losses = _losses_of_each(task.segments, data, made, codes, workers)
        if keep:
            self._add(losses)
        return made, losses

    def _add(self, losses: dict[int, Losses]) -> None:
        for number, loss in losses.items():
            self._found[number] = self._found.get(number, Losses()).plus(loss)

    def keep_losses(self) -> None:
        """Store the losses of all tensors."""
        for number, part in enumerate(self.parts):
            if part.losses is not None:
                found = self._found.get(number, Losses())
                codes = part.found.dtype, part.out.dtype
                part.losses[part.out.key] = found.of(part.out.key, *codes, part.found.elements)

    def tasks(self) -> Iterator[_Task]:
        """Yield the elements of all tensors in tasks of bounded size."""
        width = DTYPES[self.parts[0].found.dtype].bits // 8
        most = PIECE // DTYPES[self.parts[0].out.dtype].parts * width
        task = _Task(0)
        for number, part in enumerate(self.parts):
            for source, nbytes in _pieces(part.source, part.found.nbytes, width, most):
                if task.segments and task.nbytes + nbytes > most:
                    yield task
                    task = _Task(task.start + task.nbytes // width)
                task.segments.append(_Segment(number, source, nbytes))
                task.nbytes += nbytes
        if task.segments:
            yield task


def _pieces(source: Payload, nbytes: int, width: int, most: int) -> Iterator[tuple[Payload | bytes, int]]:
    """Yield the elements of a payload in pieces of at most ``most`` bytes: as ranges, or as bytes.

    A payload that is not readable in any order is read here, in the thread of the caller.
    """
    if is_seekable(source):
        if nbytes <= most:
            if nbytes:
                yield source, nbytes
            return
        for start in range(0, nbytes, most):
            count = min(most, nbytes - start)
            yield source.slice(start, count), count
        return
    done, rest = 0, b""  # a chunk can end within an element
    for chunk in source.chunks():
        data = memoryview(rest + bytes(chunk) if rest else chunk).cast("B")
        whole = len(data) // width * width
        rest = bytes(data[whole:])
        done += whole
        for start in range(0, whole, most):
            piece = bytes(data[start : min(start + most, whole)])
            yield piece, len(piece)
    if done + len(rest) != nbytes:
        raise ChangedError(f"a tensor has {done + len(rest)} bytes in place of {nbytes}")


def _read(segments: Sequence[_Segment], buffer: memoryview) -> None:
    """Fill ``buffer`` with the bytes of the segments; adjacent ranges of one file are read together."""
    start = end = 0
    pending: Extent | None = None
    for segment in segments:
        source = segment.source
        if pending is not None and isinstance(source, Extent) and _follows(pending, end - start, source):
            end += segment.nbytes
            continue
        if pending is not None:
            pending.file.read_into(buffer[start:end], pending.offset)
        start, end, pending = end, end + segment.nbytes, None
        if isinstance(source, Extent):
            pending = source
        elif isinstance(source, bytes):
            buffer[start:end] = source
        else:
            read_into(source, buffer[start:end])
    if pending is not None:
        pending.file.read_into(buffer[start:end], pending.offset)


def _follows(first: Extent, nbytes: int, second: Extent) -> bool:
    return first.file is second.file and first.offset + nbytes == second.offset


def _losses_of_each(
    segments: Sequence[_Segment], data: memoryview, made: memoryview, codes: tuple[str, str], workers: Workers
) -> dict[int, Losses]:
    losses: dict[int, Losses] = {}
    start = at = 0
    for segment in segments:
        end, to = start + segment.nbytes, at + segment.nbytes * len(made) // len(data)
        loss = count_losses(data[start:end], made[at:to], *codes, workers)
        if loss:
            losses[segment.number] = losses.get(segment.number, Losses()).plus(loss)
        start, at = end, to
    return losses
