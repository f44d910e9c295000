"""Two ranks load what one writer wrote: ``torch.distributed.checkpoint.load`` into a model that FSDP2 sharded."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from ckptkit import choose_output, execute, open_checkpoint, parse_rules, plan_remap
from tests.features import fully_shard

RANKS = 2
PREFIXES = ("", "model.")  # training loops save the state_dict itself, or {"model": state_dict}


def network(seed: int) -> nn.Sequential:
    """Return a model with numbers of rows that two ranks cannot share evenly, and with buffers."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(5)
    norm.num_batches_tracked = torch.tensor(seed)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), norm, nn.Linear(5, 1))
    model.register_buffer("scale", torch.rand(()))
    return model


def rank(number: int, directory: str) -> None:
    """Load both checkpoints, each into a sharded model with other values, and compare each whole tensor."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=number, world_size=RANKS)
    for prefix in PREFIXES:
        load_and_compare(f"{directory}/out{prefix}", nested=bool(prefix))
    dist.destroy_process_group()


def load_and_compare(path: str, *, nested: bool) -> None:
    """Load one checkpoint: as the state_dict itself, or as ``{"model": state_dict}``."""
    mesh = init_device_mesh("cpu", (RANKS,))
    expected, model = network(3).state_dict(), network(4)
    for part in (model[1], model[3], model):
        fully_shard(part, mesh=mesh)
    state = get_model_state_dict(model)
    load_distributed({"model": state} if nested else state, checkpoint_id=path)
    set_model_state_dict(model, state)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert sum(hasattr(tensor, "full_tensor") for tensor in found.values()) == len(list(model.parameters()))
    for key, tensor in found.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(whole, expected[key]), key


def test_two_ranks_load_a_sharded_model(tmp_path: Path) -> None:
    """Each rank takes its rows of every tensor, from a checkpoint that one process wrote."""
    torch.save(network(3).state_dict(), tmp_path / "in.pt")
    for prefix in PREFIXES:
        with open_checkpoint(tmp_path / "in.pt") as checkpoint:
            plan = plan_remap(checkpoint, parse_rules(rename=[f"*={prefix}*"] if prefix else []))
            execute(plan, checkpoint, choose_output(tmp_path / f"out{prefix}", format="dcp"), verify=True)
    spawn(rank, (str(tmp_path),), nprocs=RANKS)  # type: ignore[no-untyped-call]
