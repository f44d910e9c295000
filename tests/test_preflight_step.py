"""The dry step: what gets a gradient and moves, on a copy, with nothing of the caller's changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import preflight
from ckptkit.readiness import Preflight
from tests.helpers_outputs import same_state


class Net(nn.Module):
    """A body with batch norm and dropout, a head, and a layer that the forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.body(x)))


def loss(model: nn.Module) -> torch.Tensor:
    return torch.as_tensor(model(torch.randn(8, 4)).square().mean())


def found(report: Preflight) -> list[tuple[str, str]]:
    return [(one.code, one.key) for one in report.findings if one.code.startswith("preflight.")]


def test_what_the_forward_pass_does_not_use_is_named() -> None:
    """DDP would fail on it in the second step; here it is found in none."""
    model = Net()
    report = preflight(model, optimizer=torch.optim.AdamW(model.parameters()), dry_step=loss)
    assert found(report) == [("preflight.no-gradient", "unused.weight")]
    assert report.step is not None
    assert (report.step.trainable, report.step.gradients, report.step.moved) == (8, 6, 6)
    assert report.step.loss is not None


def test_nothing_of_the_callers_is_changed() -> None:
    """Parameters, statistics, gradients, optimizer state and random numbers; with a scheduler on the optimizer too."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    scheduler.step()
    weights = copy.deepcopy(model.state_dict())
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    report = preflight(model, optimizer=optimizer, schedulers=scheduler, dry_step=loss)
    assert report.step is not None
    assert report.step.moved == 6
    assert torch.equal(torch.rand(3), wanted)
    assert same_state(model.state_dict(), weights)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all(same_state(after["state"][key], slots) for key, slots in state["state"].items())
    for name, parameter in model.named_parameters():
        before = grads[name]
        assert (parameter.grad is None) == (before is None)
        assert parameter.grad is None or before is None or torch.equal(parameter.grad, before)
    assert all(parameter is group for parameter, group in zip(model.parameters(), optimizer.param_groups[0]["params"],
                                                              strict=True))  # fmt: skip


def test_momentum_of_before_moves_the_copy_as_it_would_the_model() -> None:
    """The state of a live optimizer goes along: a step with a gradient of zero still moves by momentum."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    report = preflight(model, optimizer=optimizer, dry_step=lambda twin: twin(torch.zeros(1, 2)).sum())
    assert found(report) == [("preflight.zero-gradient", "weight")]
    assert report.step is not None
    assert report.step.moved == 1


def write_frozen(twin: Any) -> torch.Tensor:
    with torch.no_grad():
        twin.body[0].weight.add_(1)
    return loss(twin)


LOSSES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "it raises": (lambda _: 1 / 0, "preflight.step-failed"),
    "no tensor": (lambda _: 3.0, "preflight.step-failed"),
    "a batch of losses": (lambda twin: twin(torch.ones(2, 4)), "preflight.step-failed"),
    "cut off": (lambda twin: loss(twin).detach(), "preflight.step-failed"),
    "not finite": (lambda twin: loss(twin) * float("nan"), "preflight.loss"),
    "gradients not finite": (lambda twin: loss(twin) * float("inf"), "preflight.gradient"),
    "a frozen one is written to": (write_frozen, "preflight.frozen-moved"),
    "constant": (lambda twin: loss(twin) * 0, "preflight.zero-gradient"),
}


@pytest.mark.parametrize(("given", "code"), LOSSES.values(), ids=LOSSES.keys())
def test_what_goes_wrong_in_a_step_is_a_finding(given: Callable[[Any], Any], code: str) -> None:
    """Never a traceback: the loss is the user's code, and the page goes on."""
    model = Net()
    model.body[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    report = preflight(model, optimizer=torch.optim.SGD(trained, lr=0.1), dry_step=given)
    assert code in [one for one, _ in found(report)]


def test_a_parameter_at_lr_zero_does_not_move() -> None:
    """In a group, with a gradient, and still."""
    model = nn.Linear(4, 3)
    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias]}]
    report = preflight(model, optimizer=torch.optim.SGD(groups, lr=0.1), dry_step=loss)
    assert found(report) == [("preflight.lr-zero", ""), ("preflight.not-moved", "weight")]


def test_groups_of_a_spec_step_the_copy() -> None:
    """What the spec freezes stays, and is not asked to move."""
    spec = {"group": [{"params": "head.*", "lr": 0.1}], "unmatched": "freeze"}
    report = preflight(Net(), groups=spec, optimizer="SGD", dry_step=loss)
    assert found(report) == []
    assert report.step is not None
    assert (report.step.optimizer, report.step.trainable, report.step.moved) == ("SGD", 2, 2)


def test_without_an_optimizer_only_gradients_are_looked_at() -> None:
    """And the page has no number of moved parameters to be wrong about."""
    report = preflight(nn.Linear(4, 3), dry_step=loss)
    assert found(report) == []
    assert report.step is not None
    assert (report.step.optimizer, report.step.gradients, report.step.moved) == ("", 2, 0)


def test_a_model_that_cannot_be_copied_is_said() -> None:
    """A module may hold what refuses it; nothing is run then."""
    model = nn.Linear(4, 3)
    model.kept = (number for number in (1, 2))  # type: ignore[assignment]
    assert found(preflight(model, dry_step=loss)) == [("preflight.no-copy", "")]


def test_sparse_gradients_are_looked_into() -> None:
    """Those of a sparse embedding."""
    model = nn.Embedding(10, 3, sparse=True)
    report = preflight(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        dry_step=lambda twin: twin(torch.tensor([1, 2])).sum(),
    )
    assert found(report) == []
    assert report.step is not None
    assert report.step.moved == 1


def test_an_optimizer_that_asks_for_a_closure_is_given_one() -> None:
    """LBFGS does not step without."""
    model = nn.Linear(4, 3)
    report = preflight(model, optimizer=torch.optim.LBFGS(model.parameters()), dry_step=loss)
    assert found(report) == []
    assert report.step is not None
    assert report.step.moved == 2


def test_a_sparse_buffer_is_counted_as_if_it_were_dense() -> None:
    """It has no storage to ask; its values are not judged."""
    model = nn.Linear(4, 3)
    model.register_buffer("mask", torch.eye(3).to_sparse())
    report = preflight(model, dry_step=loss)
    assert report.memory is not None
    assert report.memory.buffers == 9 * 4
