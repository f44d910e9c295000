"""``load_into`` fills the local shard of a DTensor, for every kind of placement."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import fsdp, get_rank
from torch.distributed.device_mesh import init_device_mesh

from ckptkit import diff, load_into, parse_rules
from ckptkit.errors import ModelError
from tests.features import Replicate, Shard, distribute_tensor, fully_shard, require
from tests.helpers_outputs import raw
from tests.helpers_ranks import rank_of

pytestmark = pytest.mark.skipif(
    "src_data_rank" not in inspect.signature(distribute_tensor).parameters,
    reason="this torch cannot distribute a tensor without communication",
)
SHAPE = (5, 4, 3)
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((2,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "the last dim": ((2,), (Shard(2),)),
    "a copy each": ((2,), (Replicate(),)),
    "rows of copies": ((2, 2), (Replicate(), Shard(0))),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "rows twice": ((2, 2), (Shard(0), Shard(0))),
    "more ranks than rows": ((8,), (Shard(0),)),
}  # fmt: skip


def sharded(tensor: torch.Tensor, shape: tuple[int, ...], placements: tuple[Any, ...]) -> Any:
    # DTensor keeps meshes in a cache by their names, and this process is another rank each time.
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"{get_rank()}-{dim}" for dim in range(len(shape))))
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def holder(value: Any) -> nn.Module:
    model = nn.Module()
    model.w = nn.Parameter(value)
    model.kept = nn.Parameter(torch.ones(2))
    return model


@pytest.mark.parametrize("kind", ["file", "memory", "rule"])
@pytest.mark.parametrize(("shape", "placements"), PLACEMENTS.values(), ids=PLACEMENTS)
def test_each_rank_gets_its_part(
    shape: tuple[int, ...], placements: tuple[Any, ...], kind: str, tmp_path: Path
) -> None:
    """The local shard is that of a tensor that torch distributes, from a file, from memory, and by an operation."""
    whole = torch.arange(60, dtype=torch.float64).reshape(SHAPE)
    rules = None
    source: Any = {"w": whole}
    if kind == "file":
        save_file(source, tmp_path / "a.safetensors")
        source = tmp_path / "a.safetensors"
    if kind == "rule":
        source = {"w": whole.permute(2, 0, 1).contiguous()}
        rules = parse_rules(file={"rule": [{"from": "w", "to": "w", "op": {"permute": {"dims": [1, 2, 0]}}}]})
    world = int(torch.tensor(shape).prod())
    for rank in range(world):
        with rank_of(rank, world):
            model: Any = holder(sharded(torch.zeros(SHAPE), shape, placements))
            report = load_into(model, source, rules)
            assert (report.loaded, report.kept) == (("w",), ("kept",))
            assert raw(model.w.to_local()) == raw(sharded(whole.float(), shape, placements).to_local())


def test_assign_refuses_shards() -> None:
    """It would put a whole tensor where a shard was; memory that is given first is filled, as the hint says."""
    with rank_of(0, 2):
        model: Any = holder(sharded(torch.zeros(SHAPE), (2,), (Shard(0),))).to("meta")
        with pytest.raises(ModelError, match=r"'w' is a DTensor.*call model\.to_empty\(device=\.\.\.\), and load"):
            load_into(model, {"w": torch.ones(SHAPE), "kept": torch.ones(2)}, assign=True)
        load_into(model.to_empty(device="cpu"), {"w": torch.ones(SHAPE), "kept": torch.ones(2)})
        assert model.w.to_local().eq(1).all()


def test_a_kept_shard_keeps_its_values() -> None:
    """A DTensor that is not loaded does not hinder the load of others."""
    with rank_of(0, 2):
        model: Any = holder(sharded(torch.full(SHAPE, 3.0), (2,), (Shard(0),)))
        report = load_into(model, {"kept": torch.zeros(2)})
        assert (report.loaded, report.kept) == (("kept",), ("w",))
        assert model.w.to_local().eq(3).all()


class Renaming(nn.Linear):
    """A layer that was saved with another name of its weight, and that keeps the one it was built with."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        register: Any = self._register_load_state_dict_pre_hook
        register(self._rename)

    def _rename(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}old")


def test_a_sharded_layer_with_own_code_decides() -> None:
    """``diff`` asks a copy with whole tensors, and ``load_into`` gives the code a shard; each rank has its rows."""
    require(fsdp, "fully_shard")
    state = {"0.old": torch.randn(6, 4), "0.bias": torch.randn(6)}
    for rank in range(2):
        with rank_of(rank, 2):
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(f"{rank}-sharded",))
            model: Any = nn.Sequential(Renaming())
            fully_shard(model[0], mesh=mesh)
            result = diff(model, state)
            assert (result.loads_strict, result.undecided, result.moved) == (True, "", {"0.weight": "0.old"})
            assert load_into(model, state).kept == ()
            assert torch.equal(model[0].weight.to_local(), state["0.old"].chunk(2)[rank])


class Outer(nn.Module):
    """Loads old names by a hook of the whole model, whose parts are sharded one by one, and as one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        register: Any = self._register_load_state_dict_pre_hook
        register(self._rename)

    def _rename(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[f"{prefix}first.{key.removeprefix(f'{prefix}old.')}"] = state.pop(key)


def test_a_sharded_model_with_own_code_has_the_verdict_of_the_whole_model() -> None:
    """The hooks of ``fully_shard`` are left out of the copy, and those of the model itself are not."""
    require(fsdp, "fully_shard")
    whole = Outer()
    own = whole.state_dict()
    old = {key.replace("first", "old"): value for key, value in own.items()}
    variants = own, old, dict(list(own.items())[1:]), {**own, "more": torch.ones(1)}
    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("whole",))
        model: Any = Outer()
        for part in (model.first, model.rest, model):
            fully_shard(part, mesh=mesh)
        for state in variants:
            here, there = diff(whole, state), diff(model, state)
            assert there.undecided == ""
            for name in ("loads_strict", "loads", "moved", "coverage"):
                assert getattr(here, name) == getattr(there, name)
            assert [info.key for info in here.missing] == [info.key for info in there.missing]
