"""Distributed checkpoints for the tests: written by torch itself, by two real ranks, or cut as a test wants it."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import start_processes

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.places import folder_at
from ckptkit.errors import CkptkitError
from ckptkit.formats.distributed import dcp
from ckptkit.wrappers.envelopes import WEIGHTS, Selection
from tests.features import Replicate, Shard, distribute_tensor, has_module
from tests.helpers_cli import ROOT

Cut = tuple[Sequence[int], Sequence[int]]  # offsets and sizes of a chunk


def open_dcp(path: str, selection: Selection = WEIGHTS) -> Checkpoint:
    """Open a folder by the reader of DCP, without looking for other formats in it."""
    return dcp.open_dcp(folder_at(path), selection)


def save(path: Path, state: Mapping[str, Any]) -> str:
    """Write ``state`` as one process without a group does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ", UserWarning)
        save_distributed(dict(state), checkpoint_id=str(path))
    return str(path)


def loaded(path: str, tmp_path: Path) -> Any:
    """The whole nested state, as torch's own converter reads it."""
    target = tmp_path / "converted.pt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental", UserWarning)
        warnings.filterwarnings("ignore", "You are using `torch.load` with", FutureWarning)
        dcp_to_torch_save(path, target)
    return torch.load(target, weights_only=False)


def metadata_of(path: str) -> Any:
    return pickle.loads((Path(path) / ".metadata").read_bytes())


def put_metadata(path: str, metadata: object) -> str:
    (Path(path) / ".metadata").write_bytes(pickle.dumps(metadata, 4))
    return path


def edit(path: str, change: Callable[[Any], object]) -> str:
    """Change the metadata of a checkpoint, as torch reads and writes it."""
    metadata = metadata_of(path)
    change(metadata)
    return put_metadata(path, metadata)


def read_all(path: str, key: str = "") -> dict[str, bytes]:
    with open_dcp(path, Selection(key)) as checkpoint:
        return {name: checkpoint.read_bytes(name) for name in checkpoint}


def refusal(path: str, key: str = "") -> CkptkitError:
    """The error of opening a distributed checkpoint and of reading everything in it: one line that names a file."""
    with pytest.raises(CkptkitError) as caught:
        read_all(path, key)
    assert caught.value.path
    assert caught.value.path.startswith(path)
    assert "\n" not in str(caught.value)
    return caught.value


def write_cut(path: Path, tensors: Mapping[str, tuple[torch.Tensor, Sequence[Cut]]], files: int = 2) -> str:
    """Write each tensor in the chunks given, spread over ``files`` files: what as many ranks would write."""
    path.mkdir()
    contents = [io.BytesIO() for _ in range(files)]
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, (tensor, cuts) in tensors.items():
        chunks = []
        for number, (offsets, sizes) in enumerate(cuts):
            part = tensor[tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))]
            file = number % files
            begin = contents[file].seek(0, io.SEEK_END)
            contents[file].write(archive(part.clone()))
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            length = contents[file].tell() - begin
            places[MetadataIndex(key, offsets, number)] = _StorageInfo(f"__{file}_0.distcp", begin, length)
        described[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
    for file, content in enumerate(contents):
        (path / f"__{file}_0.distcp").write_bytes(content.getvalue())
    metadata = Metadata(described, {key: (key,) for key in tensors}, places)
    if hasattr(metadata, "version"):
        metadata.version = "1.0.0"
    return put_metadata(str(path), metadata)


def archive(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


# --- two real ranks --------------------------------------------------------------------------------------------------

RANKS = 2
FILE_OF = {"rows": 1, "columns": 2, "one row": 1, "whole": 2, "plain": 2, "conv": 1, "transposed": 1, "half": 2}


def full_tensors() -> dict[str, torch.Tensor]:
    """What the ranks hold together."""
    count = torch.arange(1000, dtype=torch.float32)
    return {
        "rows": count[:21].reshape(7, 3),
        "columns": count[:24].reshape(4, 6),
        "one row": count[:3].reshape(1, 3),
        "whole": count[:4].reshape(2, 2),
        "plain": count[:5],
        "conv": count[:120].reshape(5, 6, 2, 2),
        "transposed": count[:40].reshape(8, 5).T,
        "half": count[:33].reshape(11, 3).to(torch.bfloat16),
    }


def save_by_ranks(directory: Path) -> None:
    """Write ``full_tensors`` from two processes: ``dcp`` in the form of DCP, ``safetensors`` in its other form."""
    # A process without threads, so that the ranks can be copies of it, and torch is loaded once.
    subprocess.run([sys.executable, "-m", "tests.helpers_dcp", str(directory)], cwd=ROOT, check=True)


def _rank(rank: int, directory: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    full = full_tensors()
    places = {"whole": Replicate(), "columns": Shard(1), "conv": Shard(1), "transposed": Shard(1)}
    state: dict[str, Any] = {
        key: tensor if key == "plain" else distribute_tensor(tensor, mesh, [places.get(key, Shard(0))])
        for key, tensor in full.items()
    }
    save_distributed({"model": state, "step": 3, "lr": [0.5, 2.0]}, checkpoint_id=f"{directory}/dcp")
    if has_module("torch.distributed.checkpoint.hf_storage"):
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        writer = HuggingFaceStorageWriter(
            f"{directory}/safetensors", save_distributed=True, fqn_to_index_mapping=dict(FILE_OF)
        )
        save_distributed(dict(state), storage_writer=writer)
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(_rank, (sys.argv[1],), nprocs=RANKS, start_method="fork")  # type: ignore[no-untyped-call]
