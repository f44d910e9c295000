"""Splitting an output into shards: from sizes alone, before a byte is written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ckptkit.core.checkpoint import TensorInfo

__all__ = ["Shard", "is_part_name", "is_shard_name", "split_into_shards", "weight_index"]

_INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_PART = re.compile(r".+-\d{5}-of-\d{5}\.\w+|.+\.index\.json")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a sharded checkpoint, and the tensors in it."""

    name: str
    infos: tuple[TensorInfo, ...]


def is_shard_name(name: str) -> bool:
    """Return whether a file of this name would be stale beside new shards."""
    return _OURS.fullmatch(name) is not None


def is_part_name(name: str) -> bool:
    """Return whether a file of this name would be taken for a part of the sharded checkpoint that it lies beside."""
    return _PART.fullmatch(name) is not None


def split_into_shards(infos: Sequence[TensorInfo], max_bytes: int) -> tuple[Shard, ...]:
    """Return shards of at most ``max_bytes`` of tensors each, in order; a larger tensor gets one of its own."""
    parts: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if parts[-1] and size + info.nbytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(info)
        size += info.nbytes
    if len(parts) == 1:
        return (Shard("model.safetensors", tuple(parts[0])),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", tuple(part))
        for number, part in enumerate(parts, start=1)
    )


def weight_index(shards: Sequence[Shard]) -> tuple[str, bytes]:
    """Return the name and the bytes of the index over these shards, as Hugging Face libraries read it."""
    weight_map = {info.key: shard.name for shard in shards for info in shard.infos}
    total = sum(info.nbytes for shard in shards for info in shard.infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return _INDEX, (json.dumps(index, indent=2) + "\n").encode()
