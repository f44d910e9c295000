"""``load_into`` fills the shards of ``fully_shard`` on two processes, compared with a load of the whole model."""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from ckptkit import load_into
from tests.features import fully_shard

WORLD = 2
FORMATS = ("model.safetensors", "model.pt", "legacy.pt")


class Net(nn.Module):
    """A model whose rows do not divide by two, with batch norm and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)) for _ in range(2))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight


def build(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a model, gathered from all processes."""
    found: dict[str, Any] = dict(model.state_dict())
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in found.items()}


def same(model: nn.Module, path: str, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether a sharded model has the values that the whole model has after it is loaded."""
    whole = build(dtype)
    load_into(whole, path)
    found, expected = whole_values(model), whole.state_dict()
    return found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
    )


def each_format(directory: str) -> None:
    for name in FORMATS:
        for dtype in (torch.float32, torch.bfloat16):
            model = shard(build(dtype))
            before = dict(model.named_parameters())
            report = load_into(model, f"{directory}/{name}")
            assert (report.coverage, report.ok) == (1.0, True)
            assert all(parameter is before[key] for key, parameter in model.named_parameters())
            assert same(model, f"{directory}/{name}", dtype)


def from_meta(directory: str) -> None:
    with torch.device("meta"):
        empty = build()
    model = shard(empty).to_empty(device="cpu")
    load_into(model, f"{directory}/model.pt")
    assert same(model, f"{directory}/model.pt")


def with_a_hook(directory: str) -> None:
    seen: list[set[str]] = []
    model: Any = shard(build())
    model._register_load_state_dict_pre_hook(lambda *given: seen.append(set(given[1])), with_module=True)
    load_into(model, f"{directory}/model.pt", rollback=True)
    assert same(model, f"{directory}/model.pt")
    assert seen[-1] == set(build().state_dict())


def only_its_rows(directory: str) -> None:
    model = shard(nn.Sequential(OrderedDict(big=nn.Linear(512, 1024, bias=False), head=nn.Linear(3, 3))))
    kept = {key: value for key, value in whole_values(model).items() if key.startswith("head")}
    sizes: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return preadv(fd, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        report = load_into(model, f"{directory}/big.safetensors")
    assert report.kept == ("head.weight", "head.bias")
    assert sum(sizes) < 1024 * 512 * 4 * 0.6
    assert all(torch.equal(value, whole_values(model)[key]) for key, value in kept.items())
    torch.manual_seed(5)
    assert torch.equal(whole_values(model)["big.weight"], torch.randn(1024, 512))


PROMISES = (each_format, from_meta, with_a_hook, only_its_rows)


def work(rank: int, port: int, directory: str) -> None:
    distributed.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"tcp://127.0.0.1:{port}")
    try:
        for promise in PROMISES:
            promise(directory)
    finally:
        distributed.destroy_process_group()


def test_each_process_loads_its_shard(tmp_path: Path) -> None:
    """The shards together are the whole tensors, with casts, hooks and memory given later; each reads its rows only."""
    torch.manual_seed(3)
    state = {key: torch.randn_like(value) if value.is_floating_point() else value + 4
             for key, value in build().state_dict().items()}  # fmt: skip
    state["head.weight"] = state["embed.weight"]
    torch.save(state, tmp_path / "model.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file({key: value for key, value in state.items() if key != "head.weight"}, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    save_file({"big.weight": torch.randn(1024, 512)}, tmp_path / "big.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(work, (port, str(tmp_path)), WORLD)  # type: ignore[no-untyped-call]
