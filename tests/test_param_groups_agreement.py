"""The validator compares live groups with a spec, also after schedulers changed the learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.core.findings import Finding
from ckptkit.errors import GroupsError
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.validate import validate_param_groups
from ckptkit.readiness import preflight

SPEC: dict[str, Any] = {
    "defaults": {"lr": 0.1, "weight_decay": 0.05},
    "group": [{"name": "head", "params": "2.*", "lr": 1.0}, {"name": "base", "rest": True}],
}
ADAM: dict[str, Any] = {**SPEC, "defaults": {"lr": 0.1, "betas": [0.8, 0.99]}}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def findings(model: nn.Module, groups: Any, spec: Any = SPEC) -> list[Finding]:
    found = validate_param_groups(model, groups, spec=spec).findings
    assert all(finding.hint and "\n" not in finding.message for finding in found)
    return list(found)


def by_hand(model: nn.Module) -> list[dict[str, Any]]:
    head, base = model.get_submodule("2").parameters(), model.get_submodule("0").parameters()
    return [{"params": head, "lr": 1.0}, {"params": base}]


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "groups": lambda model: build_param_groups(model, SPEC),
    "optimizer": lambda model: torch.optim.SGD(build_param_groups(model, SPEC)),
    "bare": lambda model: torch.optim.SGD(build_param_groups(model, SPEC, bare=True)),
    "other-order": lambda model: torch.optim.SGD(build_param_groups(model, SPEC)[::-1]),
    "by-hand": lambda model: torch.optim.SGD(by_hand(model), lr=0.1, weight_decay=0.05),
}


@pytest.mark.parametrize("form", FORMS)
def test_groups_that_follow_the_spec_have_no_findings(form: str) -> None:
    """Groups correspond by name or by their parameters, in any order, also after the model was wrapped."""
    model = net()
    groups = FORMS[form](model)
    assert findings(model, groups) == []
    assert findings(nn.DataParallel(model), groups, {**SPEC, "group": [{**SPEC["group"][0], "params": "*2.*"},
                                                                       SPEC["group"][1]]}) == []  # fmt: skip


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "warm-up": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, [1.0, 0.1], total_steps=20),
    "cyclic": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 1.0),
    "swa": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=2),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_learning_rate_that_a_scheduler_changed_is_not_a_difference(schedule: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(build_param_groups(model, ADAM))
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = SCHEDULES[schedule](optimizer)
    for _ in range(3):
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] != before
    assert findings(model, optimizer, ADAM) == []


def test_a_parameter_in_another_group_is_an_error() -> None:
    model = net()
    weight, bias = model[2].parameters()
    groups: list[dict[str, Any]] = [
        {"params": [weight], "name": "head", "lr": 1.0},
        {"params": [*model[0].parameters(), bias], "name": "base"},
    ]
    (finding,) = findings(model, torch.optim.SGD(groups, lr=0.1, weight_decay=0.05))
    assert (finding.code, finding.severity, finding.key) == ("groups.moved", "error", "2.bias")
    assert finding.message == "the live group of '2.bias' is group 1 ('base'), and the spec says 'head'"


def test_options_that_load_state_dict_replaced_are_an_error() -> None:
    """torch uses the options of the file, not those that the groups were built with."""
    model = net()
    older = torch.optim.SGD(build_param_groups(model, [{"params": "2.*", "lr": 0.5}, {"rest": True, "lr": 0.1}]))
    optimizer = torch.optim.SGD(build_param_groups(model, SPEC))
    optimizer.load_state_dict(older.state_dict())
    head, base = findings(model, optimizer)
    assert (head.code, head.severity, head.key) == ("groups.options", "error", "head")
    assert "trains with lr=0.5, weight_decay=0, and the spec says lr=1, weight_decay=0.05" in head.message
    assert "trains with weight_decay=0, and the spec says weight_decay=0.05" in base.message


def test_another_optimizer_class_is_an_error() -> None:
    model = net()
    spec = {**SPEC, "optimizer": "AdamW"}
    assert findings(model, torch.optim.AdamW(build_param_groups(model, spec)), spec) == []
    found = findings(model, torch.optim.SGD(build_param_groups(model, spec)), spec)
    assert "group 0 ('head') trains with SGD, and the spec says AdamW" in found[0].message


def test_a_parameter_that_the_spec_freezes_must_be_in_no_group() -> None:
    spec = {"unmatched": "freeze", "group": [{"name": "head", "params": "2.*", "lr": 1.0}]}
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert [(finding.code, finding.key) for finding in findings(model, optimizer, spec)] == [
        ("groups.moved", "0.weight"),
        ("groups.moved", "0.bias"),
    ]
    assert "is in group 0, and the spec freezes it" in findings(model, optimizer, spec)[0].message
    assert findings(model, torch.optim.SGD(build_param_groups(model, spec)), spec) == []


def test_faults_of_the_spec_are_findings_too() -> None:
    """A spec that cannot be read is an exception."""
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    found = findings(model, optimizer, [{"params": "hd.*", "lr": 1.0}, {"rest": True}])
    assert [finding.code for finding in found] == ["groups.missing", "groups.missing", "groups.rule-unmatched"]
    with pytest.raises(GroupsError, match="no group"):
        validate_param_groups(model, optimizer, spec=[])


def test_an_option_that_only_changes_speed_is_compared_by_the_validator_alone() -> None:
    """The validator reports every option of the spec; the preflight ignores how fast a step runs."""
    model = nn.Linear(2, 2)
    spec = {"defaults": {"lr": 0.1, "foreach": True}, "group": [{"name": "all", "params": "*"}]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    report = validate_param_groups(model, optimizer, spec=spec)
    assert [(finding.code, finding.severity) for finding in report.findings] == [("groups.options", "error")]
    assert preflight(model, groups=spec, optimizer=optimizer).verdict == "ready"
