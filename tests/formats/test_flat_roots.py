"""At the root of a file, a value that is known not to be weights becomes an entry and is named."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ckptkit.comparison import diff
from ckptkit.core.torch_optim import SCHEMAS
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.plans.execute import execute
from ckptkit.plans.remap import plan_remap
from ckptkit.wrappers.entries import GENERIC_SLOTS, SLOTS
from tests.helpers_dcp import save as save_dcp
from tests.helpers_formats import assert_same, bits, saved, write

NET = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
OPTIMIZER = torch.optim.AdamW(NET.parameters())
NET(torch.ones(5, 4)).sum().backward()
OPTIMIZER.step()
SD = dict(NET.state_dict())
COPY = {key: value.clone() for key, value in SD.items()}
STATE = OPTIMIZER.state_dict()
FLAT: dict[str, Any] = get_optimizer_state_dict(
    NET, OPTIMIZER, options=StateDictOptions(flatten_optimizer_state_dict=True)
)
NAMED = get_optimizer_state_dict(NET, OPTIMIZER)
SCHEDULER = torch.optim.lr_scheduler.StepLR(copy.deepcopy(OPTIMIZER), 1).state_dict()
ONES = torch.ones(3)
FIVE = torch.tensor(5)
TITAN = {
    "optimizer": FLAT, "lr_scheduler": {"last_epoch": 3}, "dataloader": {"dp_rank_0": b"z"},
    "train_state": {"step": FIVE, "global_avg_losses": [1.0]},
}  # fmt: skip

ENTRIES: dict[str, dict[str, Any]] = {
    "torchtitan": TITAN,
    "an optimizer": {"optimizer": STATE},
    "an optimizer by parameter names": {"optim": NAMED},
    "an optimizer of another name": {"foo": STATE},
    "optimizers in a list": {"optimizers": [STATE, STATE]},
    "optimizers in a mapping": {"states": {"generator": STATE, "discriminator": STATE}},
    "slots by parameter names": {"optimizer": {"m": COPY, "v": COPY, "t": 3}},
    "a scheduler": {"sched": SCHEDULER},
    "a gradient scaler": {"amp": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": FIVE}},
    "counters": {"step": FIVE, "epoch": torch.tensor([3]), "best_loss": torch.tensor(0.5)},
    "counters in a mapping": {"where": {"step": FIVE, "epoch": FIVE}},
    "random numbers": {"rng_state": torch.get_rng_state(), "cuda_rng_state": [torch.get_rng_state()]},
    "random numbers of numpy": {"numpy_state": ("MT19937", np.zeros(624, np.uint32), 624, 0, 0.0)},
    "an average": {"ema": COPY},
    "an average of another name": {"best_model_state": COPY},
    "an average in a wrapper": {"model_ema": {f"module.{key}": value for key, value in COPY.items()}},
    "an average with settings": {"ema": {"decay": 0.9, "num_updates": FIVE, "shadow": COPY}},
    "an average of the parameters": {"shadow": {key: SD[key] for key, _ in NET.named_parameters()}},
    "a copy of an unknown name": {"smoothed": COPY, "snapshots": [COPY, COPY]},
    "a copy and an optimizer": {"app": {"model": COPY, "optimizer": NAMED, "step": FIVE}},
    "an optimizer of unknown slots": {"foo": {"state": {0: {"preconditioner": ONES}}, "param_groups": [{"lr": 0.1}]}},
    "slots of all parameters": {"exp_avg": COPY, "grads": {key: SD[key] for key, _ in NET.named_parameters()}},
    "an average of torch_ema": {"ema": {"decay": 0.9, "num_updates": 3, "shadow_params": list(NET.parameters())}},
}  # fmt: skip


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES.keys())
def test_known_entries_beside_the_weights_are_left_out_and_named(tmp_path: Path, entries: dict[str, Any]) -> None:
    """Only the weights are tensors; each other key is one entry and is named in the warning, in pickles and in DCP."""
    with open_checkpoint(write(tmp_path, saved({**SD, **entries}))) as checkpoint:
        assert_same(checkpoint, SD)
        assert [entry.path for entry in checkpoint.entries] == list(entries)
        (warning,) = checkpoint.warnings
        assert [key for key in entries if f"'{key}' (" not in warning] == []
        assert not diff(NET, checkpoint).loads_strict  # as load_state_dict says of the object that torch.load returns
    save_dcp(tmp_path / "dcp", {**SD, **entries})
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        assert_same(checkpoint, SD)
        assert {entry.path for entry in checkpoint.entries} == set(entries)
        assert diff(NET, checkpoint).loads_strict  # torch reads only the keys of the model from such a directory


MODELS: dict[str, dict[str, torch.Tensor | dict[str, torch.Tensor]]] = {
    "a part of the model": {"conv.weight": ONES, "bn": {"weight": ONES, "bias": ONES}},
    "a part with the names of the root": {"weight": ONES, "bias": ONES, "norm": {"weight": ONES, "bias": ONES}},
    "a module called optimizer": {"conv.weight": ONES, "optimizer": {"weight": ONES, "bias": ONES}},
    "a module called scheduler": {"conv.weight": ONES, "scheduler": {"proj.weight": ONES}},
    "a module called scaler": {"conv.weight": ONES, "scaler": {"scale": ONES, "growth_factor": ONES}},
    "a module of buffers": {"conv.weight": ONES, "scheduler": {"betas": ONES}, "sampler": {"grid": ONES[None]}},
    "a second network": {**SD, "q2": COPY},
    "a module of the same class": {"lin.weight": ONES, "inner": {"lin.weight": ONES}},
    "parameters with such names": {"a.weight": ONES, "optimizer.weight": ONES, "step_embed.weight": ONES},
    "a step of other shapes": {"a.weight": ONES, "step": ONES, "epoch": torch.ones(1, 2)},
    "single numbers": {"a.weight": ONES, "logit_scale": FIVE, "scale": FIVE, "temperature": torch.ones(1)},
    "an EMA of other shapes": {**SD, "average": {"x": ONES}},
    "AveragedModel": {**{f"module.{key}": value for key, value in SD.items()}, "n_averaged": FIVE},
    "ema-pytorch": {"ema_model.a": ONES, "online_model.a": ONES, "initted": torch.tensor(True), "step": FIVE},
}


def flattened(tree: Mapping[str, torch.Tensor | Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        flat |= {key: value} if isinstance(value, torch.Tensor) else {f"{key}.{name}": t for name, t in value.items()}
    return flat


@pytest.mark.parametrize("tree", MODELS.values(), ids=MODELS.keys())
def test_parts_of_a_model_stay_weights(
    tmp_path: Path, tree: Mapping[str, torch.Tensor | Mapping[str, torch.Tensor]]
) -> None:
    """A name that is only similar to the name of an entry leaves out nothing."""
    with open_checkpoint(write(tmp_path, saved(tree))) as checkpoint:
        assert_same(checkpoint, flattened(tree))
        assert checkpoint.warnings == ()


@pytest.mark.parametrize("key", ["model", "whatever"])
def test_a_counter_beside_a_mapping_does_not_make_the_root_the_weights(tmp_path: Path, key: str) -> None:
    with open_checkpoint(write(tmp_path, saved({key: SD, "step": FIVE, "epoch": FIVE}))) as checkpoint:
        assert checkpoint.envelope == key
        assert_same(checkpoint, SD)
        assert [entry.path for entry in checkpoint.entries] == ["step", "epoch"]
        assert checkpoint.warnings == ()


def test_two_parts_beside_a_tensor_are_an_error_that_lists_both(tmp_path: Path) -> None:
    path = write(tmp_path, saved({"logit_scale": torch.tensor(1.0), "encoder": SD, "decoder": COPY}))
    with pytest.raises(FormatError, match=r"holds 2 mappings of weights: encoder .*, decoder"):
        open_checkpoint(path)


@pytest.mark.parametrize("other", [COPY, {"out.weight": ONES}], ids=["same names", "other names"])
@pytest.mark.parametrize("beside", [{}, {"step": FIVE}, {"optimizer": STATE}], ids=["alone", "step", "optimizer"])
def test_a_part_of_the_model_beside_other_weights_is_an_error_that_lists_both(
    tmp_path: Path, other: dict[str, Any], beside: dict[str, Any]
) -> None:
    path = write(tmp_path, saved({"policy": SD, "value": other, **beside}))
    with pytest.raises(FormatError, match=r"holds 2 mappings of weights: policy .*, value"):
        open_checkpoint(path)


def test_other_tensors_beside_an_optimizer_are_an_error_and_can_be_selected(tmp_path: Path) -> None:
    """The tensors of such a mapping can be weights, but its moments cannot."""
    app = {"net": {"out.weight": ONES}, "optimizer": STATE}
    path = write(tmp_path, saved({**SD, "app": app}))
    with pytest.raises(FormatError, match="in 'app' the state of an optimizer beside other tensors"):
        open_checkpoint(path)
    with open_checkpoint(f"{path}::app.net") as checkpoint:
        assert_same(checkpoint, app["net"])


@pytest.mark.parametrize("key", ["head", "callbacks"])
def test_a_mapping_of_tensors_beside_the_weights_is_named(tmp_path: Path, key: str) -> None:
    quiet = {"optimizer": STATE, "lr_scheduler": SCHEDULER, "losses": [FIVE, FIVE], "rng": torch.get_rng_state()}
    with open_checkpoint(write(tmp_path, saved({"model": SD, key: {"a": {"weight": ONES}}, **quiet}))) as checkpoint:
        assert_same(checkpoint, SD)
        assert checkpoint.warnings == (f"reads the weights in 'model', and no other tensors: '{key}'",)


def test_a_tensor_beside_the_mapping_of_weights_is_named(tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path, saved({"model": SD, "queue": ONES}))) as checkpoint:
        assert_same(checkpoint, SD)
        assert checkpoint.warnings == ("reads the weights in 'model', and no other tensors: 'queue'",)


def test_a_counter_in_the_state_dict_of_a_module_is_a_buffer(tmp_path: Path) -> None:
    """A state_dict is an OrderedDict; ``load_state_dict`` wants every tensor in it."""
    net = nn.Linear(2, 2)
    net.register_buffer("step", torch.tensor(5))
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    with open_checkpoint(path) as checkpoint:
        assert diff(net, checkpoint).loads_strict


def test_all_slots_of_torch_are_known() -> None:
    slots = {slot.name for schema in SCHEMAS.values() for slot in schema.slots}
    assert slots - SLOTS - GENERIC_SLOTS == set()


@pytest.mark.parametrize("prefix", ["", "optimizer.", "chained_0.optimizer."])
def test_flattened_optimizer_keys_are_left_out_of_every_format(tmp_path: Path, prefix: str) -> None:
    """The names of slots decide, before the name of the parameter (Megatron) or after it."""
    slots = {f"{prefix}{key}": value for key, value in FLAT.items() if isinstance(value, torch.Tensor)}
    slots |= {f"{prefix}state.exp_avg.{key}": value.clone() for key, value in SD.items()}
    module = {**SD, "optimizer.weight": ONES}
    save_file({**module, **slots}, tmp_path / "a.safetensors")
    torch.save({**module, **slots}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert {key: checkpoint.read_bytes(key) for key in checkpoint} == {
                key: bits(t) for key, t in module.items()
            }
            assert {entry.path for entry in checkpoint.entries} == set(slots)
            assert len(checkpoint.warnings) == 1
    save_file(slots, tmp_path / "alone.safetensors")
    with open_checkpoint(tmp_path / "alone.safetensors") as checkpoint:
        assert set(checkpoint) == set(slots)


def test_an_edited_file_keeps_its_entries(tmp_path: Path) -> None:
    """Renaming in place keeps the optimizer; a safetensors file has only the weights."""
    torch.save({**SD, **TITAN}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        plan = plan_remap(checkpoint, {"rule": [{"from": "0.*", "to": "first.*"}]})
        execute(plan, checkpoint, str(tmp_path / "b.pt"))
        execute(plan_remap(checkpoint), checkpoint, str(tmp_path / "b.safetensors"))
    loaded = torch.load(tmp_path / "b.pt", weights_only=False)
    assert set(loaded) == {key.replace("0.", "first.", 1) for key in SD if key[0] == "0"} | {
        *TITAN, *(key for key in SD if key[0] != "0"),
    }  # fmt: skip
    assert bits(loaded["optimizer"]["state.0.weight.exp_avg"]) == bits(FLAT["state.0.weight.exp_avg"])
    with open_checkpoint(tmp_path / "b.safetensors") as checkpoint:
        assert checkpoint.keys() == SD.keys()
