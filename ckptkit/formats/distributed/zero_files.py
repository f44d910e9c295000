"""Read the files of a DeepSpeed ZeRO checkpoint, check their types, and find the elements of each parameter."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple, Self

from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Region
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.formats.layout import Block, BlockTensor, Box, InMemory
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import type_name

__all__ = [
    "ModelStates",
    "OptimStates",
    "Parameter",
    "Shapes",
    "Vector",
    "VectorRange",
    "join_ranges",
    "join_shares",
    "one_range",
    "read_model_states",
    "read_optim_states",
    "split_vector",
]


Shapes = Mapping[str, tuple[int, ...]]
_PARTS = "optimizer_state_dict"
_LARGEST = 2**62
_MOST_DIMENSIONS = 1024


@dataclass(frozen=True, slots=True)
class ModelStates:
    """A file of model states: the shapes of the parameters that are split among the ranks, and unsplit tensors."""

    tree: Mapping[object, object]
    module: Mapping[object, object]
    whole: Mapping[str, TensorRef]  # tensors of the module that have elements
    groups: tuple[Shapes, ...]
    frozen: Shapes
    fragments: Mapping[str, TensorRef]
    shared: Mapping[str, str]  # key -> key of the parameter that it is tied to
    step: int | None


@dataclass(frozen=True, slots=True)
class OptimStates:
    """The file of optimizer states of one rank, with its partition of each group of fp32 weights."""

    stage3: bool
    parts: tuple[TensorRef, ...]
    count: int  # of ranks
    paddings: tuple[tuple[int, ...], ...] | None  # elements after each parameter, by group
    steps: Mapping[str, object]  # step of the optimizer, by its key in the state


def read_model_states(tree: object) -> ModelStates:
    """Return the content of a file of model states. Raises ``FormatError`` if ZeRO did not write the file."""
    top = _mapping(tree, "the file")
    missing = [key for key in ("module", "param_shapes") if key not in top]
    if missing:
        raise FormatError(f"is not a file of model states of ZeRO: {missing[0]} is missing")
    module = _mapping(top["module"], "module")
    groups = top["param_shapes"]
    if not isinstance(groups, list | tuple):
        raise FormatError(f"param_shapes is {quoted(type_name(groups))}, not a list")
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
        shared={key: other for key, other in shared.items() if isinstance(key, str) and isinstance(other, str)},
        step=step if type(step) is int and 0 <= step < _LARGEST else None,
    )


def read_optim_states(tree: object) -> OptimStates:
    """Return the content of a file of optimizer states. Raises ``FormatError`` if ZeRO did not write the file."""
    states = _mapping(_mapping(tree, "the file").get(_PARTS), _PARTS)
    stage3 = "fp32_flat_groups" in states
    key = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
    parts = states.get(key)
    if not isinstance(parts, list | tuple) or not all(isinstance(part, TensorRef) for part in parts):
        raise FormatError(f"holds no fp32 weights: {_PARTS} has no list {key} of tensors")
    stated = states.get("partition_count")
    counts: Sequence[object] = stated if isinstance(stated, list | tuple) else [stated]
    numbers = [count for count in counts if type(count) is int and 0 < count < _LARGEST]
    if not numbers or len(numbers) < len(counts):
        raise FormatError(f"{_PARTS} has no partition_count")
    if len(set(numbers)) > 1:
        raise FormatError(
            "groups are split among different numbers of ranks, as for experts, which is not supported",
            hint="ds_to_universal.py of DeepSpeed converts it",
        )
    return OptimStates(stage3, tuple(parts), numbers[0], _paddings(states), dict(_steps(states)))


def _mapping(value: object, what: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise FormatError(f"{what} is {quoted(type_name(value))}, not a mapping")
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
        raise FormatError("param_alignment_paddings is not a list of lists of numbers")
    return tuple(tuple(group) for group in groups)


def _steps(states: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    # The state of the wrapped optimizer has the key "base_optimizer_state" in the first two stages.
    base = states.get("base_optimizer_state", states.get(_PARTS))
    states_by_key = base.get("state") if isinstance(base, Mapping) else None
    for key, state in states_by_key.items() if isinstance(states_by_key, Mapping) else ():
        step = state.get("step") if isinstance(state, Mapping) else None
        if type(step) is int or (isinstance(step, TensorRef) and not step.shape):
            yield str(key), step


@dataclass(frozen=True, slots=True)
class Vector:
    """Elements of one dtype in consecutive regions; ``ends`` is the number of elements up to the end of each region."""

    dtype: str
    regions: tuple[Region, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[tuple[TensorInfo, Region]]) -> Self:
        """Return the vector of these flat tensors. Raises ``FormatError`` where their dtypes differ."""
        dtypes = {info.dtype for info, _ in parts}
        if len(dtypes) != 1 or DTYPES[min(dtypes)].bits < 8:
            raise FormatError(f"partitions of one vector have the dtypes {', '.join(sorted(dtypes)) or 'none'}")
        return cls(min(dtypes), tuple(region for _, region in parts), tuple(accumulate(i.elements for i, _ in parts)))

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.ends[-1]

    def cut(self, start: int, count: int) -> Iterator[tuple[Region, int, int]]:
        """Yield each region that holds elements of a range, the first such element in the region, and their number."""
        index = bisect_right(self.ends, start)
        while count:
            begin = self.ends[index - 1] if index else 0
            length = min(count, self.ends[index] - start)
            if length:
                yield self.regions[index], start - begin, length
            start, count, index = start + length, count - length, index + 1


class VectorRange(NamedTuple):
    """A range of elements, which must be inside the vector."""

    vector: Vector
    start: int
    length: int


# dtype, shape, and the ranges of its elements in order
Parameter = tuple[str, tuple[int, ...], Callable[[], Iterable[VectorRange]]]


def join_ranges(ranges: Iterable[VectorRange], dtype: str) -> Payload:
    """Return the bytes of consecutive ranges; a single part in one file becomes the range of that file."""
    width = DTYPES[dtype].bits // 8
    blocks: list[Block] = []
    at = 0
    for part in ranges:
        for region, start, count in part.vector.cut(part.start, part.length):
            blocks.append(Block(Box((at,), (count,)), partial(region.slice, start * width, count * width)))
            at += count
    if not blocks:
        return InMemory(memoryview(b""))
    return blocks[0].open() if len(blocks) == 1 else BlockTensor((at,), width, tuple(blocks))


def one_range(vector: Vector, start: int, length: int) -> tuple[VectorRange]:
    """Return the only part of a parameter whose elements are contiguous in the vector."""
    return (VectorRange(vector, start, length),)


def _shares(ranks: Sequence[Vector], start: int, numel: int) -> Iterator[VectorRange]:
    share = -(-numel // len(ranks))
    for number, vector in enumerate(ranks):
        yield VectorRange(vector, start, min(share, max(numel - number * share, 0)))


def split_vector(
    vector: Vector, shapes: Mapping[str, tuple[int, ...]], paddings: Sequence[int], ranks: int, what: str
) -> dict[str, Parameter]:
    """Return the parameters in the vector of their group, in the layout of ZeRO stages 1 and 2.

    ``paddings`` are the elements to skip after each parameter. Raises ``FormatError`` for a parameter that reaches
    beyond the vector, and if more elements are left than padding to a multiple of twice the number of ranks explains.
    """
    parameters: dict[str, Parameter] = {}
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        numel = math.prod(shape)
        if at + numel > vector.length:
            raise FormatError(
                f"{quoted(name)}: elements {at:,} to {at + numel:,} of {what}, but the ranks hold {vector.length:,}"
            )
        parameters[name] = (vector.dtype, shape, partial(one_range, vector, at, numel))
        at += numel + padding
    unit = 2 * ranks
    if -(-at // unit) != -(-vector.length // unit):
        raise FormatError(f"the ranks hold {vector.length:,} elements of {what}, but its parameters have {at:,}")
    return parameters


def join_shares(ranks: Sequence[Vector], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameter]:
    """Return the parameters in the vectors of all ranks, in the layout of ZeRO stage 3: equal shares, the last padded.

    Raises ``FormatError`` where the vector of a rank is too short or too long for the shapes.
    """
    parameters: dict[str, Parameter] = {}
    at = 0
    shortest = min(range(len(ranks)), key=lambda number: ranks[number].length)
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = -(-numel // len(ranks))
        if at + share > (held := ranks[shortest].length):
            raise FormatError(
                f"{quoted(name)}: elements {at:,} to {at + share:,} of rank {shortest}, which holds {held:,}"
            )
        parameters[name] = (ranks[0].dtype, shape, partial(_shares, ranks, at, numel))
        at += share
    for number, vector in enumerate(ranks):
        if at != vector.length:
            raise FormatError(f"rank {number} holds {vector.length:,} elements, but its parameters have {at:,}")
    return parameters
