"""A state without names is read in the order of the live optimizer, as torch reads it, or else by the model's order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_optimizer_state, open_optimizer, preflight
from ckptkit.errors import CkptkitError, PlanError
from ckptkit.optimizer_state.naming import to_named
from tests.helpers_optim import same_state

Groups = list[dict[str, Any]]


class Square(nn.Module):
    """Layers of one shape, so that no shape tells which parameter is which."""

    def __init__(self, layers: int = 4, classes: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(layers)])
        self.head = nn.Linear(4, classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return torch.as_tensor(self.head(x))


def layer_wise(model: Square) -> Groups:
    """Return one group for each layer from the top down, each with a lower rate, as fine-tuning scripts do."""
    modules = [model.head, *reversed(list(model.layers))]
    return [{"params": list(module.parameters()), "lr": 0.1 * 0.5**depth} for depth, module in enumerate(modules)]


def members(model: nn.Module, *groups: tuple[int, ...]) -> Groups:
    """Return groups of the parameters at these places of the model."""
    parameters = list(model.parameters())
    return [{"params": [parameters[place] for place in places]} for places in groups]


def reverse(model: nn.Module) -> Groups:
    return [{"params": list(model.parameters())[::-1]}]


ORDERS: dict[str, Callable[[Any], Groups]] = {
    "model": lambda model: [{"params": list(model.parameters())}],
    "reversed": reverse,
    "head first": lambda model: [{"params": [*model.head.parameters(), *model.layers.parameters()]}],
    "layer-wise from the top": layer_wise,
    "two groups": lambda model: [
        {"params": list(model.layers[2:].parameters())},
        {"params": [*model.layers[:2].parameters(), model.head.weight]},
    ],
    "frozen part": lambda model: members(model, (3, 1)),
}


def trained(model: nn.Module, groups: Groups, kind: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.1)
    inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).pow(2).sum().backward()
        optimizer.step()
    return optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (optimizer.state[p]["exp_avg"] for p in model.parameters() if p in optimizer.state)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9)])
def test_the_same_script_loads_what_torch_loads(order: str, kind: Any) -> None:
    """The state arrives to the bit, a note says by position, and a preflight is ready."""
    torch.manual_seed(0)
    model = Square()
    kept = {id(parameter) for group in ORDERS[order](model) for parameter in group["params"]}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    saved = trained(model, ORDERS[order](model), kind).state_dict()
    by_torch, by_name = (kind(ORDERS[order](model), lr=0.1) for _ in range(2))
    report = preflight(model, optimizer=by_name, resume=model, resume_optimizer=saved)
    assert report.verdict == "ready", report.findings
    by_torch.load_state_dict(copy.deepcopy(saved))
    loaded = load_optimizer_state(by_name, model, saved)
    left, right = by_name.state_dict(), by_torch.state_dict()
    assert same_state(left["state"], right["state"])
    assert left["param_groups"] == right["param_groups"]
    for findings in (report.findings, loaded.findings):
        (note,) = [finding for finding in findings if finding.code == "optim.unnamed"]
        assert "by position" in note.message
        assert ("not in the order of the model" in note.message) == (order in ("reversed", "head first", "frozen part"))


def test_names_read_otherwise(tmp_path: Path) -> None:
    """A state of another order is read by the order of the model, or by a list or a file of names."""
    model = Square()
    optimizer = trained(model, ORDERS["model"](model))
    expected = list(moments(model, optimizer))
    names = [name for name, _ in model.named_parameters()]
    (tmp_path / "names.txt").write_text("\n".join(names))
    for given in ("model", names, model, tmp_path / "names.txt", str(tmp_path / "names.txt")):
        other = torch.optim.AdamW(reverse(model))
        report = load_optimizer_state(other, model, optimizer.state_dict(), names=given)
        assert all(map(torch.equal, moments(model, other), expected))
        assert "by position" not in report.findings[0].message
    with pytest.raises(CkptkitError, match="no such file"):
        load_optimizer_state(torch.optim.AdamW(reverse(model)), model, optimizer.state_dict(), names="modle")
    by_position = torch.optim.AdamW(reverse(model))
    load_optimizer_state(by_position, model, optimizer.state_dict())
    assert all(map(torch.equal, moments(model, by_position), expected[::-1]))


def test_a_buffer_of_the_shape_of_a_parameter_is_known_by_its_name(tmp_path: Path) -> None:
    """Of two tensors of one shape, that one has state whose name has state wherever its shape tells; else neither."""
    model = nn.ModuleList()
    for size, width in ((8, 2), (12, 3), (6, 4), (4, 1)):  # the mask of the third layer has the shape of the fourth
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.ones(size))
        layer.register_buffer("output_mask", torch.ones(width))
        model.append(layer)
    for first, is_told in ((0, True), (2, False)):
        optimizer = torch.optim.SGD(list(model.parameters())[first:], lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
        with open_optimizer(tmp_path / "run.pt") as saved:
            if is_told:
                state = to_named(saved)
                assert state.names == tuple(name for name, _ in model.named_parameters())
                assert "'output_mask' taken as names of buffers, because no other" in state.evidence
            else:  # two weights are frozen, so a name does not tell that a tensor has state
                with pytest.raises(PlanError, match=r"'2\.output_mask' or '3\.weight'") as caught:
                    to_named(saved)
                assert "give the live model, frozen as in training: --model" in str(caught.value.hint)


def test_a_model_must_be_frozen_as_in_training() -> None:
    """Where the model trains more parameters than the run did, the hint asks to freeze it, and that settles it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    saved = trained(model, [{"params": list(model[1].parameters())}]).state_dict()
    with pytest.raises(PlanError) as caught:
        to_named(saved, model)
    assert str(caught.value.hint).startswith("freeze the parameters of the model that did not train; or give the names")
    model[0].requires_grad_(requires_grad=False)
    assert to_named(saved, model).names == ("1.weight", "1.bias")


def test_frozen_parameters_are_not_taken_for_buffers(tmp_path: Path) -> None:
    """Where the last layer trains its bias, and all others their weight, the shapes of the last do not tell."""
    model = nn.ModuleList([nn.Module() for _ in range(3)])
    for layer, (width, size) in zip(model, ((3, 2), (4, 6), (5, 5)), strict=True):
        layer.weight, layer.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(size))
    named = dict(model.named_parameters())
    trains = [named[name] for name in ("0.weight", "1.weight", "2.bias")]
    optimizer = torch.optim.SGD(trains, lr=0.1, momentum=0.9)
    for parameter in trains:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    with open_optimizer(tmp_path / "run.pt") as saved, pytest.raises(PlanError, match=r"'2\.weight' or '2\.bias'"):
        to_named(saved)


def test_what_does_not_fit_by_position_is_read_by_the_only_order_that_does() -> None:
    """Shapes that differ between positions show that the order changed."""
    model = Square(layers=1, classes=2)
    optimizer = trained(model, ORDERS["model"](model))
    other = torch.optim.AdamW(reverse(model))
    report = load_optimizer_state(other, model, optimizer.state_dict())
    assert all(map(torch.equal, moments(model, other), moments(model, optimizer)))
    assert "by the order of the model" in report.findings[0].message
    found = preflight(model, optimizer=other, resume=model, resume_optimizer=optimizer.state_dict()).findings
    assert [finding.code for finding in found if finding.severity == "error"] == ["preflight.resume-shape"] * 2
    assert "load_optimizer_state reads the state by the order of the model" in found[0].hint


REFUSED: dict[str, tuple[Callable[[Any], Groups], Callable[[Any], Groups], str]] = {
    "other sizes, two orders": (
        reverse,
        lambda model: [{"params": list(model.layers.parameters())[::-1]}, {"params": [model.head.weight]}],
        r"position 0 \(\[4, 4\]\) is 'layers.0.weight' or 'layers.3.weight'",
    ),
    "other sizes, a group for each layer": (layer_wise, ORDERS["model"], "position 3 .* is 'layers.3.weight' or"),
    "other shapes, two orders": (
        lambda model: [
            {"params": [model.layers[0].weight, model.head.weight]},
            {"params": list(model.layers[1:].parameters())},
        ],
        lambda model: [
            {"params": list(model.layers[:2].parameters())},
            {"params": [*model.layers[2:].parameters(), model.head.weight]},
        ],
        "the optimizer has other shapes: position 1 has shape .*is 'layers.",
    ),
}


@pytest.mark.parametrize(("before", "now", "message"), REFUSED.values(), ids=REFUSED)
def test_several_readings_are_refused(
    before: Callable[[Any], Groups], now: Callable[[Any], Groups], message: str
) -> None:
    """The error shows the parameters in doubt, a list of names helps, and a preflight has the same reason."""
    model = Square(classes=2 if "other shapes" in message else 4)
    optimizer = trained(model, before(model))
    saved = optimizer.state_dict()
    other = torch.optim.AdamW(now(model))
    with pytest.raises(PlanError, match=message) as refusal:
        load_optimizer_state(other, model, saved)
    found = preflight(model, optimizer=other, resume=model, resume_optimizer=saved).findings
    assert any(refusal.value.reason in finding.hint for finding in found if finding.severity == "error")
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for group in before(model) for parameter in group["params"]]
    load_optimizer_state(other, model, saved, names=names, hyper="live")
    assert all(map(torch.equal, moments(model, other), moments(model, optimizer)))


def test_a_new_head_in_the_same_script_is_one_parameter_that_does_not_fit() -> None:
    """All else is read by position, and the policy decides about the state of the head."""
    old, model = Square(classes=2), Square(classes=3)
    optimizer = trained(old, reverse(old))
    other = torch.optim.AdamW(reverse(model))
    with pytest.raises(PlanError, match=r"the state of 'head.weight' has exp_avg of shape \(2, 4\)"):
        load_optimizer_state(other, model, optimizer.state_dict())
    report = load_optimizer_state(other, model, optimizer.state_dict(), on_mismatch="skip")
    assert report.dropped == ("head.weight",)
    assert all(map(torch.equal, moments(model.layers, other), moments(old.layers, optimizer)))


def test_recorded_names_count_more_than_positions() -> None:
    """A state with param_names is loaded by name into an optimizer of another order."""
    model = Square()
    optimizer = trained(model, [{"params": list(model.named_parameters())}])
    other = torch.optim.AdamW(reverse(model))
    report = load_optimizer_state(other, model, optimizer.state_dict())
    assert all(map(torch.equal, moments(model, other), moments(model, optimizer)))
    assert report.findings == ()


def test_the_options_of_an_empty_group_are_loaded() -> None:
    """A scheduler that is built from the state needs the initial_lr of every group, also of one without parameters."""
    model = Square()
    groups = members(model, (0, 1, 2, 3, 4), ())
    optimizer = trained(model, [{**group} for group in groups])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    other = torch.optim.AdamW([{**group} for group in groups])
    load_optimizer_state(other, model, optimizer.state_dict())
    torch.optim.lr_scheduler.StepLR(other, 1, last_epoch=3)
    assert [group["initial_lr"] for group in other.param_groups] == [0.1, 0.1]


def test_the_order_of_equal_shapes_is_said_to_be_assumed() -> None:
    """Shapes alone prove nothing about parameters of one shape in one group."""
    model = Square()
    saved = trained(model, reverse(model)).state_dict()
    assert "equal shapes in one group were taken in this order" in to_named(saved, model).evidence
    layers = Square(layers=1, classes=2)
    assert "equal shapes" not in to_named(trained(layers, ORDERS["model"](layers)).state_dict(), layers).evidence
