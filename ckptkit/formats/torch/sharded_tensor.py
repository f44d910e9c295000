"""Find the pieces of a ShardedTensor of torch (FSDP1). A pickle stores each local shard with its offsets and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from ckptkit.errors import FormatError
from ckptkit.formats.layout import Box
from ckptkit.formats.pickle.values import Placeholder
from ckptkit.formats.torch.objects import TensorRef

__all__ = ["SHARDED", "Shard", "read_shards"]

SHARDED: Final = "sharded"  # the kind of a tensor if the file holds only some of its shards
_MOST_SHARDS = 64  # of one tensor in one file
_MOST_SLOTS = 64
_MOST_DIMENSIONS = 1024
_LARGEST = 2**62


class Shard(NamedTuple):
    """A piece of a tensor, and the tensor with its elements."""

    box: Box
    tensor: TensorRef


def read_shards(tensor: TensorRef) -> list[Shard]:
    """Return the shards that a file holds of a ShardedTensor. Raises ``FormatError`` for shards that are not read."""
    shards = tensor.spec
    if not isinstance(shards, list) or len(shards) > _MOST_SHARDS:
        raise FormatError("shards that are not read")
    return [_read_shard(shard, len(tensor.shape)) for shard in shards]


def _read_shard(value: object, dimensions: int) -> Shard:
    state = _slots(value)
    metadata = _slots(state.get("metadata"))
    offsets, sizes = (_numbers(metadata.get(name)) for name in ("shard_offsets", "shard_sizes"))
    local = state.get("tensor")
    if offsets is None or sizes is None or not len(offsets) == len(sizes) == dimensions:
        raise FormatError("a shard without offsets and sizes")
    if not isinstance(local, TensorRef) or local.kind != "dense":
        raise FormatError("a shard that is not a tensor")
    return Shard(Box(offsets, sizes), local)


def _slots(value: object) -> Mapping[object, object]:
    """Return the attributes of an object, which a pickle stores as a mapping, or as two mappings for slots."""
    state = value.state if isinstance(value, Placeholder) else None
    parts = state if isinstance(state, tuple) else (state,)
    short = (part for part in parts[:2] if isinstance(part, Mapping) and len(part) <= _MOST_SLOTS)
    return {key: item for part in short for key, item in part.items()}


def _numbers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list | tuple) or len(value) > _MOST_DIMENSIONS:
        return None
    if not all(type(n) is int and 0 <= n < _LARGEST for n in value):
        return None
    return tuple(value)
