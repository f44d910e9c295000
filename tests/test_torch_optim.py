"""The table of group options agrees with what torch's optimizers and schedulers really do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from ckptkit import build_param_groups, validate_param_groups
from ckptkit.core.torch_optim import (
    OPTIONS,
    OptionKind,
    initial_lr,
    options_of_kind,
    overwritten_options,
    source_of_names,
)
from tests.features import needs_option, takes_names

KINDS: dict[str, Any] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}


def stepped(kind: str, **options: Any) -> torch.Tensor:
    """Return a parameter after three steps of an optimizer."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 12))
    optimizer = KINDS[kind]([parameter], lr=0.1, weight_decay=0.1, **options)
    for number in range(3):
        parameter.grad = torch.linspace(0.1, number + 1, 12)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_an_option_of_speed_does_not_change_a_step(kind: str, option: str) -> None:
    """The other options of speed need a GPU or a graph of the step."""
    assert OPTIONS[option].kind == "speed"
    assert torch.allclose(stepped(kind, **{option: True}), stepped(kind, **{option: False}))


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("SGD", "maximize"),
        ("AdamW", "maximize"),
        pytest.param("Adam", "decoupled_weight_decay", marks=needs_option("Adam", "decoupled_weight_decay")),
    ],
)
def test_an_option_of_training_changes_a_step(kind: str, option: str) -> None:
    """Both values give other parameters."""
    assert OPTIONS[option].kind == "training"
    assert not torch.allclose(stepped(kind, **{option: True}), stepped(kind, **{option: False}))


def test_an_option_that_is_not_listed_changes_training() -> None:
    """An unknown option of another optimizer is never left out of a comparison."""
    others = [kind for kind in get_args(OptionKind) if kind != "training"]
    assert "prodigy_steps" not in options_of_kind(*others)
    assert "lr" not in OPTIONS


Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
SCHEDULERS: dict[str, Scheduler] = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=20),
    "CyclicLR": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 1.0),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=2),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_option_that_a_scheduler_writes_is_known(scheduler: str, kind: str) -> None:
    """A scheduler overwrites the listed options, or it changes only the lr and keeps the first lr in the group."""
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = KINDS[kind]([nn.Parameter(torch.ones(2))], lr=0.1, **options)
    before = dict(optimizer.param_groups[0])
    schedule = SCHEDULERS[scheduler](optimizer)
    for _ in range(3):
        schedule.step()
    (group,) = optimizer.param_groups
    changed = {key for key, value in before.items() if key != "params" and group[key] != value}
    added = group.keys() - before.keys()
    assert "lr" in changed
    assert added <= options_of_kind("schedule")
    assert changed - overwritten_options(group) <= {"lr"}
    assert "lr" in overwritten_options(group) or initial_lr(group) == before["lr"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_recent_option_gets_the_default(kind: str) -> None:
    """load_state_dict turns off what an older file does not have, except the meaning of weight decay."""
    optimizer = KINDS[kind]([nn.Parameter(torch.ones(2))], lr=0.1, maximize=True)
    state = optimizer.state_dict()
    for option in OPTIONS.values():
        if option.is_recent:
            state["param_groups"][0].pop(option.name, None)
    optimizer.load_state_dict(state)
    for option in OPTIONS.values():
        if option.is_recent and option.name in optimizer.defaults:
            value = optimizer.param_groups[0][option.name]
            assert not value or (option.name, kind) == ("decoupled_weight_decay", "AdamW")


def test_hints_about_names_say_what_the_optimizers_of_this_torch_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of ``build_param_groups`` record names with each torch, and pairs with the torch that takes them."""
    add: Any = torch.optim.Optimizer.add_param_group
    if not takes_names():
        monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", add.__wrapped__)  # what users have
    source_of_names.cache_clear()
    model = nn.Linear(2, 2)
    try:
        expected = "model.named_parameters()" if takes_names() else "build_param_groups(model, spec)"
        assert source_of_names() == expected
        optimizer = torch.optim.SGD(build_param_groups(model, {"group": [{"name": "all", "rest": True}]}), lr=0.1)
    finally:
        source_of_names.cache_clear()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert validate_param_groups(model, optimizer).findings == ()
