"""The part of a tensor that this process holds, where the model is distributed over several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from ckptkit.core.checkpoint import Payload, TensorInfo, part_of, row_major
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Region
from ckptkit.core.torch_bridge import is_dtensor, is_plain
from ckptkit.core.torch_types import Tensor

__all__ = ["LocalPart", "held_memory", "like_dtensor", "local_part", "region_of"]


@dataclass(frozen=True, slots=True)
class LocalPart:
    """The place of a local shard in the whole tensor: its first index and its size in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def local_part(tensor: Any) -> LocalPart:
    """Return the place of the local shard of a DTensor, also where its mesh shards and replicates."""
    # The writer of torch's own distributed checkpoints asks this function, which knows every kind of placement.
    from torch.distributed.checkpoint.planner_helpers import _create_chunk_from_dtensor

    chunk = _create_chunk_from_dtensor(tensor)
    if len(chunk.offsets) < tensor.dim():  # this process is not in the mesh
        return LocalPart((0,) * tensor.dim(), (0,) * tensor.dim())
    return LocalPart(tuple(chunk.offsets), tuple(chunk.sizes))


def held_memory(tensor: Tensor) -> Tensor | None:
    """Return the plain tensor that a tensor of a model holds here: itself, or its local shard; None if it has none."""
    if is_dtensor(tensor):
        tensor = tensor._local_tensor  # noqa: SLF001 - to_local() makes a node of the graph of autograd
    return tensor if is_plain(tensor) and not tensor.is_meta else None


def like_dtensor(local: Tensor, tensor: Any) -> Tensor:
    """Return a DTensor with the places of ``tensor``, and ``local`` as the local shard."""
    shard: Tensor = type(tensor.detach()).from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return shard


def region_of(payload: Payload, info: TensorInfo, part: LocalPart) -> Payload | None:
    """Return the bytes of a part of a tensor, of which only this part is read; None where the whole must be read."""
    bits = DTYPES[info.dtype].bits
    if bits % 8:
        return None
    runs = tuple((first * bits // 8, count * bits // 8) for first, count in _runs(info.shape, part))
    if len(runs) == 1:
        return part_of(payload, *runs[0])
    return _Region(payload, runs) if _has_slices(payload) else None


def _has_slices(payload: Payload) -> TypeGuard[Region]:
    return hasattr(payload, "slice")


@dataclass(frozen=True, slots=True)
class _Region:
    """Some ranges of bytes of a payload, one after the other."""

    whole: Region
    runs: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.runs)

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        for first, nbytes in self.runs:
            yield from self.whole.slice(first, nbytes).chunks()


def _runs(shape: tuple[int, ...], part: LocalPart) -> Iterator[tuple[int, int]]:
    """Yield the ranges of elements that a box covers, in row-major order: the first element and the number."""
    if not math.prod(part.sizes):
        return
    steps = row_major(shape)
    split = len(shape)  # the box has all of each dimension from here on
    while split and part.sizes[split - 1] == shape[split - 1]:
        split -= 1
    outer = max(split - 1, 0)
    count = math.prod(part.sizes[outer:])
    first = sum(at * step for at, step in zip(part.offsets, steps, strict=True))
    for index in itertools.product(*(range(size) for size in part.sizes[:outer])):
        yield first + sum(at * step for at, step in zip(index, steps, strict=False)), count
