"""The memory layout of optimizer state is kept: a fused step reads the state in the order of memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_into, load_optimizer_state, open_checkpoint, rebind, validate_param_groups
from ckptkit.errors import GroupsError
from ckptkit.optimizer_state.naming import to_named
from ckptkit.optimizer_state.pruning import prune
from ckptkit.optimizer_state.remapping import remap
from ckptkit.optimizer_state.write import write_optimizer_state
from ckptkit.plans.output import Output

Make = Callable[[Any], torch.optim.Optimizer]


class ColumnMajor(torch.optim.Optimizer):
    """SOAP's trait: matrices of the shape of the parameter, kept in column-major order and multiplied in each step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, *_: Any) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim == 2:
                    state = self.state[parameter]
                    basis = state.get("Q", torch.eye(*parameter.shape))
                    state["Q"] = torch.linalg.qr(basis @ (basis + parameter.grad))[0].t().contiguous().t()
                    parameter.data.sub_(state["Q"] @ parameter.grad, alpha=group["lr"])


FUSED: dict[str, Make] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, fused=True, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, fused=True),
}


class Net(nn.Module):
    def __init__(self, *, channels_last: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(1, 5, 3)
        self.fc = nn.Linear(4, 4)
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.b(self.a(x).relu()).mean((2, 3)))
        out += self.c(x[:, :1]).mean()
        return out


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        data = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()


def is_same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def copied(model: nn.Module, make: Make) -> tuple[Any, torch.optim.Optimizer]:
    other = copy.deepcopy(model)
    return other, make(other.named_parameters())


def strides(state: Mapping[Any, Any]) -> list[Any]:
    return [value.stride() for slots in state.values() for value in slots.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("from_file", [False, True], ids=["live", "file"])
@pytest.mark.parametrize("make", [*FUSED.values(), ColumnMajor], ids=[*FUSED, "ColumnMajor"])
def test_training_goes_on_to_the_last_bit(make: Make, from_file: bool, tmp_path: Path) -> None:
    model = Net()
    optimizer = make(model.named_parameters())
    train(model, optimizer, 2)
    other, fresh = copied(model, make)
    if from_file:
        torch.save(optimizer.state_dict(), tmp_path / "o.pt")
        with open_checkpoint(tmp_path / "o.pt") as source:
            load_optimizer_state(fresh, other, source)
    else:
        load_optimizer_state(fresh, other, optimizer.state_dict())
    assert strides(fresh.state) == strides(optimizer.state)
    assert not validate_param_groups(other, fresh).findings
    train(model, optimizer, 2)
    train(other, fresh, 2)
    assert is_same(model, other)


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED.keys())
@pytest.mark.parametrize("saved_last", [False, True], ids=["from-contiguous", "from-channels-last"])
def test_the_live_layout_decides_where_the_file_has_another(make: Make, saved_last: bool) -> None:
    """The uninterrupted run in the layout of the live model is the oracle."""
    model = Net(channels_last=saved_last)
    optimizer = make(model.named_parameters())
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    other = Net(channels_last=not saved_last)
    other.load_state_dict(model.state_dict())
    fresh = make(other.named_parameters())
    load_optimizer_state(fresh, other, saved)
    expected, plain = copied(other, make)
    for slots in saved["state"].values():
        for name, value in slots.items():
            slots[name] = value.contiguous(
                memory_format=torch.contiguous_format if saved_last or value.ndim < 4 else torch.channels_last
            )
    plain.load_state_dict(saved)
    train(other, fresh, 2)
    train(expected, plain, 2)
    assert is_same(other, expected)


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED.keys())
def test_other_layout_is_an_error_of_fused_groups_alone_and_rebind_mends_it(make: Make) -> None:
    """torch's own load keeps the layout of the file; sizes of 1 do not count."""
    model = Net(channels_last=False)
    optimizer = make(model.named_parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    other = Net()
    fresh = make(other.named_parameters())
    fresh.load_state_dict(copy.deepcopy(saved))
    found = validate_param_groups(other, fresh).findings
    assert {finding.code for finding in found} == {"groups.state-layout"}
    assert all("'a.weight'" in finding.message and "'c.weight'" not in finding.message for finding in found)
    for group in fresh.param_groups:
        group["fused"] = False
    assert not validate_param_groups(other, fresh).findings
    for group in fresh.param_groups:
        group["fused"] = True
    rebind(fresh, other)
    assert not validate_param_groups(other, fresh).findings
    expected, plain = copied(other, make)
    load_optimizer_state(plain, expected, saved)
    train(other, fresh, 1)
    train(expected, plain, 1)
    assert is_same(other, expected)


def test_edited_files_keep_the_layout(tmp_path: Path) -> None:
    """A slot that is copied keeps its strides, and the parts of a split have the order of their source."""
    model = Net()
    optimizer = FUSED["AdamW"](model.named_parameters())
    train(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    rule = {"from": "a.weight", "to": ["a.0", "a.1"], "op": {"split": {"parts": 2}}}
    with open_checkpoint(tmp_path / "o.pt") as source:
        split = remap(prune(to_named(source), drop="c.*"), {"rule": [rule]})
        for number, given in enumerate((source, None)):
            write_optimizer_state(split, Output(str(tmp_path / f"{number}.pt"), "torch"), given)
            slots = torch.load(tmp_path / f"{number}.pt")["state"]
            whole = optimizer.state[model.a.weight]["exp_avg"]
            parts = [slots[place]["exp_avg"] for place in (0, 1)]
            assert torch.equal(torch.cat(parts), whole)
            assert {part.stride() for part in parts} == {whole.stride()}
            assert slots[3]["exp_avg"].stride() == optimizer.state[model.b.weight]["exp_avg"].stride()


def test_a_hook_that_changes_the_layout_is_found() -> None:
    model = Net()
    optimizer = FUSED["AdamW"](model.named_parameters())
    train(model, optimizer, 1)
    other, fresh = copied(model, FUSED["AdamW"])

    def make_contiguous(loaded: torch.optim.Optimizer) -> None:
        for slots in loaded.state.values():
            slots.update({name: value.contiguous() for name, value in slots.items()})

    fresh.register_load_state_dict_post_hook(make_contiguous)
    with pytest.raises(GroupsError, match=r"exp_avg of 'a\.weight' has the strides"):
        load_optimizer_state(fresh, other, optimizer.state_dict())
    assert not fresh.state


def test_weights_keep_the_layout_of_the_live_model() -> None:
    model = Net()
    before = [parameter.stride() for parameter in model.parameters()]
    load_into(model, Net(channels_last=False).state_dict())
    assert [parameter.stride() for parameter in model.parameters()] == before
