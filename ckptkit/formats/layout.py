"""Bytes between a strided and a contiguous layout, without arithmetic: the logical values of any view, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from ckptkit.core.checkpoint import DTYPES, TensorInfo, reach, row_major
from ckptkit.core.files import CHUNK, Inflated, Region, Swapped, seekable
from ckptkit.core.text import human_bytes, quoted
from ckptkit.errors import FormatError

__all__ = ["Loop", "Strided", "loops_of", "move"]

_MOST_STRIPES = 32
_WINDOW = 64 << 20  # a span of this size is read whole, whatever it holds
_HOLE = 64 << 10  # between two runs: what is farther apart is not read together
_WORDS: Final[dict[int, Literal["B", "H", "I", "Q"]]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_SIGN_FLIPPED: Final = bytes(byte ^ 0x80 for byte in range(256))


class Loop(NamedTuple):
    """A dimension of a copy: how often, and how many bytes apart in the target and in the source."""

    times: int
    to: int
    of: int


class _Piece(NamedTuple):
    """A part of a copy: where it begins on both sides, its loops, and the bytes that lie together."""

    to: int
    of: int
    loops: list[Loop]
    run: int


def loops_of(sizes: Sequence[int], to: Sequence[int], of: Sequence[int], width: int) -> tuple[list[Loop], int]:
    """Return the fewest loops, outermost first, over runs of bytes that lie together on both sides; and their length.

    ``to`` and ``of`` are the strides of target and source in bytes, ``width`` the bytes of an element.
    """
    run = width
    loops: list[Loop] = []
    for size, there, here in zip(reversed(sizes), reversed(to), reversed(of), strict=True):
        if size == 1:
            continue
        if not loops and there == here == run:
            run *= size
        elif loops and (there, here) == (loops[-1].times * loops[-1].to, loops[-1].times * loops[-1].of):
            loops[-1] = loops[-1]._replace(times=loops[-1].times * size)
        else:
            loops.append(Loop(size, there, here))
    return loops[::-1], run


def move(target: memoryview, source: memoryview, loops: Sequence[Loop], run: int) -> None:
    """Copy all runs; both sides are bytes, and begin with the first run."""
    # One strided copy serves all of a loop: the longest is left to it, and Python goes through the others.
    _move(target, source, sorted(loops, key=lambda loop: loop.times), run)


def _move(target: memoryview, source: memoryview, loops: list[Loop], run: int) -> None:
    if not loops:
        target[:run] = source[:run]
    elif len(loops) == 1:
        _move_runs(target, source, loops[0], run)
    else:
        loop, *rest = loops
        for index in range(loop.times):
            _move(target[index * loop.to :], source[index * loop.of :], rest, run)


def _move_runs(target: memoryview, source: memoryview, loop: Loop, run: int) -> None:
    times, to, of = loop
    if not of:
        source, of = memoryview(bytes(source[:run]) * times), run
    unit = math.gcd(to, of, run, 8)
    if run // unit > min(_MOST_STRIPES, times):
        for index in range(times):
            target[index * to : index * to + run] = source[index * of : index * of + run]
        return
    # Many short runs: one strided copy for each word of a run, instead of one short copy for each run.
    out = target[: (times - 1) * to + run].cast(_WORDS[unit])
    data = source[: (times - 1) * of + run].cast(_WORDS[unit])
    for word in range(run // unit):
        last = word + (times - 1) * of // unit
        out[word :: to // unit] = data[word : last + 1 : of // unit]


def _pieces(loops: list[Loop], run: int, side: Literal["to", "of"], most: int) -> Iterator[_Piece]:
    """Cut a copy into parts, in its order, that reach over at most ``most`` bytes on one side."""
    if not loops:
        for start in range(0, run, most):
            yield _Piece(start, start, [], min(most, run - start))
        return
    first, *rest = loops
    step, inner = getattr(first, side), run + sum((loop.times - 1) * getattr(loop, side) for loop in rest)
    if inner > most or step - inner > _HOLE:
        for index in range(first.times):
            for piece in _pieces(rest, run, side, most):
                yield piece._replace(to=index * first.to + piece.to, of=index * first.of + piece.of)
        return
    rows = (most - inner) // step + 1
    for index in range(0, first.times, rows):
        part = first._replace(times=min(rows, first.times - index))
        yield _Piece(index * first.to, index * first.of, [part, *rest], run)


@dataclass(frozen=True, slots=True)
class Strided:
    """The contiguous bytes of a view into ``storage``, of its conjugate or of its negative, as torch resolves them.

    Memory is bounded by the tensor and a window; no more of the storage is held.
    """

    storage: Region
    info: TensorInfo
    conj: bool = False
    neg: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take when stored contiguously."""
        return self.info.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in row-major order, in pieces of bounded size.

        Raises ``FormatError`` where they lie far apart in compressed data: what expands to much has to be held whole.
        """
        if not self.nbytes:
            return
        data, loops, run = self._read()
        buffer = bytearray(min(self.nbytes, CHUNK))
        for piece in _pieces(loops, run, "to", CHUNK):
            out = memoryview(buffer)[: math.prod(loop.times for loop in piece.loops) * piece.run]
            move(out, data[piece.of :], piece.loops, piece.run)
            self._flip_signs(buffer, len(out))
            yield out

    def _read(self) -> tuple[memoryview, list[Loop], int]:
        loops, run = self._loops()
        first, last = reach(self.info)
        span = last - first
        if span <= max(_WINDOW, self.nbytes):
            payload = self.storage.slice(first, span)
            return memoryview(b"".join(bytes(chunk) for chunk in payload.chunks())), loops, run
        if not seekable(self.storage):
            raise self._too_far_apart(span)
        # Mostly holes: the elements are read in the order in which they lie, and put next to each other.
        inward = sorted((index for index, loop in enumerate(loops) if loop.of), key=lambda index: -loops[index].of)
        sizes = tuple(loops[index].times for index in inward)
        steps = dict(zip(inward, (step * run for step in row_major(sizes)), strict=True))
        packed = memoryview(bytearray(math.prod(sizes) * run))
        order = [loops[index]._replace(to=steps[index]) for index in inward]
        for piece in _pieces(order, run, "of", CHUNK):
            length = piece.run + sum((loop.times - 1) * loop.of for loop in piece.loops)
            part = self.storage.slice(first + piece.of, length)
            data = memoryview(b"".join(bytes(chunk) for chunk in part.chunks()))
            move(packed[piece.to :], data, piece.loops, piece.run)
        return packed, [loop._replace(of=steps.get(index, 0)) for index, loop in enumerate(loops)], run

    def _too_far_apart(self, span: int) -> FormatError:
        stored = self.storage.source if isinstance(self.storage, Swapped) else self.storage
        return FormatError(
            f"{quoted(self.info.key)}: {human_bytes(self.nbytes)} that lie in {human_bytes(span)} of compressed data",
            hint="save it again with torch.save, which does not compress",
            path=stored.packed.file.path if isinstance(stored, Inflated) else None,
        )

    def _loops(self) -> tuple[list[Loop], int]:
        assert self.info.view is not None  # noqa: S101 - made only for tensors with a place in a storage
        shape, stride, width = self.info.shape, self.info.view.stride, DTYPES[self.info.dtype].bits // 8
        if self.info.dtype == "F4":  # listed as dense only where the two elements of a byte stay together
            shape, stride, width = (*shape[:-1], shape[-1] // 2), (*(step // 2 for step in stride[:-1]), 1), 1
        return loops_of(shape, [step * width for step in row_major(shape)], [step * width for step in stride], width)

    def _flip_signs(self, buffer: bytearray, end: int) -> None:
        # Arithmetic would lose the sign of a zero and the bits of a NaN; the sign is the top bit of the last byte.
        dtype = DTYPES[self.info.dtype]
        for index, flip in enumerate((self.neg, self.neg != self.conj)[: dtype.parts]):
            if flip:
                top = slice((index + 1) * dtype.part_bytes - 1, end, dtype.bits // 8)
                buffer[top] = buffer[top].translate(_SIGN_FLIPPED)
