"""After ``rebind`` added a group, its rates are those of a run that had the group from the start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from ckptkit import rebind, validate_param_groups
from ckptkit.errors import GroupsError

Make = Callable[[torch.optim.Optimizer], Any]


def sequential(optimizer: torch.optim.Optimizer, milestone: int) -> Any:
    warm = lrs.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return lrs.SequentialLR(optimizer, [warm, lrs.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.01)], [milestone])


def chained(optimizer: torch.optim.Optimizer) -> Any:
    return lrs.ChainedScheduler(
        [
            lrs.ConstantLR(optimizer, 0.5, total_iters=3),
            lrs.ExponentialLR(optimizer, 0.9),
            lrs.StepLR(optimizer, 2, 0.7),
        ]
    )


SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda optimizer: lrs.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda optimizer: lrs.MultiplicativeLR(optimizer, lambda epoch: 1 - 0.1 / epoch),
    "StepLR": lambda optimizer: lrs.StepLR(optimizer, 2, gamma=0.5),
    "MultiStepLR": lambda optimizer: lrs.MultiStepLR(optimizer, [2, 5], gamma=0.5),
    "ConstantLR": lambda optimizer: lrs.ConstantLR(optimizer, 0.3, total_iters=5),
    "LinearLR": lambda optimizer: lrs.LinearLR(optimizer, 0.1, total_iters=6),
    "ExponentialLR": lambda optimizer: lrs.ExponentialLR(optimizer, 0.8),
    "PolynomialLR": lambda optimizer: lrs.PolynomialLR(optimizer, total_iters=9, power=2),
    "CosineAnnealingLR": lambda optimizer: lrs.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.02),
    "CosineAnnealingWarmRestarts": lambda optimizer: lrs.CosineAnnealingWarmRestarts(optimizer, 3, eta_min=0.02),
    "SequentialLR-before": lambda optimizer: sequential(optimizer, 6),
    "SequentialLR-at": lambda optimizer: sequential(optimizer, 4),
    "SequentialLR-after": lambda optimizer: sequential(optimizer, 2),
    "ChainedScheduler": chained,
}


def setting(rates: tuple[Any, ...] = (0.1,), **options: Any) -> tuple[nn.ModuleDict, torch.optim.SGD]:
    """Return a model of two layers, and an optimizer with one group for each of ``rates``."""
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    layers = [
        {"params": [(f"{name}.{leaf}", one) for leaf, one in layer.named_parameters()]} for name, layer in model.items()
    ]
    groups = [{**layer, "lr": rate} for layer, rate in zip(layers, rates, strict=False)]
    return model, torch.optim.SGD(groups, momentum=0.9, **options)


def run(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[list[Any]]:
    """Step the optimizer and the scheduler, and return lr and momentum of each group after each step."""
    seen = []
    for _ in range(count):
        optimizer.step()
        scheduler.step()
        seen.append([[group[key] for group in optimizer.param_groups] for key in ("lr", "momentum")])
        assert scheduler.get_last_lr() == seen[-1][0]
    return seen


def close(one: list[list[Any]], other: list[list[Any]]) -> bool:
    return torch.allclose(torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64), rtol=1e-12)


def check_new_group(make: Make, whole: Make, options: Mapping[str, Any], rate: float = 0.4) -> None:
    """Add a group after four steps, and compare eight more steps with a run that had the group from the start."""
    model, optimizer = setting()
    scheduler = make(optimizer)
    run(optimizer, scheduler, 4)
    inner = list(getattr(scheduler, "_schedulers", ()))
    rebind(optimizer, model, schedulers=scheduler, add_missing={"lr": rate, **options})
    _, reference_optimizer = setting((0.1, rate))
    reference = whole(reference_optimizer)
    run(reference_optimizer, reference, 4)
    assert close(
        [[group["lr"] for group in optimizer.param_groups]],
        [[group["lr"] for group in reference_optimizer.param_groups]],
    )
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert close(run(optimizer, scheduler, 8), run(reference_optimizer, reference, 8))
    assert validate_param_groups(model, optimizer).findings == ()
    assert list(getattr(scheduler, "_schedulers", ())) == inner
    saved = copy.deepcopy({key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"})
    whole(setting((0.1, rate))[1]).load_state_dict(
        {**saved, "lr_lambdas": [None, None]} if "lr_lambdas" in vars(scheduler) else saved
    )


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_new_group_has_the_rates_of_a_group_from_the_start(kind: str) -> None:
    check_new_group(SCHEDULERS[kind], SCHEDULERS[kind], {})


def test_the_values_of_cycles_are_options_of_the_new_group() -> None:
    """OneCycleLR and CyclicLR keep maxima for each group, which their constructors make: the new group gives them."""
    cycle: dict[str, Any] = {"total_steps": 20, "div_factor": 10.0, "final_div_factor": 5.0}
    momenta = {"base_momentum": 0.85, "max_momentum": 0.95}
    check_new_group(
        lambda optimizer: lrs.OneCycleLR(optimizer, 1.0, **cycle),
        lambda optimizer: lrs.OneCycleLR(optimizer, [1.0, 4.0], **cycle),
        {"initial_lr": 0.4, "max_lr": 4.0, "min_lr": 0.08, **momenta},
    )
    momenta = {"base_momentum": 0.8, "max_momentum": 0.9}
    check_new_group(
        lambda optimizer: lrs.CyclicLR(optimizer, 0.1, 1.0, step_size_up=3),
        lambda optimizer: lrs.CyclicLR(optimizer, [0.1, 0.4], [1.0, 2.0], step_size_up=3),
        {"max_lr": 2.0, **momenta},
    )


def test_an_lr_tensor_is_not_shared_between_groups() -> None:
    """torch changes it in place: in a shared tensor, one step of the scheduler changes both groups and the base lr."""
    model, optimizer = setting((torch.tensor(0.1, dtype=torch.float64),))
    scheduler = lrs.StepLR(optimizer, 1, gamma=0.5)
    run(optimizer, scheduler, 1)
    rebind(optimizer, model, schedulers=scheduler, add_missing={"lr": torch.tensor(0.4, dtype=torch.float64)})
    run(optimizer, scheduler, 1)
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.025, 0.1]
    assert [float(base) for base in scheduler.base_lrs] == [0.1, 0.4]


def test_reduce_lr_on_plateau_is_extended_with_its_min_lr() -> None:
    """Earlier reductions of the other groups are not applied to the new group, and the minimum is the same."""
    model, optimizer = setting()
    scheduler = lrs.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=0.05)
    scheduler.step(1.0)
    scheduler.step(1.0)
    rebind(optimizer, model, schedulers=[scheduler], add_missing={"lr": 0.4, "name": "head"})
    assert scheduler.get_last_lr() == [0.05, 0.4]
    for _ in range(5):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_an_existing_group_needs_no_change_of_the_scheduler() -> None:
    """The lists of the scheduler stay the same objects."""
    model, optimizer = setting()
    scheduler = lrs.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    run(optimizer, scheduler, 2)
    bases = scheduler.base_lrs
    model["body"] = nn.Linear(2, 2)
    rebind(optimizer, model, schedulers=scheduler, add_missing=0)
    assert scheduler.base_lrs is bases
    run(optimizer, scheduler, 2)


def two_rates(optimizer: torch.optim.Optimizer) -> Any:
    optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(1)))]})
    return lrs.LambdaLR(optimizer, [lambda epoch: 0.9**epoch, lambda _: 1.0])


def late_group(optimizer: torch.optim.Optimizer) -> Any:
    scheduler = lrs.StepLR(optimizer, 2)
    optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(1)))]})
    return scheduler


class Own(lrs.LRScheduler):
    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]


def cosines(optimizer: torch.optim.Optimizer) -> Any:
    return lrs.ChainedScheduler([lrs.ConstantLR(optimizer, 0.5), lrs.CosineAnnealingLR(optimizer, 9, eta_min=0.01)])


def not_given(optimizer: torch.optim.Optimizer) -> None:
    lrs.StepLR(optimizer, 2)


REFUSALS: dict[str, tuple[Make, str]] = {
    "OneCycleLR": (
        lambda one: lrs.OneCycleLR(one, 1.0, total_steps=9),
        "the new group has no initial_lr .*max_momentum",
    ),
    "CyclicLR": (
        lambda one: lrs.CyclicLR(one, 0.1, 1.0),
        "CyclicLR wrote max_lr, base_momentum, max_momentum into each",
    ),
    "SWALR": (lambda one: SWALR(one, swa_lr=0.1), "SWALR anneals"),
    "different-lambdas": (two_rates, "LambdaLR has a different lr_lambda for each group"),
    "behind": (late_group, r"StepLR has base_lrs for 1 group, and the optimizer has 2"),
    "of-others": (Own, "Own is not a scheduler of torch"),
    "another-optimizer": (lambda _: lrs.StepLR(setting()[1], 2), "StepLR is a scheduler of another optimizer"),
    "no-product": (cosines, "ConstantLR and CosineAnnealingLR change the same learning rate"),
    "not-given": (not_given, "a new group needs the schedulers"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_scheduler_that_cannot_be_extended_is_refused_and_not_changed(case: str) -> None:
    make, message = REFUSALS[case]
    model, optimizer = setting()
    scheduler = make(optimizer)
    groups = [dict(group) for group in optimizer.param_groups]
    lists = (
        {} if scheduler is None else {key: value for key, value in vars(scheduler).items() if isinstance(value, list)}
    )
    copies = copy.copy(lists)
    with pytest.raises(GroupsError, match=message):
        rebind(optimizer, model, schedulers=scheduler, add_missing={"lr": 0.4}, beside=[])
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert lists == copies
