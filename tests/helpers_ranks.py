"""Files that the ranks of a run save, made in one process: each rank in turn joins a group that never communicates."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.features import DTensor, Placement, distribute_tensor

Placed = Mapping[str, tuple[torch.Tensor, str, tuple[Placement, ...]]]


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """Make this process the given rank of a group whose operations do nothing."""
    distributed.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def save_dtensors(
    directory: Path,
    shape: tuple[int, ...],
    placed: Placed,
    *,
    plain: Mapping[str, torch.Tensor] = {},
    name: str = "model_world_size_{world}_rank_{rank}.pt",
    wrap: Callable[[dict[str, torch.Tensor]], object] = lambda state: state,
) -> Path:
    """Write one file for each rank of a mesh of this shape. ``placed`` has a slice of the mesh and the placements."""
    directory.mkdir(parents=True, exist_ok=True)
    world = int(torch.tensor(shape).prod())
    names = ("dp", "tp")[: len(shape)]
    for rank in range(world):
        with rank_of(rank, world):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            state: dict[str, torch.Tensor] = {
                key: _local(tensor, mesh[part] if part else mesh, placements)
                for key, (tensor, part, placements) in placed.items()
            }
            torch.save(wrap(state | dict(plain or {})), directory / name.format(world=world, rank=rank))
    return directory


def save_sharded_tensors(directory: Path, world: int, whole: Mapping[str, torch.Tensor]) -> Path:
    """Write one file for each rank with a ShardedTensor for each tensor, cut by rows as FSDP1 cuts it."""
    directory.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        with rank_of(rank, world), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch asks for DTensor instead
            state = {key: _sharded(tensor, rank, world) for key, tensor in whole.items()}
            torch.save(state, directory / f"model_rank_{rank}.pt")
    return directory


def _sharded(tensor: torch.Tensor, rank: int, world: int) -> ShardedTensor:
    metadata, at = [], 0
    pieces = tensor.chunk(world)
    for owner, piece in enumerate(pieces):
        offsets = [at, *(0 for _ in tensor.shape[1:])]
        metadata.append(ShardMetadata(offsets, list(piece.shape), f"rank:{owner}/cpu"))
        at += len(piece)
    held = [Shard(pieces[rank].clone(), metadata[rank])] if rank < len(pieces) else []
    whole = ShardedTensorMetadata(metadata, tensor.shape, TensorProperties(dtype=tensor.dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(held, whole)


def _local(tensor: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """Return the part of this rank, which no other rank sends."""
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    part = tensor
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            parts, _ = placement._split_tensor(part, mesh.size(dim), with_padding=False)  # type: ignore[attr-defined]
            part = parts[mesh.get_local_rank(dim)]
    part = part.contiguous()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
