"""Bytes between a strided and a contiguous layout, without arithmetic: the logical values of any view, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from ckptkit.core.checkpoint import DTYPES, Payload, TensorInfo, row_major, storage_range
from ckptkit.core.files import CHUNK, ByteSwapped, Inflated, Region, is_seekable
from ckptkit.core.text import human_bytes, quoted
from ckptkit.errors import FormatError

__all__ = [
    "Block",
    "BlockTensor",
    "Box",
    "InMemory",
    "Loop",
    "Strided",
    "check_cover",
    "loops_of",
    "move",
    "step_budget",
]


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
        first, last = storage_range(self.info)
        span = last - first
        if span <= max(_WINDOW, self.nbytes):
            payload = self.storage.slice(first, span)
            return memoryview(b"".join(bytes(chunk) for chunk in payload.chunks())), loops, run
        if not is_seekable(self.storage):
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
        stored = self.storage.source if isinstance(self.storage, ByteSwapped) else self.storage
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


_STEPS, _STEPS_PER_BOX = 1_000_000, 4  # a grid needs about three for each box


class Box(NamedTuple):
    """A block of a tensor: where it begins in each dimension, and how far it goes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Slab(NamedTuple):
    start: int
    stop: int
    inside: list[int]  # which boxes


def _slabs(boxes: Sequence[Box], among: list[int], dim: int, size: int) -> Iterator[_Slab]:
    """Cut one dimension where a box begins or ends; every box of a slab goes through all of it."""
    coming = sorted(among, key=lambda index: boxes[index].offsets[dim])
    edges = {0, size}
    for index in among:
        offset = boxes[index].offsets[dim]
        edges |= {offset, offset + boxes[index].sizes[dim]}
    cuts = sorted(edges)
    inside: list[int] = []
    following = 0
    for start, stop in pairwise(cuts):
        inside = [index for index in inside if boxes[index].offsets[dim] + boxes[index].sizes[dim] > start]
        while following < len(coming) and boxes[coming[following]].offsets[dim] <= start:
            inside.append(coming[following])
            following += 1
        yield _Slab(start, stop, inside)


def step_budget(boxes: int) -> list[int]:
    """Return what ``check_cover`` may spend on that many boxes: a few can be laid to cut each other to shreds."""
    return [_STEPS + _STEPS_PER_BOX * boxes]


def check_cover(key: str, shape: tuple[int, ...], boxes: Sequence[Box], steps: list[int]) -> None:
    """Raise ``FormatError`` unless ``boxes`` cover every element of ``shape`` exactly once.

    Names the rows or the ranges that none or several of them cover. ``steps``, of ``step_budget``, bounds the work
    over all tensors of a checkpoint.
    """
    for box in boxes:
        if not len(box.offsets) == len(box.sizes) == len(shape):
            raise FormatError(f"{quoted(key)}: a chunk at {_list(box.offsets)} of size {_list(box.sizes)} "
                              f"has not the {len(shape)} dimensions of the tensor")  # fmt: skip
        if any(at + n > size for at, n, size in zip(box.offsets, box.sizes, shape, strict=True)):
            raise FormatError(f"{quoted(key)}: a chunk at {_list(box.offsets)} of size {_list(box.sizes)} "
                              f"reaches outside the shape {_list(shape)}")  # fmt: skip
    if 0 not in shape:
        _check_inside(
            key, shape, boxes, [index for index, box in enumerate(boxes) if 0 not in box.sizes], [], steps=steps
        )


def _check_inside(
    key: str, shape: tuple[int, ...], boxes: Sequence[Box], among: list[int], ranges: list[tuple[int, int]],
    *, steps: list[int],
) -> None:  # fmt: skip
    dim = len(ranges)
    if len(among) == 1 and boxes[among[0]].sizes[dim:] == shape[dim:]:
        return
    if not among or dim == len(shape):
        covered = "no chunk" if not among else f"{len(among)} chunks"
        raise FormatError(f"{quoted(key)}: {_ranges(ranges, shape)} covered by {covered}")
    for start, stop, inside in _slabs(boxes, among, dim, shape[dim]):
        steps[0] -= 1 + len(inside)
        if steps[0] < 0:
            raise FormatError(f"{quoted(key)}: its chunks cut each other into too many pieces to be checked")
        _check_inside(key, shape, boxes, inside, [*ranges, (start, stop)], steps=steps)


def _ranges(ranges: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> str:
    if not ranges:
        return "its only element is" if not shape else "the whole tensor is"
    parts = []
    one = True
    for dim, (start, stop) in enumerate(ranges):
        if dim > 0 and (start, stop) == (0, shape[dim]):
            continue
        noun = "row" if dim == 0 else "column" if len(shape) == 2 else "index"
        single = stop - start == 1
        one = one and single
        plural = noun if single else "indices" if noun == "index" else f"{noun}s"
        span = f"{start}" if single else f"{start}-{stop - 1}"
        parts.append(f"{plural} {span}" + (f" of dimension {dim}" if noun == "index" else ""))
    return f"{', '.join(parts)} {'is' if one and len(parts) == 1 else 'are'}"


def _list(numbers: Sequence[int]) -> str:
    return str(list(numbers))[:80]


@dataclass(frozen=True, slots=True)
class InMemory:
    """A region that is there already."""

    data: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[memoryview]:
        """Yield all of it."""
        yield self.data

    def slice(self, start: int, nbytes: int) -> InMemory:
        """Return a part of it."""
        return InMemory(self.data[start : start + nbytes])


class Block(NamedTuple):
    """A box and its bytes: row-major, looked for only when they are asked for."""

    box: Box
    open: Callable[[], Payload]


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """The region that a tensor's blocks make up; ``check_cover`` has passed them, and none of them is empty.

    ``width`` is the bytes of an element.
    """

    shape: tuple[int, ...]
    width: int
    blocks: tuple[Block, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.width

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return the whole: the stored bytes themselves where they lie in one block, and never a part."""
        if start or nbytes != self.nbytes:
            raise ValueError(f"bytes {start}-{start + nbytes} of a tensor in blocks, which is read as a whole")
        return self.blocks[0].open() if len(self.blocks) == 1 else self

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the bytes in row-major order; memory is bounded by a few pieces, not by the tensor."""
        if self.nbytes:
            yield from _Assembly(self).emit(0, list(range(len(self.blocks))))


class _Assembly:
    """One reading of a tensor: how far each block has been consumed."""

    def __init__(self, tensor: BlockTensor) -> None:
        self.shape, self.width, self.blocks = tensor.shape, tensor.width, tensor.blocks
        self.boxes = [block.box for block in tensor.blocks]
        self.regions: dict[int, Region] = {}
        self.done = [0] * len(tensor.blocks)
        self.buffer = bytearray()

    def emit(self, dim: int, among: list[int]) -> Iterator[bytes | bytearray | memoryview]:
        """Yield what lies inside the given blocks, at one index of each dimension before ``dim``."""
        if len(among) == 1 and self.boxes[among[0]].sizes[dim:] == self.shape[dim:]:
            yield from self.take(among[0], math.prod(self.shape[dim:]) * self.width).chunks()
            return
        row = math.prod(self.shape[dim + 1 :]) * self.width
        for start, stop, inside in _slabs(self.boxes, among, dim, self.shape[dim]):
            if len(inside) == 1 and self.boxes[inside[0]].sizes[dim + 1 :] == self.shape[dim + 1 :]:
                yield from self.take(inside[0], (stop - start) * row).chunks()
            elif row > CHUNK:
                for _ in range(start, stop):
                    yield from self.emit(dim + 1, inside)
            else:
                for first in range(start, stop, CHUNK // row):
                    yield self.weave(dim, inside, min(CHUNK // row, stop - first), row)

    def take(self, index: int, nbytes: int) -> Payload:
        """Return the next bytes of a block."""
        if index not in self.regions:
            payload = self.blocks[index].open()
            if nbytes == payload.nbytes:
                return payload
            # What cannot be read in part, such as a shard of a transposed tensor, is read once and kept until used up.
            self.regions[index] = payload if is_seekable(payload) else InMemory(memoryview(_joined(payload)))
        region, start = self.regions[index], self.done[index]
        self.done[index] += nbytes
        if self.done[index] == region.nbytes:
            del self.regions[index]
        return region.slice(start, nbytes)

    def weave(self, dim: int, inside: list[int], rows: int, row: int) -> memoryview:
        """Return ``rows`` rows that several blocks share, put together in one buffer."""
        if len(self.buffer) < rows * row:
            self.buffer = bytearray(rows * row)
        out = memoryview(self.buffer)[: rows * row]
        steps = [math.prod(self.shape[inner + 1 :]) * self.width for inner in range(dim, len(self.shape))]
        for index in inside:
            offsets, sizes = self.boxes[index].offsets[dim + 1 :], (rows, *self.boxes[index].sizes[dim + 1 :])
            count = math.prod(sizes) * self.width
            data = memoryview(_joined(self.take(index, count)))
            at = sum(offset * step for offset, step in zip(offsets, steps[1:], strict=True))
            of = [step * self.width for step in row_major(sizes)]
            move(out[at:], data, *loops_of(sizes, steps, of, self.width))
        return out


def _joined(payload: Payload) -> bytes:
    return b"".join(bytes(piece) for piece in payload.chunks())
