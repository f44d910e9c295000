"""``validate_param_groups`` finds faults of optimizer state, each made with torch and checked with a step."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import assert_param_groups, rebind, validate_param_groups
from ckptkit.core.torch_optim import SCHEMAS, schema_of
from tests.helpers_optimizers import OPTIMIZERS, Net, codes, message, net_for, step

ADAPTIVE = sorted(set(OPTIMIZERS) - {"LBFGS", "SGD", "SparseAdam"})


def trained(name: str, count: int = 2) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = net_for(name)
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, count)
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_torch_makes_has_no_findings(name: str) -> None:
    """State has no findings when new, after real steps, and after saving and loading."""
    model, optimizer = trained(name, 0)
    assert codes(model, optimizer) == []
    step(model, optimizer, 3)
    assert codes(model, optimizer) == []
    other = OPTIMIZERS[name](model.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert codes(model, other) == []


def test_every_class_of_torch_has_its_schema() -> None:
    kinds = [kind for kind in vars(torch.optim).values() if inspect.isclass(kind)]
    found = {kind.__name__ for kind in kinds if issubclass(kind, torch.optim.Optimizer)} - {"Optimizer"}
    assert found == {name for name in SCHEMAS if hasattr(torch.optim, name)}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"LBFGS"}))
def test_a_schema_has_the_slots_and_shapes_of_torch(name: str) -> None:
    """The schema has exactly the slots of torch, for vectors and matrices, with and without options."""
    model, optimizer = trained(name)
    schema = schema_of(type(optimizer))
    assert schema is not None
    for parameter in model.parameters():
        shape = tuple(parameter.shape)
        wanted = schema.slots_for(optimizer.param_groups[0], shape)
        slots = optimizer.state[parameter]
        assert {slot.name: slot.shape(shape) for slot in wanted} == {
            key: tuple(value.shape) if torch.is_tensor(value) else () for key, value in slots.items()
        }


def test_a_class_with_a_step_of_its_own_has_no_schema() -> None:
    """A class with its own step has no schema; a class that only inherits has that of its parent."""

    class Own(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            del closure

    class Renamed(torch.optim.Adam):
        pass

    assert schema_of(Own) is None
    assert schema_of(Renamed) is SCHEMAS["Adam"]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_state_of_another_shape(name: str) -> None:
    """State of another shape is an error; torch loads it, and the next step fails."""
    _, before = trained(name)
    model = Net(7, matrices=name == "Muon")
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.load_state_dict(before.state_dict())
    found = [key for code, severity, key in codes(model, optimizer) if (code, severity) == ("state-shape", "error")]
    assert found == (["head.weight"] if name == "Muon" else ["head.weight", "head.bias"])
    with pytest.raises(RuntimeError, match=r"size of tensor|must match"):
        step(model, optimizer)
    for parameter in model.head.parameters():  # the way out of the hint
        optimizer.state.pop(parameter)
    if name == "Adagrad":
        rebind(optimizer, model)  # the step of some versions of torch makes no state
    step(model, optimizer)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_state_of_another_dtype(name: str) -> None:
    """State of another dtype is an error if the step of torch fails, and a warning if it promotes."""
    model, optimizer = trained(name)
    model.bfloat16()
    (found,) = codes(model, optimizer)
    try:
        step(model, optimizer)
        severity = "warning"
    except RuntimeError:  # expected dtype float for `end`
        severity = "error"
    assert found[:2] == ("state-dtype", severity)


def test_state_on_another_device() -> None:
    model, optimizer = trained("Adam")
    optimizer.state[model.body.weight]["exp_avg"] = torch.empty(5, 4, device="meta")
    assert codes(model, optimizer) == [("state-device", "error", "body.weight")]
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(model, optimizer)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_missing_slot(name: str) -> None:
    """A missing slot is an error if the step of torch fails, and a warning if torch starts it from zero."""
    for slot in next(iter(trained(name)[1].state.values())):
        model, optimizer = trained(name)
        del optimizer.state[model.body.weight][slot]
        found = codes(model, optimizer)
        try:
            step(model, optimizer)
            severity = "warning"
        except (KeyError, AssertionError):
            severity = "error"
        # Without its only slot the state is empty, as before the first step.
        alone = name in {"Muon", "SGD-momentum"}
        expected = ("state-absent", "note", "body.weight") if alone else ("state-incomplete", severity, "body.weight")
        assert [code for code in found if code[0] != "state-steps"] == [expected]


def test_state_of_a_tensor_in_no_group() -> None:
    """State of a tensor in no group is an error, because state_dict() fails with a KeyError."""
    model, optimizer = trained("AdamW")
    optimizer.param_groups[0]["params"][-1] = model.head.bias = nn.Parameter(torch.zeros(3))
    assert [code for code in codes(model, optimizer) if code[0] == "state-orphan"] == [("state-orphan", "error", "")]
    with pytest.raises(KeyError):
        optimizer.state_dict()


def test_state_under_a_number() -> None:
    """State under a number is a warning, because torch saves it again with every checkpoint."""
    model, optimizer = trained("SGD-momentum")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][99] = {"momentum_buffer": torch.ones(2)}
    optimizer.load_state_dict(saved)
    assert 99 in optimizer.state_dict()["state"]
    assert codes(model, optimizer) == [("state-stray", "warning", "")]
    assert "state under 99" in message(model, optimizer)


def test_state_of_another_class() -> None:
    """The state of SGD in AdamW has unread and missing slots."""
    model, before = trained("SGD-momentum")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(KeyError):  # half way, with the groups overwritten already
        optimizer.load_state_dict(before.state_dict())
    found = codes(model, optimizer)
    assert ("option-missing", "error", "") in found
    assert ("state-stray", "warning", "body.weight") in found
    assert [key for code, _, key in found if code == "state-incomplete"] == [
        name for name, _ in model.named_parameters()
    ]


def test_different_step_counts() -> None:
    """A module that was frozen is a note, which names the counts, because the bias correction differs."""
    torch.manual_seed(0)
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 3)
    model.body.requires_grad_(True)
    step(model, optimizer)
    assert codes(model, optimizer) == [("state-steps", "note", "body.weight")]
    assert "4 for 'norm.weight', 'norm.bias', 'head.weight' and 1 more; 1 for 'body.weight'" in message(
        model, optimizer
    )


EVERY = ("body.weight", "body.bias", "norm.weight", "norm.bias", "head.weight", "head.bias")
# Each step trains these parameters, and the others are frozen or get no gradient.
USUAL: dict[str, list[tuple[str, ...]]] = {
    "a new head": [EVERY[:4], EVERY],
    "from the head down": [EVERY[4:], EVERY[2:], EVERY],
    "biases first": [EVERY[1::2], EVERY],
    "biases, then a module": [EVERY[1::2], (*EVERY[1::2], "head.weight", "norm.weight"), EVERY],
    "modules by turns": [EVERY[:2], EVERY[:4], EVERY[2:]],
    "one weight frozen to the end": [EVERY, EVERY[1:], EVERY[1:]],
}
UNUSUAL: dict[str, list[tuple[str, ...]]] = {
    "one weight": [EVERY[:4] + EVERY[5:], EVERY],
    "one bias": [(*EVERY[:1], *EVERY[2:]), EVERY],
}


@pytest.mark.parametrize("parts", [*USUAL.values(), *UNUSUAL.values()], ids=[*USUAL, *UNUSUAL])
def test_step_counts_of_whole_parts_are_a_note(parts: list[tuple[str, ...]]) -> None:
    """A training freezes, adds and skips whole parts, so a lower count of one parameter is a warning."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    for names in parts:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        step(model, optimizer, 1)
        optimizer.zero_grad()
    (found,) = [one for one in validate_param_groups(model, optimizer).findings if one.code == "groups.state-steps"]
    assert found.severity == ("warning" if parts in UNUSUAL.values() else "note")


def test_a_group_that_joined_later_passes_a_strict_check() -> None:
    """Gradual unfreezing by ``rebind`` and an embedding with sparse gradients have no finding above a note."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": list(model[1].named_parameters(prefix="1")), "name": "head"}], lr=0.1)
    for is_later in (False, True):
        if is_later:
            model[0].requires_grad_(True)
            rebind(optimizer, model, add_missing={"name": "body", "lr": 0.01})
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    report = assert_param_groups(model, optimizer, strict=True)
    assert [finding.code for finding in report.findings] == ["groups.state-steps"]


def test_parameters_without_state_beside_others_with_state() -> None:
    """Parameters without state beside others are a note, because they may be new."""
    torch.manual_seed(0)
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, 3)
    model.body.requires_grad_(True)
    assert codes(model, optimizer) == [("state-absent", "note", "body.weight")]
    assert "no state for 2 of 6 parameters: 'body.weight', 'body.bias'" in message(model, optimizer)


@pytest.mark.parametrize(
    ("slot", "value", "says"),
    [
        ("exp_avg", float("nan"), "exp_avg of 'body.weight' contains NaN"),
        ("exp_avg_sq", float("inf"), "exp_avg_sq of 'body.weight' contains Inf"),
        ("exp_avg_sq", -1.0, "exp_avg_sq of 'body.weight' has negative values"),
        ("step", float("nan"), "step of 'body.weight' contains NaN"),
    ],
)
def test_unusable_values(slot: str, value: float, says: str) -> None:
    """NaN, Inf and negative squares are errors, although a step of torch accepts them."""
    model, optimizer = trained("Adam")
    tensor = optimizer.state[model.body.weight][slot]
    tensor.reshape(-1)[0] = value
    assert ("state-value", "error", "body.weight") in codes(model, optimizer)
    assert any(says in finding.message for finding in report(model, optimizer).findings)
    before = model.body.weight[0, 0].item()
    step(model, optimizer)
    after = model.body.weight[0, 0].item()
    assert after != after or after == before  # noqa: PLR0124


def report(model: nn.Module, optimizer: Any) -> Any:
    from ckptkit.param_groups.validate import validate_param_groups

    return validate_param_groups(model, optimizer)


def test_a_negative_mean_is_allowed() -> None:
    model, optimizer = trained("Adam")
    assert any(bool((slots["exp_avg"] < 0).any()) for slots in optimizer.state.values())
    assert codes(model, optimizer) == []


def test_two_optimizers_that_loaded_one_state() -> None:
    """Two optimizers that loaded one state share tensors, which is an error."""
    model, first = trained("Adam")
    twin = Net()
    second = torch.optim.Adam(twin.parameters())
    second.load_state_dict(first.state_dict())
    both = nn.ModuleList([model, twin])
    assert codes(both, [first, second]) == [("state-shared", "error", "")]
    before = second.state[twin.body.weight]["exp_avg"].clone()
    step(model, first)
    assert not torch.equal(before, second.state[twin.body.weight]["exp_avg"])
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # the way out of the hint
    assert codes(both, [first, second]) == []


def test_state_that_is_the_parameter_itself() -> None:
    model, optimizer = trained("SGD-momentum")
    optimizer.state[model.head.weight]["momentum_buffer"] = model.head.weight.data
    assert codes(model, optimizer) == [("state-shared", "error", "")]
    assert "shares its memory with the parameter 'head.weight'" in message(model, optimizer)


def test_state_of_a_replaced_parameter() -> None:
    """State of a replaced parameter is a note with its size."""
    model, optimizer = trained("AdamW")
    model.head = nn.Linear(5, 9)
    assert ("state-dead", "note", "") in codes(model, optimizer)
    assert any("152 B of state for 2 tensors" in finding.message for finding in report(model, optimizer).findings)


def test_state_of_an_unknown_optimizer() -> None:
    """For an unknown optimizer, only the values and the memory of the state are checked."""

    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})
            self.state["counter"] = {"k": 1}  # type: ignore[index]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            closure()
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter] = {"q": torch.zeros(2, dtype=torch.uint8), "scale": torch.tensor([-1.0])}

    model = Net()
    optimizer = Own(model.parameters())
    step(model, optimizer)
    assert codes(model, optimizer) == []
    optimizer.state[model.head.bias]["scale"].fill_(float("nan"))
    assert codes(model, optimizer) == [("state-value", "error", "head.bias")]
