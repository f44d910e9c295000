"""Vectors that lie in several files, and which ranges of them a tensor is made of: the arithmetic of ZeRO."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Self

from ckptkit.core.checkpoint import DTYPES, Payload, TensorInfo
from ckptkit.core.files import Region
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.formats.blocks import Block, BlockTensor, Box, InMemory

__all__ = ["Piece", "Place", "Vector", "joined", "parts_of_one", "parts_of_vector", "whole"]


@dataclass(frozen=True, slots=True)
class Vector:
    """Elements of one dtype, in regions one behind the other; ``ends`` says where each ends."""

    dtype: str
    regions: tuple[Region, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[tuple[TensorInfo, Region]]) -> Self:
        """Return the vector of these flat tensors; raises ``FormatError`` where their dtypes differ."""
        dtypes = {info.dtype for info, _ in parts}
        if len(dtypes) != 1 or DTYPES[min(dtypes)].bits < 8:
            raise FormatError(f"parts of one vector have the dtypes {', '.join(sorted(dtypes)) or 'of nothing'}")
        return cls(min(dtypes), tuple(region for _, region in parts), tuple(accumulate(i.elements for i, _ in parts)))

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.ends[-1]

    def cut(self, start: int, count: int) -> Iterator[tuple[Region, int, int]]:
        """Yield the regions that a range lies in, each with where in it to begin and how many elements to take."""
        index = bisect_right(self.ends, start)
        while count:
            begin = self.ends[index - 1] if index else 0
            taken = min(count, self.ends[index] - start)
            if taken:
                yield self.regions[index], start - begin, taken
            start, count, index = start + taken, count - taken, index + 1


class Piece(NamedTuple):
    """A range of a vector; the caller has checked that it is there."""

    vector: Vector
    start: int
    length: int


# dtype, shape, and the ranges that its elements are, in order
Place = tuple[str, tuple[int, ...], Callable[[], Iterable[Piece]]]


def joined(pieces: Iterable[Piece], dtype: str) -> Payload:
    """Return the bytes of the pieces, one behind the other; one that lies in one file is that file's own range."""
    width = DTYPES[dtype].bits // 8
    blocks: list[Block] = []
    at = 0
    for piece in pieces:
        for region, start, count in piece.vector.cut(piece.start, piece.length):
            blocks.append(Block(Box((at,), (count,)), partial(region.slice, start * width, count * width)))
            at += count
    if not blocks:
        return InMemory(memoryview(b""))
    return blocks[0].open() if len(blocks) == 1 else BlockTensor((at,), width, tuple(blocks))


def whole(vector: Vector, start: int, length: int) -> tuple[Piece]:
    """Return the one range that a tensor is."""
    return (Piece(vector, start, length),)


def _shares(ranks: Sequence[Vector], start: int, numel: int) -> Iterator[Piece]:
    share = -(-numel // len(ranks))
    for number, vector in enumerate(ranks):
        yield Piece(vector, start, min(share, max(numel - number * share, 0)))


def parts_of_vector(
    vector: Vector, shapes: Mapping[str, tuple[int, ...]], paddings: Sequence[int], ranks: int, what: str
) -> dict[str, Place]:
    """Return where each parameter lies in the vector of its group, as ZeRO-1 and 2 lay it out.

    ``paddings`` are the elements left out behind each. Raises ``FormatError`` naming the first parameter that reaches
    beyond the vector, and where more of it is left than the padding to twice the number of ranks explains.
    """
    made: dict[str, Place] = {}
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        numel = math.prod(shape)
        if at + numel > vector.length:
            raise FormatError(
                f"{quoted(name)}: elements {at:,} to {at + numel:,} of {what}, and the ranks hold {vector.length:,}"
            )
        made[name] = (vector.dtype, shape, partial(whole, vector, at, numel))
        at += numel + padding
    unit = 2 * ranks
    if -(-at // unit) != -(-vector.length // unit):
        raise FormatError(f"the ranks hold {vector.length:,} elements of {what}, and its parameters have {at:,}")
    return made


def parts_of_one(ranks: Sequence[Vector], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return where each parameter lies in the vectors of all ranks, as ZeRO-3 cuts it: evenly, the last part padded."""
    made: dict[str, Place] = {}
    at = 0
    shortest = min(range(len(ranks)), key=lambda number: ranks[number].length)
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = -(-numel // len(ranks))
        if at + share > (held := ranks[shortest].length):
            raise FormatError(
                f"{quoted(name)}: elements {at:,} to {at + share:,} of rank {shortest}, which holds {held:,}"
            )
        made[name] = (ranks[0].dtype, shape, partial(_shares, ranks, at, numel))
        at += share
    for number, vector in enumerate(ranks):
        if at != vector.length:
            raise FormatError(f"rank {number} holds {vector.length:,} elements, and its parameters have {at:,}")
    return made
