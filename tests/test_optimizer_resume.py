"""A preflight of a normal resume has no finding about what a scheduler did, and no hint breaks the schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_optimizer_state, preflight
from ckptkit.core.findings import Finding
from tests.helpers_optim import same_state
from tests.make_old_torch import Net


def build(weights: dict[str, torch.Tensor]) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    model.load_state_dict(weights)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def unusual(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.message for finding in findings if finding.severity != "note"]


# Each scheduler moves the rate by more than its initial_lr says, or leaves no mark, or cycles the momentum.
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: min(1.0, (epoch + 1) / 20)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=20),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.02, 3),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


def schedule(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[float]:
    """Make steps of the optimizer and its scheduler, and return the rates."""
    rates = []
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        is_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*((1.0,) if is_plateau else ()))
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_normal_resume_has_no_finding(name: str) -> None:
    """The rates and the weights after two more steps are those of the uninterrupted run."""
    torch.manual_seed(0)
    model, optimizer = build(Net().state_dict())
    scheduler = SCHEDULERS[name](optimizer)
    schedule(model, optimizer, scheduler, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    expected = schedule(model, optimizer, scheduler, 2)
    policies: tuple[Any, ...] = ("saved",) if name == "plateau" else ("saved", "error")
    for hyper in policies:
        other, resumed = build(saved[0])
        again = SCHEDULERS[name](resumed)
        report = preflight(other, optimizer=resumed, schedulers=again, resume=saved[0], resume_optimizer=saved[1])
        assert report.verdict == "ready", unusual(report.findings)
        assert unusual(load_optimizer_state(resumed, other, saved[1], hyper=hyper).findings) == []
        again.load_state_dict(dict(saved[2]))  # CyclicLR takes entries out
        assert schedule(other, resumed, again, 2) == expected
        assert same_state(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"plateau"}))
def test_a_moved_rate_is_no_finding_before_the_scheduler_is_built(name: str) -> None:
    """The saved initial_lr, or another key of the scheduler, shows that it moved the rate."""
    model, optimizer = build(Net().state_dict())
    schedule(model, optimizer, SCHEDULERS[name](optimizer), 4)
    other, resumed = build(model.state_dict())
    saved = optimizer.state_dict()
    report = preflight(other, optimizer=resumed, resume=model, resume_optimizer=saved)
    assert report.verdict == "ready", unusual(report.findings)
    assert unusual(load_optimizer_state(resumed, other, saved).findings) == []


def test_another_rate_is_a_warning() -> None:
    """The hint does not ask to overwrite what a scheduler of the run set."""
    model, optimizer = build(Net().state_dict())
    schedule(model, optimizer, SCHEDULERS["plateau"](optimizer), 4)
    other, resumed = build(model.state_dict())
    report = preflight(other, optimizer=resumed, resume=model, resume_optimizer=optimizer.state_dict())
    (warning,) = [finding for finding in report.findings if finding.severity != "note"]
    assert warning.code == "preflight.resume-options"
    assert warning.hint.startswith("if a scheduler of the run set it, keep it")
    resumed.param_groups[0]["lr"] = 0.3
    scheduler = SCHEDULERS["cosine"](optimizer)
    SCHEDULERS["cosine"](resumed)
    schedule(model, optimizer, scheduler, 1)
    report = preflight(other, optimizer=resumed, resume=model, resume_optimizer=optimizer.state_dict())
    (warning,) = [finding for finding in report.findings if finding.severity != "note"]
    assert "initial_lr = 0.3 becomes" in warning.message


def test_a_tensor_lr_and_a_frozen_parameter_are_no_finding() -> None:
    """A file keeps a captured rate as a tensor, and a frozen parameter in a group never has state."""
    model, other = Net(), Net()
    for net in (model, other):
        net.fc.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    schedule(model, optimizer, SCHEDULERS["cosine"](optimizer), 2)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.01)
    report = preflight(other, optimizer=resumed, resume=model, resume_optimizer=optimizer.state_dict())
    assert [finding.code for finding in report.findings if finding.severity != "note"] == ["groups.frozen"]
