"""Optimizer states are read by name in every form of torch; names are inferred only if the shapes prove them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict

from ckptkit import open_checkpoint
from ckptkit.errors import CkptkitError, FormatError, PlanError
from ckptkit.formats import open_optimizer
from ckptkit.optimizer_state.forms import read_state, to_dict
from ckptkit.optimizer_state.model import OptimizerState
from ckptkit.optimizer_state.naming import to_named
from tests.helpers_dcp import save as save_distributed
from tests.helpers_optim import OPTIMIZERS, Net, same_state, trained

FLATTEN = dcp_state_dict.StateDictOptions(flatten_optimizer_state_dict=True)


def split(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups; in the model, the parameters of the second are between those of the first."""
    named = dict(model.named_parameters())
    inner = [tensor for name, tensor in named.items() if name.startswith("fc")]
    outer = [tensor for name, tensor in named.items() if not name.startswith("fc")]
    return [{"params": outer}, {"params": inner, "lr": 0.5}]


def forms(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of one optimizer in every form that torch can save."""
    indexed = optimizer.state_dict()
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    with_names = copy.deepcopy(indexed)
    for group, live in zip(with_names["param_groups"], optimizer.param_groups, strict=True):
        group |= {"param_names": [names[id(tensor)] for tensor in live["params"]], "params": group.pop("params")}
    return {
        "indexed": indexed,
        "param-names": with_names,
        "named": dcp_state_dict.get_optimizer_state_dict(model, optimizer),
        "flattened": dcp_state_dict.get_optimizer_state_dict(model, optimizer, options=FLATTEN),
    }


def content(state: OptimizerState) -> Any:
    """Return the whole content of a state, with its tensors."""
    return to_dict(state, "named")


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("form", ["indexed", "param-names", "named", "flattened"])
@pytest.mark.parametrize("saved", [True, False], ids=["file", "live"])
def test_every_form_is_read_and_built(kind: str, form: str, saved: bool, tmp_path: Path) -> None:
    """Every form has the content of torch's name-keyed form, and can be built again."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS[kind](split(model)))
    given_form = forms(model, optimizer)[form]
    thing: Any = given_form
    if saved:
        torch.save({"model": model.state_dict(), "optim": {"main": given_form}}, tmp_path / "run.ckpt")
        thing = open_optimizer(tmp_path / "run.ckpt")
        assert thing.envelope == "optim.main"
    state = to_named(thing, model)
    assert state.form == form
    assert same_state(
        sorted_by_name(content(state)["state"]), sorted_by_name(forms(model, optimizer)["named"]["state"])
    )
    assert same_state(to_dict(state, form), given_form)


def test_names_of_dcp_directories(tmp_path: Path) -> None:
    """Both forms that torch.distributed.checkpoint writes are read from its directory."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS["AdamW"](split(model)))
    for form in ("named", "flattened"):
        made = forms(model, optimizer)[form]
        save_distributed(tmp_path / form, {"model": model.state_dict(), "optim": made})
        with open_optimizer(tmp_path / form) as checkpoint:
            assert same_state(sorted_by_name(to_dict(to_named(checkpoint), form)), sorted_by_name(made))


def sorted_by_name(value: Any) -> Any:
    """Return the value with sorted mappings, because DCP does not keep their order."""
    if isinstance(value, dict):
        return {key: sorted_by_name(value[key]) for key in sorted(value)}
    return [sorted_by_name(item) for item in value] if isinstance(value, list) else value


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=8, max_size=8), st.sampled_from(list(OPTIMIZERS)))
@settings(max_examples=15, deadline=None)
def test_by_position_and_back(deal: list[int], kind: str) -> None:
    """Names given in the order of the groups restore the same state, for any split into groups."""
    model = Net()
    named = list(model.named_parameters())
    members = [[pair for pair, group in zip(named, deal, strict=True) if group == number] for number in sorted({*deal})]
    groups = [{"params": [tensor for _, tensor in pairs], "weight_decay": 0.1 * len(pairs)} for pairs in members]
    optimizer = trained(model, OPTIMIZERS[kind](groups), 1)
    state = to_named(optimizer.state_dict(), [name for pairs in members for name, _ in pairs])
    assert same_state(to_dict(state), optimizer.state_dict())
    assert same_state(to_dict(to_named(to_dict(state, "named"))), optimizer.state_dict())


@pytest.mark.parametrize("source", ["model", "checkpoint"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_names_follow_from_shapes(kind: str, source: str, tmp_path: Path) -> None:
    """Positions get the names of a live model, or of its checkpoint without buffers, if only one assignment fits."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS[kind](split(model)))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    names: Any = model if source == "model" else open_checkpoint(tmp_path / "model.pt")
    state = to_named(optimizer.state_dict(), names)
    assert same_state(content(state), forms(model, optimizer)["named"])
    assert "only way to split them into 2 groups" in state.evidence


def test_frozen_parameters_are_not_counted() -> None:
    """An optimizer of the trainable parameters gets only their names."""
    model = Net()
    model.qkv.requires_grad_(False)
    optimizer = trained(model, OPTIMIZERS["AdamW"]([tensor for tensor in model.parameters() if tensor.requires_grad]))
    assert to_named(optimizer.state_dict(), model).names == tuple(
        name for name, tensor in model.named_parameters() if tensor.requires_grad
    )


def test_ambiguous_names_are_refused_and_listed() -> None:
    """For two equal layers in two groups, the error names both candidates and a hint that works."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = trained(
        model, OPTIMIZERS["SGD"]([{"params": model[1].parameters()}, {"params": model[0].parameters()}])
    )
    with pytest.raises(PlanError, match=r"position 0 \(\[4, 4\]\) is '0.weight' or '1.weight'") as refusal:
        to_named(optimizer.state_dict(), model)
    assert "--names" in (refusal.value.hint or "")
    names = ["1.weight", "1.bias", "0.weight", "0.bias"]
    state = to_named(optimizer.state_dict(), names)
    assert same_state(content(state), dcp_state_dict.get_optimizer_state_dict(model, optimizer))


def test_another_order_is_refused() -> None:
    """A group in another order than the model does not fit, and the error names the first position."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS["SGD"](list(model.parameters())[::-1]))
    with pytest.raises(PlanError, match=r"position 0 has shape \[3\], but 'qkv.weight' has shape \[12, 4\]"):
        to_named(optimizer.state_dict(), model)


def repeat_a_position(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"] = [2, 1, 2]


def skip_positions(state: dict[str, Any]) -> None:
    state["param_groups"][1]["params"] = [8, 9]
    state["state"] = {key: slots for key, slots in state["state"].items() if key < 6}


def add_state_of_no_group(state: dict[str, Any]) -> None:
    state["state"][99] = {"momentum_buffer": torch.zeros(2)}


def repeat_a_name(state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        group["param_names"] = ["head.weight", *(f"other{number}" for number in group["params"][1:])]


def shorten_param_names(state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        group["param_names"] = ["head.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (repeat_a_position, "2 is in the groups more than once"),
        (skip_positions, "the positions must be 0 to 7, but 6, 7 are missing"),
        (add_state_of_no_group, "there is state of 99, which no group has"),
        (repeat_a_name, "'head.weight' to several"),
        (shorten_param_names, "1 name for 6 parameters"),
    ],
)
def test_contradictions_are_refused(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    """No name is guessed from contradicting positions."""
    model = Net()
    state = trained(model, OPTIMIZERS["SGD"](split(model))).state_dict()
    damage(state)
    with pytest.raises(FormatError, match=message):
        to_named(state, model)


def test_wrong_recorded_names_are_found_by_shape() -> None:
    """Recorded names with other shapes are refused, because torch overwrites param_names when it loads."""
    model = Net()
    optimizer = trained(model, OPTIMIZERS["SGD"](list(model.named_parameters())))
    assert to_named(optimizer.state_dict(), model).names == tuple(name for name, _ in model.named_parameters())
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"].reverse()
    with pytest.raises(PlanError, match=r"state of 'head.bias' has shape \[12, 4\], but the parameter has shape \[3\]"):
        to_named(state, model)


def test_several_optimizers_are_listed(tmp_path: Path) -> None:
    """An error lists two optimizers in one file, and a path selects one; a file of weights has none."""
    model = Net()
    state = trained(model, OPTIMIZERS["SGD"](model.parameters())).state_dict()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [state, state]}, tmp_path / "two.ckpt")
    with pytest.raises(FormatError, match=r"2 optimizers: 'optimizer_states.0', 'optimizer_states.1'"):
        open_optimizer(tmp_path / "two.ckpt")
    with open_optimizer(f"{tmp_path / 'two.ckpt'}::optimizer_states.1") as checkpoint:
        assert same_state(to_dict(to_named(checkpoint, model)), state)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CkptkitError, match="holds no optimizer state"):
        open_optimizer(tmp_path / "model.pt")
    with pytest.raises(FormatError, match="not an optimizer state"):
        read_state(open_checkpoint(tmp_path / "model.pt"))


def test_one_group_for_each_parameter_is_named_and_a_long_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of the search allows every search without backtracking, and stops one with too much of it."""
    monkeypatch.setattr("ckptkit.optimizer_state.positions._MIN_CHOICES", 1000)
    shapes = {f"p{number}": (number + 1,) for number in range(60)}

    def state(groups: list[int], sizes: list[int]) -> dict[str, Any]:
        places = iter(range(len(sizes)))
        return {
            "state": {place: {"exp_avg": torch.zeros(size)} for place, size in enumerate(sizes)},
            "param_groups": [{"lr": 0.1, "params": [next(places) for _ in range(count)]} for count in groups],
        }

    assert to_named(state([1] * 60, [*range(1, 61)]), shapes).names == tuple(shapes)
    with pytest.raises(PlanError, match="too many ways to assign the parameters to the groups"):
        to_named(state([15, 15, 15], [2] * 44 + [3]), dict.fromkeys(shapes, (2,)))
