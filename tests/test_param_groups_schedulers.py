"""``validate_param_groups`` finds schedulers that do not fit the groups, each fault made with torch."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from ckptkit import assert_param_groups
from ckptkit.errors import GroupsError
from tests.helpers_optimizers import OPTIMIZERS, SCHEDULERS, Net, codes, message, net_for, step


def two_groups(model: Any, **options: Any) -> torch.optim.SGD:
    groups: list[dict[str, Any]] = [
        {"params": list(model.body.parameters())},
        {"params": list(model.head.parameters()), "lr": 0.01},
        {"params": list(model.norm.parameters()), "weight_decay": 0.01},
    ]
    return torch.optim.SGD(groups, lr=0.1, **options)


def advance(scheduler: Any, count: int = 1) -> list[float]:
    """Step optimizer and scheduler, and return the lrs."""
    for _ in range(count):
        scheduler.optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_fitting_scheduler_has_no_findings(name: str) -> None:
    """A fitting scheduler has no findings when new, after real steps, and after saving and loading."""
    model = Net()
    optimizer = OPTIMIZERS["SGD-momentum"](model.named_parameters())
    scheduler = SCHEDULERS[name](optimizer)
    assert codes(model, optimizer, scheduler) == []
    step(model, optimizer)
    advance(scheduler, 3)
    assert codes(model, optimizer, [scheduler]) == []
    again = OPTIMIZERS["SGD-momentum"](model.named_parameters())
    resumed = SCHEDULERS[name](again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert codes(model, again, resumed) == []


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"SGD-momentum"}))
def test_every_optimizer_with_a_scheduler_has_no_findings(name: str) -> None:
    model = net_for(name)
    optimizer = OPTIMIZERS[name](model.parameters())
    schedulers = [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 10)]
    step(model, optimizer, 2)
    for scheduler in schedulers:
        scheduler.step()
    assert codes(model, optimizer, schedulers) == []


def test_several_groups_with_a_scheduler_have_no_findings() -> None:
    model = Net()
    optimizer = two_groups(model, momentum=0.9)
    for make in SCHEDULERS.values():
        twin = copy.deepcopy((model, optimizer))
        assert codes(twin[0], twin[1], make(twin[1])) == []


MULTIPLY_CURRENT = {"StepLR", "MultiStepLR", "ExponentialLR", "PolynomialLR"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_group_added_after_the_scheduler(name: str) -> None:
    """A group that was added later is an error, unless torch gives it the lr of a group from the start."""
    model = Net()
    rest = [*model.body.parameters(), *model.norm.parameters()]
    optimizer = torch.optim.SGD(rest, lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.2})
    severity = "warning" if name in MULTIPLY_CURRENT else "error"
    found = codes(model, optimizer, scheduler)
    assert ("scheduler-length", severity, "") in found
    if name in MULTIPLY_CURRENT:
        first, later = advance(scheduler, 4)
        assert later == pytest.approx(2 * first)


@pytest.mark.parametrize("name", ["LambdaLR", "CyclicLR", "OneCycleLR", "MultiplicativeLR", "SWALR", "SequentialLR"])
def test_a_later_group_stops_the_scheduler(name: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    optimizer.add_param_group({"params": [*model.head.parameters(), *model.norm.parameters()]})
    assert next(code for code, *_ in codes(model, optimizer, scheduler)) == "scheduler-length"
    if stops_at_other_lengths() or name not in ("LambdaLR", "CyclicLR", "MultiplicativeLR", "SequentialLR"):
        with pytest.raises((ValueError, KeyError)):
            advance(scheduler, 4)


def stops_at_other_lengths() -> bool:
    """Return whether a scheduler of torch notices that it was built for fewer groups; older ones leave some alone."""
    model = Net()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    optimizer.add_param_group({"params": model.head.parameters()})
    optimizer.step()
    try:
        scheduler.step()
    except ValueError:
        return True
    return False


def test_a_later_group_gets_a_wrong_lr_silently() -> None:
    """A later group gets a wrong lr, because LinearLR divides by a warm-up that it never had."""
    model = Net()
    optimizer = torch.optim.SGD(model.body.parameters(), lr=0.1)
    scheduler = lr_scheduler.LinearLR(optimizer, total_iters=3)
    optimizer.add_param_group({"params": [*model.head.parameters(), *model.norm.parameters()], "lr": 0.1})
    assert codes(model, optimizer, scheduler) == [("scheduler-length", "error", "")]
    assert advance(scheduler, 3) == pytest.approx([0.1, 0.3])


def test_the_state_of_a_scheduler_of_other_groups() -> None:
    """The state of a scheduler for other groups is an error; torch loads it, and the next step fails."""
    model = Net()
    saved = lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters(), lr=0.1), lambda _: 1.0).state_dict()
    optimizer = two_groups(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scheduler.load_state_dict(saved)
    assert codes(model, optimizer, scheduler) == [("scheduler-length", "error", "")]
    assert "LambdaLR was built for 1 group (base_lrs), but SGD has 3" in message(model, optimizer, scheduler)
    if stops_at_other_lengths():
        with pytest.raises(ValueError, match="shorter"):
            advance(scheduler)


def test_groups_in_another_order_than_the_scheduler() -> None:
    """Groups in another order than the scheduler has are warnings, because lrs change places."""
    model = Net()
    optimizer = two_groups(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    saved = optimizer.state_dict()
    groups = saved["param_groups"]
    for key in ("lr", "initial_lr"):
        groups[0][key], groups[1][key] = groups[1][key], groups[0][key]
    optimizer.load_state_dict(saved)
    assert codes(model, optimizer, scheduler) == [("scheduler-base-lr", "warning", "")] * 2
    before = [group["lr"] for group in optimizer.param_groups]
    assert advance(scheduler)[:2] == pytest.approx(before[1::-1])


def test_a_new_scheduler_over_a_loaded_state() -> None:
    """A new scheduler after a load is a warning, because it starts from the initial_lr of the file."""
    model = Net()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    advance(lr_scheduler.StepLR(old, 1, gamma=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)
    optimizer.load_state_dict(old.state_dict())
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    assert scheduler.base_lrs == [0.1]
    assert codes(model, optimizer, scheduler) == [("scheduler-initial-lr", "warning", "")]
    optimizer.param_groups[0].pop("initial_lr")  # the way out of the hint
    assert codes(model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 10)) == []


def test_a_scheduler_after_a_warm_up_by_hand() -> None:
    """A second scheduler on one optimizer may start from the lr that the first left."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm_up, main = lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 2)
    assert codes(model, optimizer, [warm_up, main]) == []


def test_a_scheduler_of_another_optimizer() -> None:
    """A scheduler of an old optimizer is an error, because the lr of the new one never changes."""
    model = Net()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ExponentialLR(old, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert codes(model, optimizer, scheduler) == [("scheduler-optimizer", "error", "")]
    advance(scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert codes(model, old, scheduler) == []


def test_a_part_of_a_scheduler_for_another_optimizer() -> None:
    """A part of a scheduler that drives another optimizer is an error; a deepcopy of parts makes one."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(optimizer, 1)])
    scheduler._schedulers[0].optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert codes(model, optimizer, scheduler) == [("scheduler-optimizer", "error", "")]


def test_wrappers_of_accelerate_are_unwrapped() -> None:
    """The wrappers of accelerate are unwrapped, for schedulers and optimizers."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped: Any = SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups)
    inner = lr_scheduler.StepLR(optimizer, 1)
    assert codes(model, wrapped, SimpleNamespace(scheduler=inner, optimizers=[wrapped])) == []
    inner.optimizer = wrapped
    assert codes(model, wrapped, inner) == []
    other = SimpleNamespace(scheduler=lr_scheduler.StepLR(torch.optim.SGD(model.parameters()), 1))
    assert codes(model, wrapped, other) == [("scheduler-optimizer", "error", "")]
    with pytest.raises(GroupsError, match="belongs to another SGD"):
        assert_param_groups(model, wrapped, schedulers=other)


@pytest.mark.parametrize(
    ("make", "severity"),
    [
        (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10, cycle_momentum=False), "warning"),
        (lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False), "warning"),
        (lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=1), "note"),
    ],
    ids=["OneCycleLR", "CyclicLR", "SWALR"],
)
def test_one_lr_for_all_groups(make: Any, severity: str) -> None:
    """One lr for all groups is found, because the scheduler overwrites their lrs; SWALR does so on purpose."""
    model = Net()
    groups: list[dict[str, Any]] = [
        {"params": list(model.body.parameters())},
        {"params": list(model.head.parameters()), "lr": 0.01},
        {"params": list(model.norm.parameters())},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = make(optimizer)
    assert codes(model, optimizer, scheduler) == [("scheduler-flat", severity, "")]
    assert len(set(advance(scheduler, 2))) == 1


def test_one_lr_for_groups_with_different_decay() -> None:
    """Groups that differ in weight decay may share one lr."""
    model = Net()
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    assert codes(model, optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)) == []


def test_a_scheduler_beside_an_optimizer_without_state() -> None:
    """A scheduler past step 0 beside an optimizer without state is a warning."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": 40})
    assert codes(model, optimizer, scheduler) == [("state-empty", "warning", "")]
    step(model, optimizer)
    assert codes(model, optimizer, scheduler) == []


@pytest.mark.parametrize("given", [3, "cosine", [None], {"scheduler": 1}], ids=repr)
def test_other_types_of_schedulers_are_refused(given: Any) -> None:
    model = Net()
    with pytest.raises(GroupsError, match="a scheduler cannot be of type "):
        codes(model, torch.optim.SGD(model.parameters()), given)


def test_a_scheduler_without_its_optimizer_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(GroupsError, match="only groups were given"):
        codes(model, optimizer.param_groups, lr_scheduler.StepLR(optimizer, 1))


def test_an_lr_scale_that_no_scheduler_reads() -> None:
    """lr_scale is a warning with the schedulers of torch, which do not read it."""
    model = Net()
    layers = [model.body, model.norm, model.head]
    groups = [
        {"params": list(layer.parameters()), "lr_scale": scale}
        for layer, scale in zip(layers, (0.25, 0.5, 1.0), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert codes(model, optimizer) == [("multiplier", "warning", "")]
    assert "lr_scale is in 2 groups of SGD (the first is group 0), where lr is still the default 0.1" in message(
        model, optimizer
    )
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    assert len(set(advance(cosine))) == 1
    assert codes(model, optimizer, cosine) == [("multiplier", "warning", "")]
    timm_scheduler = SimpleNamespace(optimizer=optimizer, step=print, update_groups=print, base_values=[0.1, 0.1, 0.1])
    assert codes(model, optimizer, timm_scheduler) == []
    for group in optimizer.param_groups:  # the way out of the hint
        group["lr"] = group["initial_lr"] = group["lr"] * group["lr_scale"]
    assert codes(model, optimizer) == []
