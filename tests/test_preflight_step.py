"""A dry step shows on a copy which parameters get a gradient and change, and leaves the original as it is."""

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


def test_an_unused_parameter_is_reported() -> None:
    """DDP fails on such a parameter in its second step."""
    model = Net()
    report = preflight(model, optimizer=torch.optim.AdamW(model.parameters()), dry_step=loss)
    assert found(report) == [("preflight.no-gradient", "unused.weight")]
    assert report.step is not None
    assert (report.step.trainable, report.step.gradients, report.step.moved) == (8, 6, 6)
    assert report.step.loss is not None


def test_a_dry_step_changes_no_argument() -> None:
    """Parameters, buffers, gradients, optimizer state and random numbers stay, also under a scheduler."""
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


def test_the_copy_has_the_optimizer_state_of_the_original() -> None:
    """With a gradient of zero, the momentum of earlier steps still changes the parameter."""
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
    "an exception": (lambda _: 1 / 0, "preflight.step-failed"),
    "not a tensor": (lambda _: 3.0, "preflight.step-failed"),
    "a batch of losses": (lambda twin: twin(torch.ones(2, 4)), "preflight.step-failed"),
    "detached": (lambda twin: loss(twin).detach(), "preflight.step-failed"),
    "not finite": (lambda twin: loss(twin) * float("nan"), "preflight.loss"),
    "gradients not finite": (lambda twin: loss(twin) * float("inf"), "preflight.gradient"),
    "a write to a frozen parameter": (write_frozen, "preflight.frozen-moved"),
    "constant": (lambda twin: loss(twin) * 0, "preflight.zero-gradient"),
}


@pytest.mark.parametrize(("given", "code"), LOSSES.values(), ids=LOSSES.keys())
def test_a_fault_in_a_step_is_a_finding(given: Callable[[Any], Any], code: str) -> None:
    """An exception in the loss function of the user becomes a finding."""
    model = Net()
    model.body[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    report = preflight(model, optimizer=torch.optim.SGD(trained, lr=0.1), dry_step=given)
    assert code in [one for one, _ in found(report)]


def test_a_parameter_with_an_lr_of_zero_does_not_change() -> None:
    """It is in a group and gets a gradient."""
    model = nn.Linear(4, 3)
    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias]}]
    report = preflight(model, optimizer=torch.optim.SGD(groups, lr=0.1), dry_step=loss)
    assert found(report) == [("preflight.lr-zero", ""), ("preflight.not-moved", "weight")]


def test_the_copy_is_stepped_by_the_groups_of_a_spec() -> None:
    """Parameters that the spec freezes do not count as trainable, and their batch norm must not be in train mode."""
    spec = {"group": [{"params": "head.*", "lr": 0.1}], "unmatched": "freeze"}
    report = preflight(Net(), groups=spec, optimizer="SGD", dry_step=loss)
    assert found(report) == [("preflight.frozen-buffers", "body.1.running_mean")]
    assert report.step is not None
    assert (report.step.optimizer, report.step.trainable, report.step.moved) == ("SGD", 2, 2)


def test_without_an_optimizer_only_gradients_are_checked() -> None:
    """No parameter changes, and none is expected to."""
    report = preflight(nn.Linear(4, 3), dry_step=loss)
    assert found(report) == []
    assert report.step is not None
    assert (report.step.optimizer, report.step.gradients, report.step.moved) == ("", 2, 0)


def test_a_model_that_cannot_be_copied_is_a_warning() -> None:
    """The loss function is not called then."""
    model = nn.Linear(4, 3)
    model.kept = (number for number in (1, 2))  # type: ignore[assignment]
    assert found(preflight(model, dry_step=loss)) == [("preflight.no-copy", "")]


def test_sparse_gradients_are_checked() -> None:
    """A sparse embedding has such gradients."""
    model = nn.Embedding(10, 3, sparse=True)
    report = preflight(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        dry_step=lambda twin: twin(torch.tensor([1, 2])).sum(),
    )
    assert found(report) == []
    assert report.step is not None
    assert report.step.moved == 1


def test_an_optimizer_that_needs_a_closure_gets_one() -> None:
    """LBFGS does not step without a closure."""
    model = nn.Linear(4, 3)
    report = preflight(model, optimizer=torch.optim.LBFGS(model.parameters()), dry_step=loss)
    assert found(report) == []
    assert report.step is not None
    assert report.step.moved == 2


def test_a_sparse_buffer_counts_with_its_dense_size() -> None:
    """A sparse tensor has no storage, so its values are not judged."""
    model = nn.Linear(4, 3)
    model.register_buffer("mask", torch.eye(3).to_sparse())
    report = preflight(model, dry_step=loss)
    assert report.memory is not None
    assert report.memory.buffers == 9 * 4
