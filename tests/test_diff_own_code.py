"""``diff`` and ``load_into`` do what ``load_state_dict`` does, also where a model loads with code of its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import diff, load_into
from tests.helpers_own_loading import MODULES, states

CASES = [(name, variant) for name in MODULES for variant, _ in states(name)]


def outcome(model: nn.Module, state: Any, *, strict: bool) -> str:
    """Return what torch does with the state_dict: "loads", or the text of its exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.load_state_dict(state, strict=strict)
        except Exception as error:  # noqa: BLE001 - hooks raise anything
            return f"raises {error}"
    return "loads"


@pytest.mark.parametrize("name", MODULES)
def test_diff_says_that_torch_raises_where_it_raises(name: str) -> None:
    """The verdict is that of a load into the model itself, with ``strict=True`` and ``strict=False``."""
    wrong = []
    for variant, state in states(name):
        result = diff(MODULES[name](), state)
        for strict, said in ((True, result.loads_strict), (False, result.loads)):
            torch_says = outcome(MODULES[name](), copy.copy(state), strict=strict)
            if said != (torch_says == "loads"):
                wrong.append((variant, strict, said, torch_says, result.undecided))
    assert wrong == []


def randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in dict.fromkeys((*model.parameters(), *model.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return model


def with_values(state: Any) -> Any:
    """Return the state_dict with other values than a new model has, and with its versions."""
    generator = torch.Generator().manual_seed(3)
    new, made = copy.copy(state), dict[int, torch.Tensor]()
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            place = value.data_ptr()  # tied tensors get one value
            made[place] = made.get(place, torch.rand(value.shape, generator=generator).to(value.dtype))
            new[key] = made[place]
    return new


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("name", [name for name in MODULES if name != "resizing"])
def test_load_into_loads_what_torch_loads(name: str) -> None:
    """Where torch loads the whole state_dict, the model has the same values afterwards, and the report has all keys."""
    for variant, state in states(name):
        given = with_values(state)
        torchs, ours = (randomised(MODULES[name](), 1) for _ in range(2))
        if outcome(torchs, copy.copy(given), strict=True) != "loads" or not diff(ours, given).matched:
            continue
        before = tensors_of(ours)
        report = load_into(ours, given)
        after, wanted = tensors_of(ours), tensors_of(torchs)
        assert all(after[key] is tensor for key, tensor in before.items()), variant
        assert [key for key in wanted if not torch.equal(after[key], wanted[key])] == [], (variant, report)
        keys = {key for key, value in MODULES[name]().state_dict().items() if isinstance(value, torch.Tensor)}
        assert {*report.loaded, *report.kept} == keys, variant
