"""What DeepSpeed's files say of a ZeRO checkpoint: taken from their inert trees, each thing of its right kind."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Self

from ckptkit.core.checkpoint import DTYPES, Payload, TensorInfo
from ckptkit.core.files import Region
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Block, BlockTensor, Box, InMemory
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import type_name

__all__ = [
    "ModelStates",
    "OptimStates",
    "Piece",
    "Place",
    "Shapes",
    "Vector",
    "joined",
    "model_states",
    "optim_states",
    "parts_of_one",
    "parts_of_vector",
    "whole",
]


Shapes = Mapping[str, tuple[int, ...]]
_PARTS = "optimizer_state_dict"
_LARGEST = 2**62
_MOST_DIMENSIONS = 1024


@dataclass(frozen=True, slots=True)
class ModelStates:
    """One file of model states: the names and shapes of what the ranks hold in parts, and what it holds whole."""

    tree: Mapping[object, object]
    module: Mapping[object, object]
    whole: Mapping[str, TensorRef]  # by name, those of the module that have elements
    groups: tuple[Shapes, ...]
    frozen: Shapes
    fragments: Mapping[str, TensorRef]
    shared: Mapping[str, str]  # a name, and the name whose weight it shares
    step: int | None


@dataclass(frozen=True, slots=True)
class OptimStates:
    """One rank's file of optimizer states: its part of each group of fp32 weights."""

    stage3: bool
    parts: tuple[TensorRef, ...]
    count: int  # of ranks
    paddings: tuple[tuple[int, ...], ...] | None  # elements behind each parameter, by group
    steps: Mapping[str, object]  # of the optimizer, by place


def model_states(tree: object) -> ModelStates:
    """Return what a file of model states says; raises ``FormatError`` where it is none of ZeRO."""
    top = _mapping(tree, "the file")
    missing = [key for key in ("module", "param_shapes") if key not in top]
    if missing:
        raise FormatError(f"is no file of model states of ZeRO: it has no {missing[0]}")
    module = _mapping(top["module"], "module")
    groups = top["param_shapes"]
    if not isinstance(groups, list | tuple):
        raise FormatError(f"param_shapes is no list but {quoted(type_name(groups))}")
    fragments = _mapping(top.get("frozen_param_fragments") or {}, "frozen_param_fragments")
    shared = _mapping(top.get("shared_params") or {}, "shared_params")
    step = top.get("global_steps")
    return ModelStates(
        tree=top,
        module=module,
        whole={
            name: value
            for name, value in module.items()
            if isinstance(name, str) and isinstance(value, TensorRef) and 0 not in value.shape
        },
        groups=tuple(_shapes(group) for group in groups),
        frozen=_shapes(top.get("frozen_param_shapes") or {}),
        fragments={str(name): value for name, value in fragments.items() if isinstance(value, TensorRef)},
        shared={one: two for one, two in shared.items() if isinstance(one, str) and isinstance(two, str)},
        step=step if type(step) is int and 0 <= step < _LARGEST else None,
    )


def optim_states(tree: object) -> OptimStates:
    """Return what a rank's file of optimizer states says; raises ``FormatError`` where it is none of ZeRO."""
    states = _mapping(_mapping(tree, "the file").get(_PARTS), _PARTS)
    stage3 = "fp32_flat_groups" in states
    key = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
    parts = states.get(key)
    if not isinstance(parts, list | tuple) or not all(isinstance(part, TensorRef) for part in parts):
        raise FormatError(f"holds no fp32 weights: {_PARTS} has no list {key} of tensors")
    stated = states.get("partition_count")
    counts: Sequence[Any] = stated if isinstance(stated, list | tuple) else [stated]
    if not counts or not all(type(n) is int and 0 < n < _LARGEST for n in counts):
        raise FormatError(f"{_PARTS} has no partition_count")
    if len(set(counts)) > 1:
        raise FormatError(
            "its groups are cut among different numbers of ranks, as those of experts are: not read",
            hint="ds_to_universal.py of DeepSpeed converts it",
        )
    return OptimStates(stage3, tuple(parts), counts[0], _paddings(states), dict(_steps(states)))


def _mapping(value: object, what: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise FormatError(f"{what} is no mapping but {quoted(type_name(value))}")
    return value


def _shapes(value: object) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _mapping(value, "param_shapes").items():
        sizes = tuple(shape) if isinstance(shape, list | tuple) and len(shape) <= _MOST_DIMENSIONS else None
        if not isinstance(name, str) or sizes is None or not all(type(n) is int and 0 <= n < _LARGEST for n in sizes):
            raise FormatError(f"param_shapes has no shape for {quoted(str(name))}")
        if math.prod(size or 1 for size in sizes) >= _LARGEST:
            raise FormatError(f"{quoted(name)}: the shape {str(list(sizes))[:80]} overflows")
        shapes[name] = sizes
    return shapes


def _paddings(states: Mapping[object, object]) -> tuple[tuple[int, ...], ...] | None:
    groups = states.get("param_alignment_paddings")
    if groups is None:
        return None
    if not isinstance(groups, list | tuple) or not all(
        isinstance(group, list | tuple) and all(type(n) is int and 0 <= n < _LARGEST for n in group) for group in groups
    ):
        raise FormatError("param_alignment_paddings are no lists of numbers")
    return tuple(tuple(group) for group in groups)


def _steps(states: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    # The optimizer's own state has the key "base_optimizer_state" in the first two stages.
    base = states.get("base_optimizer_state", states.get(_PARTS))
    inner = base.get("state") if isinstance(base, Mapping) else None
    for key, state in inner.items() if isinstance(inner, Mapping) else ():
        step = state.get("step") if isinstance(state, Mapping) else None
        if type(step) is int or (isinstance(step, TensorRef) and not step.shape):
            yield str(key), step


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
