"""A preflight compares the live optimizer with the spec, and with the optimizer state that a run saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import build_param_groups, preflight, validate_param_groups

SGD: dict[str, Any] = {
    "optimizer": "SGD",
    "defaults": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "dampening": 0.0, "foreach": False},
    "group": [{"name": "head", "params": "2.*", "lr": 1.0}, {"name": "body", "rest": True}],
}
ADAMW: dict[str, Any] = {
    "optimizer": "AdamW",
    "defaults": {"lr": 0.1, "betas": [0.8, 0.99], "amsgrad": False, "foreach": False, "capturable": False},
    "group": SGD["group"],
}
SPECS = {"SGD": SGD, "AdamW": ADAMW}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def named(model: nn.Module, spec: dict[str, Any]) -> list[Any]:
    return build_param_groups(model, {key: value for key, value in spec.items() if key != "optimizer"})


def built(model: nn.Module, name: str) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(build_param_groups(model, SPECS[name]))
    return optimizer


def another_class(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        [{"params": group["params"], "lr": group["lr"]} for group in named(model, SGD)], foreach=False
    )


def another_option(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = built(model, "SGD")
    optimizer.param_groups[1]["nesterov"] = False
    return optimizer


def one_group(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=False)


def another_group(model: nn.Module) -> torch.optim.Optimizer:
    """The bias of the head is in the group of the body, with the options of neither changed."""
    first, second = built(model, "SGD").param_groups
    bias = model.get_parameter("2.bias")
    head = [parameter for parameter in first["params"] if parameter is not bias]
    groups = [{**first, "params": head}, {**second, "params": [*second["params"], bias]}]
    return torch.optim.SGD([{key: value for key, value in group.items() if key != "param_names"} for group in groups])


def frozen_by_the_spec(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0)


FREEZE: dict[str, Any] = {"unmatched": "freeze", "group": [{"name": "head", "params": "2.*", "lr": 1.0}]}
UNLIKE: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], dict[str, Any], str]] = {
    "another class": (another_class, SGD, "groups.options"),
    "another option": (another_option, SGD, "groups.options"),
    "one group": (one_group, SGD, "groups.moved"),
    "another group": (another_group, SGD, "groups.moved"),
    "frozen by the spec": (frozen_by_the_spec, FREEZE, "groups.moved"),
}


@pytest.mark.parametrize(("make", "spec", "code"), UNLIKE.values(), ids=UNLIKE.keys())
def test_an_optimizer_that_does_not_follow_the_spec_is_not_ready(
    make: Callable[[nn.Module], torch.optim.Optimizer], spec: dict[str, Any], code: str
) -> None:
    """The preflight reports every finding of the validator for the same model, optimizer and spec."""
    model = net()
    optimizer = make(model)
    found = validate_param_groups(model, optimizer, spec=spec).findings
    assert code in {finding.code for finding in found}
    report = preflight(model, groups=spec, optimizer=optimizer)
    assert report.verdict.startswith("not ready")
    assert set(found) <= set(report.findings)
    assert "preflight.spec-ignored" in {finding.code for finding in report.findings}


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda _: None,
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, [1.0, 0.1], total_steps=20),
    "cyclic": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 1.0),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", SPECS)
def test_an_optimizer_that_follows_the_spec_is_ready(name: str, scheduler: str) -> None:
    """A scheduler may have moved the options that it drives, and the step may be computed by another kernel."""
    model = net()
    optimizer = built(model, name)
    schedule = SCHEDULERS[scheduler](optimizer)
    for _ in range(3 if schedule is not None else 0):
        schedule.step()
    for group in optimizer.param_groups:
        group["foreach"] = True
    report = preflight(model, groups=SPECS[name], optimizer=optimizer, schedulers=schedule)
    assert [finding.code for finding in report.findings if finding.severity == "error"] == []
    if schedule is None:
        assert report.verdict == "ready"


LBFGS = torch.optim.LBFGS
# The class, the options that the script builds it with, and those that the run had.
TRAINS_OTHERWISE: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "maximize": (torch.optim.SGD, {"lr": 0.1}, {"lr": 0.1, "maximize": True}),
    "no longer maximize": (torch.optim.AdamW, {"maximize": True}, {}),
    "line search": (LBFGS, {}, {"line_search_fn": "strong_wolfe"}),
    "no line search": (LBFGS, {"line_search_fn": "strong_wolfe"}, {}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "weight decay": (torch.optim.AdamW, {"weight_decay": 0.1}, {"weight_decay": 0.0}),
}
if hasattr(torch.optim, "Adafactor"):
    TRAINS_OTHERWISE["eps"] = (torch.optim.Adafactor, {}, {"eps": (1e-8, 1e-3)})


def run_of(kind: Any, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model after one step, and the state_dict of its optimizer."""
    torch.manual_seed(0)
    model = net()
    optimizer = kind(model.parameters(), **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.as_tensor(model(torch.ones(2, 4)).square().sum())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return model, optimizer.state_dict()


@pytest.mark.parametrize("case", TRAINS_OTHERWISE)
def test_an_option_that_loading_changes_is_reported(case: str) -> None:
    """torch's load_state_dict replaces every option of a group by that of the file."""
    kind, script, run = TRAINS_OTHERWISE[case]
    saved, state = run_of(kind, **run)
    model = net()
    live = kind(model.parameters(), **script)
    report = preflight(model, optimizer=live, resume=saved, resume_optimizer=state)
    (finding,) = [finding for finding in report.findings if finding.code == "preflight.resume-options"]
    assert report.verdict != "ready"
    before = dict(live.param_groups[0])
    live.load_state_dict(state)
    (changed,) = [key for key, value in live.param_groups[0].items() if key != "params" and value != before[key]]
    assert f"{changed} = {before[changed]} becomes {live.param_groups[0][changed]} " in finding.message


def test_maximize_that_an_older_file_lacks_becomes_false() -> None:
    """torch sets the option to False when it loads a file that was saved before the option existed."""
    saved, state = run_of(torch.optim.AdamW)
    del state["param_groups"][0]["maximize"]
    model = net()
    report = preflight(model, optimizer=torch.optim.AdamW(model.parameters()), resume=saved, resume_optimizer=state)
    assert report.verdict == "ready"
    live = torch.optim.AdamW(model.parameters(), maximize=True)
    report = preflight(model, optimizer=live, resume=saved, resume_optimizer=state)
    found = [(one.code, one.severity) for one in report.findings if one.severity != "note"]
    assert found == [("preflight.resume-options", "error")]
    live.load_state_dict(state)
    assert live.param_groups[0]["maximize"] is False


@pytest.mark.parametrize("option", ["foreach", "fused", "capturable", "differentiable"])
def test_an_option_that_only_changes_speed_or_memory_is_not_reported(option: str) -> None:
    """The step has the same result, whichever kernel computes it."""
    saved, state = run_of(torch.optim.AdamW)
    state["param_groups"][0][option] = True
    model = net()
    live = torch.optim.AdamW(model.parameters())
    assert preflight(model, optimizer=live, resume=saved, resume_optimizer=state).verdict == "ready"


RESUMED: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": SCHEDULERS["step"],
    "cosine": SCHEDULERS["cosine"],
    "lambda": SCHEDULERS["lambda"],
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20),
}


@pytest.mark.parametrize("scheduler", RESUMED)
def test_an_option_that_a_scheduler_changed_is_not_reported(scheduler: str) -> None:
    """The scheduler of the resumed run continues from the options of the file; setting them again would break it."""
    saved = net()
    optimizer = torch.optim.AdamW(saved.parameters())
    schedule = RESUMED[scheduler](optimizer)
    for _ in range(5):
        saved(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        schedule.step()
    model = net()
    live = torch.optim.AdamW(model.parameters())
    schedule = RESUMED[scheduler](live)
    assert live.param_groups[0]["lr"] != optimizer.param_groups[0]["lr"]
    report = preflight(
        model, optimizer=live, schedulers=schedule, resume=saved, resume_optimizer=optimizer.state_dict()
    )
    assert [finding for finding in report.findings if finding.code == "preflight.resume-options"] == []
    changed = torch.optim.AdamW(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(changed, 1)
    report = preflight(model, optimizer=changed, resume=saved, resume_optimizer=optimizer.state_dict())
    assert any("initial_lr = 0.5 becomes " in finding.message for finding in report.findings)


def test_a_state_by_name_is_compared_by_name() -> None:
    """Its options count as those of a state by position, also where the run had other groups."""
    saved, state = run_of(torch.optim.AdamW)
    names = [name for name, _ in saved.named_parameters()]
    (group,) = state["param_groups"]
    halves = [
        {**group, "params": names[:2]},
        {**group, "params": names[2:], "maximize": True, "foreach": True},
    ]
    by_name = {"state": {names[key]: slots for key, slots in state["state"].items()}, "param_groups": halves}
    model = net()
    live = torch.optim.AdamW(model.named_parameters())
    report = preflight(model, optimizer=live, resume=saved, resume_optimizer=by_name)
    assert [(finding.code, finding.severity) for finding in report.findings] == [("preflight.resume-options", "error")]
    assert "maximize = False becomes True" in report.findings[0].message
