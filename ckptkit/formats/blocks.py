"""A tensor that is stored as blocks: whether they cover it exactly, and its bytes put together from theirs.

Both walk the blocks in the same way: along one dimension in slabs between which the set of blocks changes, and inside
a slab along the next dimension. The elements of a block are needed in the order in which it stores them, so each
block is read once, from its first byte to its last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from ckptkit.core.checkpoint import Payload, row_major
from ckptkit.core.files import CHUNK, Region, seekable
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import loops_of, move

__all__ = ["Block", "BlockTensor", "Box", "InMemory", "check_cover", "step_budget"]

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
            self.regions[index] = payload if seekable(payload) else InMemory(memoryview(_joined(payload)))
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
