"""``validate_param_groups`` finds wrong learning rates after a resume; the oracle is the run without interruption."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from ckptkit.core.findings import Finding
from ckptkit.param_groups.lock import lock_param_groups
from ckptkit.param_groups.validate import validate_param_groups
from ckptkit.readiness import preflight

Optimizer = torch.optim.Optimizer
Make = Callable[..., Any]

SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o, **k: lrs.LambdaLR(o, lambda epoch: 0.9**epoch, **k),
    "MultiplicativeLR": lambda o, **k: lrs.MultiplicativeLR(o, lambda epoch: 1 - 0.1 / (epoch + 1), **k),
    "StepLR": lambda o, **k: lrs.StepLR(o, 3, **k),
    "MultiStepLR": lambda o, **k: lrs.MultiStepLR(o, [3, 7], **k),
    "ConstantLR": lambda o, **k: lrs.ConstantLR(o, 0.1, 12, **k),
    "LinearLR": lambda o, **k: lrs.LinearLR(o, 0.1, 1, 10, **k),
    "ExponentialLR": lambda o, **k: lrs.ExponentialLR(o, 0.9, **k),
    "PolynomialLR": lambda o, **k: lrs.PolynomialLR(o, 15, 2.0, **k),
    "CosineAnnealingLR": lambda o, **k: lrs.CosineAnnealingLR(o, 6, eta_min=0.001, **k),
    "CosineAnnealingWarmRestarts": lambda o, **k: lrs.CosineAnnealingWarmRestarts(o, 5, **k),
    "CyclicLR": lambda o, **k: lrs.CyclicLR(o, [0.01, 0.002], [0.1, 0.02], 5, **k),
    "OneCycleLR": lambda o, **k: lrs.OneCycleLR(o, [0.1, 0.02], total_steps=20, **k),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1, 4), lrs.CosineAnnealingLR(o, 20)], [4]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, 1, 4), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o, **k: SWALR(o, [0.05, 0.01], **k),  # type: ignore[arg-type]
}


# Built with last_epoch, these resume at a wrong lr with all or some versions of torch, and nothing shows it: they count
# their own steps, or the lr depends on a function that the user wrote.
WITHOUT_EPOCH = ("SWALR", "CosineAnnealingWarmRestarts", "MultiplicativeLR")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def two_groups(model: nn.Sequential, lr: float = 0.1, head_lr: float = 0.02) -> torch.optim.SGD:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    groups: list[dict[str, Any]] = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": head_lr}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def advance(scheduler: Any, count: int) -> list[float]:
    """Step optimizer and scheduler, and return the lrs of all groups before each step."""
    seen: list[float] = []
    for _ in range(count):
        seen.extend(float(group["lr"]) for group in scheduler.optimizer.param_groups)
        scheduler.optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))
    return seen


def found(model: nn.Module, optimizer: Optimizer, schedulers: Any, **more: Any) -> list[Finding]:
    findings = validate_param_groups(model, optimizer, schedulers=schedulers, **more).findings
    assert all(finding.hint and "\n" not in finding.message for finding in findings)
    return list(findings)


def resumed(make: Make, steps: int, saved: tuple[Any, Any]) -> Iterator[tuple[str, nn.Sequential, Optimizer, Any]]:
    """Yield the resumed run in each order of building and loading."""
    for order in ("build-both", "build-both-reversed", "build-between", "scheduler-only", "last-epoch"):
        model = net()
        optimizer, (state, schedule) = two_groups(model), copy.deepcopy(saved)
        if order == "last-epoch":
            optimizer.load_state_dict(state)
            if "last_epoch" not in schedule or "_schedulers" in schedule or "mode_worse" in schedule or not steps:
                continue
            yield order, model, optimizer, make(optimizer, last_epoch=steps - 1)
            continue
        if order == "build-between":
            optimizer.load_state_dict(state)
        scheduler = make(optimizer)
        if order == "build-both":
            optimizer.load_state_dict(state)
        scheduler.load_state_dict(schedule)
        if order == "build-both-reversed":
            optimizer.load_state_dict(state)
        yield order, model, optimizer, scheduler


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_resume_is_found_exactly_where_its_next_lrs_are_wrong(kind: str) -> None:
    """The next four lrs are compared with the run without interruption, for each order of building and loading."""
    make = SCHEDULERS[kind]
    for steps in (0, 1, 3, 6, 8, 12):
        scheduler = make(two_groups(net()))
        advance(scheduler, steps)
        saved = copy.deepcopy((scheduler.optimizer.state_dict(), scheduler.state_dict()))
        expected = advance(scheduler, 4)
        for order, model, optimizer, again in resumed(make, steps, saved):
            findings = [one for one in found(model, optimizer, again) if one.code != "groups.state-empty"]
            is_wrong = advance(again, 4) != pytest.approx(expected, rel=1e-9, abs=1e-12)
            if order == "last-epoch" and kind in WITHOUT_EPOCH:
                assert findings == []
                continue
            assert [(one.code, one.severity) for one in findings] == [("groups.scheduler-lr", "error")] * is_wrong, (
                order,
                steps,
            )
            assert all("built" in one.message and "build the scheduler first" in one.hint for one in findings)


@pytest.mark.parametrize(("kind", "severity"), [("LinearLR", "warning"), ("ConstantLR", "warning"), ("LambdaLR", None),
                                                ("SequentialLR", "note"), ("ChainedScheduler", "warning")])  # fmt: skip
def test_a_wrong_order_is_found_after_more_steps_where_the_lr_stays_wrong(kind: str, severity: str | None) -> None:
    scheduler = SCHEDULERS[kind](two_groups(net()))
    advance(scheduler, 6)
    saved = copy.deepcopy((scheduler.optimizer.state_dict(), scheduler.state_dict()))
    for order, model, optimizer, again in resumed(SCHEDULERS[kind], 6, saved):
        if order.startswith("build"):
            advance(again, 2)
            findings = found(model, optimizer, again)
            expected = [severity] if order == "build-between" and severity else []
            assert [one.severity for one in findings if one.code == "groups.scheduler-lr"] == expected


def test_schedulers_that_share_an_optimizer_have_no_findings() -> None:
    """The last scheduler that was stepped has the lr; SWALR may begin at a later epoch, and be given or not."""
    model = net()
    optimizer = two_groups(model)
    warm, main = lrs.LinearLR(optimizer, 0.1, total_iters=3), lrs.CosineAnnealingLR(optimizer, 9)
    advance(warm, 3)
    assert found(model, optimizer, [warm, main]) == []
    advance(main, 3)
    assert found(model, optimizer, [warm, main]) == []
    average = SWALR(optimizer, [0.05, 0.01])  # type: ignore[arg-type]
    assert found(model, optimizer, [main, average]) == []
    advance(average, 2)
    assert found(model, optimizer, [main, average]) == found(model, optimizer, main) == []
    assert found(model, optimizer, average) == []


def test_an_lr_that_a_script_set_after_a_step() -> None:
    """It is a warning until the next step of the scheduler, which continues from it; then it is a note."""
    model = net()
    optimizer = two_groups(model)
    scheduler = lrs.StepLR(optimizer, 4)
    advance(scheduler, 2)
    for group in optimizer.param_groups:
        group["lr"] *= 0.3
    (finding,) = found(model, optimizer, scheduler)
    assert (finding.code, finding.severity) == ("groups.scheduler-lr", "warning")
    assert finding.message.startswith("group 0 has lr=0.03, but StepLR set 0.1 at step 2 (and 1 group more): a script")
    advance(scheduler, 1)
    assert [one.severity for one in found(model, optimizer, scheduler)] == ["note"]


def test_lr_scale_that_a_script_applies_after_each_step() -> None:
    model = net()
    optimizer = two_groups(model)
    scheduler = lrs.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    advance(scheduler, 2)
    for group, scale in zip(optimizer.param_groups, (0.5, 1.0), strict=True):
        group["lr_scale"] = scale
        group["lr"] *= scale
    assert [one.code for one in found(model, optimizer, scheduler) if "scheduler" in one.code] == []


@pytest.mark.parametrize(
    ("make", "key", "does"),
    [
        (lambda o: lrs.CosineAnnealingLR(o, 6, eta_min=1e-5), "eta_min", "raises it"),
        (lambda o: lrs.CosineAnnealingWarmRestarts(o, 6, eta_min=1e-5), "eta_min", "raises it"),
        (
            lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.CosineAnnealingLR(o, 6, eta_min=1e-5)], [3]),
            "eta_min",
            "raises it",
        ),
        (lambda o: lrs.ReduceLROnPlateau(o, min_lr=1e-5, patience=0), "min_lr", "never reduces it"),
        (
            lambda o: SimpleNamespace(optimizer=o, step=print, base_values=[1e-3, 1e-7], lr_min=1e-5),
            "lr_min",
            "raises it",
        ),
    ],
    ids=["cosine", "restarts", "part", "plateau", "timm"],
)
def test_a_minimum_above_the_lr_of_a_group_is_a_warning(make: Make, key: str, does: str) -> None:
    """The lr of that group rises, or never falls; a minimum below every lr has no finding."""
    model = net()
    optimizer = two_groups(model, 1e-3, 1e-7)
    scheduler = make(optimizer)
    (finding,) = found(model, optimizer, scheduler)
    assert (finding.code, finding.severity) == ("groups.scheduler-minimum", "warning")
    assert f"has {key}=1e-5, which is above the lr of group 1 (lr=1e-7)" in finding.message
    assert finding.message.endswith(does)
    if not isinstance(scheduler, SimpleNamespace):
        before = [group["lr"] for group in optimizer.param_groups]
        advance(scheduler, 7)
        assert optimizer.param_groups[1]["lr"] >= before[1] or does == "raises it"
    optimizer = two_groups(model, 1e-3, 1e-4)
    assert found(model, optimizer, make(optimizer)) == []


class Warm(lrs.LRScheduler):
    """A hand-written warm-up that sets one lr for all groups."""

    def get_lr(self) -> list[Any]:
        return [1e-3 * min(1, (self.last_epoch + 1) / 5) for _ in self.optimizer.param_groups]


SPEC: dict[str, Any] = {
    "defaults": {"lr": 0.1, "momentum": 0.9},
    "group": [{"name": "head", "params": "1.*", "lr": 0.02}, {"name": "base", "rest": True}],
}


def test_a_schedule_that_sets_one_lr_for_all_groups() -> None:
    """It is found by what the schedule makes: the base lrs still differ. At lr 0 or at the minimum nothing is said."""
    model = net()
    optimizer = two_groups(model)
    (finding,) = found(model, optimizer, Warm(optimizer))
    assert (finding.code, finding.severity) == ("groups.scheduler-flat", "warning")
    assert "all 2 groups have lr=2e-4 under Warm, although they started with lrs from 0.02 to 0.1" in finding.message
    for make in (
        lambda o: lrs.LambdaLR(o, lambda epoch: min(1, epoch / 5)),
        lambda o: lrs.CosineAnnealingLR(o, 6, eta_min=0.001),
        lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.1, min_lr=0.01),
        lambda o: lrs.CyclicLR(o, [0.01, 0.002], 0.1),
    ):
        optimizer = two_groups(model)
        scheduler = make(optimizer)
        for _ in range(8):
            assert [one for one in found(model, optimizer, scheduler) if one.code == "groups.scheduler-flat"] == []
            with warnings.catch_warnings(action="ignore"):
                advance(scheduler, 1)


def test_an_lr_that_a_script_sets_is_compared_with_spec_and_lock() -> None:
    """One factor for all groups is a note; one lr for all groups, where the spec has several, is found."""
    model = net()
    lock = lock_param_groups(model, SPEC)
    optimizer = two_groups(model)
    assert found(model, optimizer, None, spec=SPEC) == []
    for group in optimizer.param_groups:
        group["lr"] *= 0.3
    assert [(one.code, one.severity) for one in found(model, optimizer, None, spec=SPEC)] == [
        ("groups.options", "note")
    ] * 2
    assert preflight(model, optimizer=optimizer, groups=SPEC).verdict == "ready"
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    assert [(one.code, one.severity) for one in found(model, optimizer, None, spec=SPEC)] == [
        ("groups.scheduler-flat", "warning"),
        *[("groups.options", "error")] * 2,
    ]
    assert "groups.scheduler-flat" in [one.code for one in found(model, optimizer, None, lock=lock)]
    by_script = SimpleNamespace(optimizer=optimizer, step=print)  # a scheduler that keeps no lr of its own
    assert "groups.scheduler-flat" in [one.code for one in found(model, optimizer, by_script, spec=SPEC)]
    optimizer = two_groups(model)  # the script keeps the base lrs as initial_lr
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.03
    for more in ({"spec": SPEC}, {"lock": lock}):
        (finding,) = [one for one in found(model, optimizer, None, **more) if one.code != "groups.order"]
        assert (finding.code, finding.severity) == ("groups.scheduler-flat", "warning")


def test_the_hint_for_a_late_group_names_rebind() -> None:
    """A scheduler that is built again restarts its schedule."""
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    scheduler = lrs.CosineAnnealingLR(optimizer, 9)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    (finding,) = [one for one in found(model, optimizer, scheduler) if one.code == "groups.scheduler-length"]
    assert "rebind(optimizer, model, add_missing=..., schedulers=...)" in finding.hint


def set_meta_lr(scheduler: Any) -> None:
    scheduler.optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")


ODD: dict[str, tuple[Make, Callable[[Any], object]]] = {
    "meta-lr": (SCHEDULERS["StepLR"], set_meta_lr),
    "last-lr-tensor": (SCHEDULERS["StepLR"], lambda s: setattr(s, "_last_lr", torch.ones(2))),
    "last-lr-none": (SCHEDULERS["LinearLR"], lambda s: setattr(s, "_last_lr", None)),
    "base-lrs-none": (SCHEDULERS["LinearLR"], lambda s: setattr(s, "base_lrs", None)),
    "period-zero": (SCHEDULERS["CosineAnnealingLR"], lambda s: vars(s).update(T_max=0, last_epoch=3)),
    "iterations-zero": (lambda o: lrs.PolynomialLR(o, total_iters=0), lambda _: None),
    "no-milestones": (SCHEDULERS["SequentialLR"], lambda s: setattr(s, "_milestones", None)),
    "no-parts": (SCHEDULERS["ChainedScheduler"], lambda s: setattr(s, "_schedulers", None)),
    "only-step": (lambda o: SimpleNamespace(optimizer=o, step=print, eta_min="x", min_lr=[1, 2]), lambda _: None),
    "fractions": (SCHEDULERS["CosineAnnealingWarmRestarts"], lambda s: [s.step(number / 3) for number in range(9)]),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("case", ODD)
def test_a_scheduler_that_cannot_be_judged_has_no_finding_about_its_lrs(case: str) -> None:
    make, change = ODD[case]
    model = net()
    optimizer = two_groups(model)
    scheduler = make(optimizer)
    change(scheduler)
    assert {one.code for one in found(model, optimizer, scheduler)} <= {"groups.state-empty"}


def test_a_minimum_may_be_a_tensor() -> None:
    model = net()
    optimizer = two_groups(model)
    scheduler = lrs.CosineAnnealingLR(optimizer, 6, eta_min=torch.tensor(0.05))  # type: ignore[arg-type]
    assert [one.code for one in found(model, optimizer, scheduler)] == ["groups.scheduler-minimum"]
