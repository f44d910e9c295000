"""A preflight reports the groups that train, their memory, and whether a run can resume, and torch confirms it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import preflight
from ckptkit.errors import GroupsError
from ckptkit.formats import open_checkpoint, open_optimizer
from ckptkit.readiness import Preflight
from tests.features import require_option

SPEC: dict[str, Any] = {
    "defaults": {"lr": 1e-3},
    "group": [{"name": "head", "params": "head.*", "lr": 1e-2}, {"name": "base", "rest": True}],
}


class Net(nn.Module):
    """A body of two layers of one shape, and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.two(self.one(x))))


def found(report: Preflight, *, least: str = "warning") -> list[str]:
    wanted = {"error"} if least == "error" else {"error", "warning"}
    return [one.code for one in report.findings if one.severity in wanted]


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state_dict of an optimizer after one step."""
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()


def test_a_live_optimizer_is_compared_with_model_and_spec() -> None:
    """Each difference from the spec is an error, and so is a parameter that no group holds."""
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    assert found(preflight(model, optimizer=optimizer)) == []
    report = preflight(model, groups=SPEC, optimizer=optimizer)
    assert found(report) == ["preflight.spec-ignored", "groups.options", *["groups.moved"] * 4]
    assert report.findings[0].message == (
        "the optimizer does not follow the spec: 4 parameters in another group and 1 group with other options"
    )
    assert report.findings[1].message == "group 0 trains with lr=0.001, and the spec says lr=0.01"
    model.head = nn.Linear(4, 3)
    assert "groups.missing" in found(preflight(model, optimizer=optimizer))


def test_a_scheduler_is_checked_with_its_optimizer() -> None:
    """A scheduler of another optimizer is an error."""
    model = Net()
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
    assert "groups.scheduler-optimizer" in found(preflight(model, optimizer=optimizer, schedulers=scheduler))


TWO_GROUPS = {"group": [{"name": "head", "params": "head.*"}, {"rest": True}]}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no owner": ({"groups": {"group": [{"params": "head.*"}]}}, "groups.unowned"),
    "a pattern that matches nothing": (
        {"groups": {"group": [{"params": "hd.*"}, {"rest": True}]}},
        "groups.rule-unmatched",
    ),
    "a class that refuses": ({"optimizer": "LBFGS", "groups": TWO_GROUPS}, "preflight.optimizer"),
    "a beta of one": ({"groups": {"group": [{"rest": True, "betas": [1.0, 0.9]}]}, "optimizer": "Adam"}, "groups."),
}


@pytest.mark.parametrize(("given", "code"), BAD.values(), ids=BAD.keys())
def test_groups_that_cannot_train_are_an_error(given: dict[str, Any], code: str) -> None:
    """The fault may be in the spec, in the class, or in both together."""
    report = preflight(Net(), **given)
    assert not report.ok
    assert any(one.startswith(code) for one in found(report, least="error"))


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("AdamV", "torch.optim has no optimizer 'AdamV'"),
        (3, "the optimizer cannot be of type int"),
        ([1], "the optimizer cannot be of type list"),
    ],
    ids=["a misspelled name", "a number", "a list"],
)
def test_an_argument_that_is_not_an_optimizer_is_refused(optimizer: Any, reason: str) -> None:
    """This is an exception, not a finding."""
    with pytest.raises(GroupsError) as caught:
        preflight(Net(), optimizer=optimizer)
    assert caught.value.reason == reason


def test_a_model_with_all_parameters_frozen_is_not_ready() -> None:
    """torch would build the optimizer without an error."""
    model = Net().requires_grad_(False)
    assert found(preflight(model)) == ["preflight.nothing-trains"]


def test_trainable_parameters_are_counted_by_module() -> None:
    """A module that trains in part has a row for each parameter."""
    model = Net()
    model.one.requires_grad_(False)
    model.two.bias.requires_grad_(False)
    rows = [(row.module, row.trainable, row.parameters) for row in preflight(model).training]
    assert rows == [("one", 0, 2), ("two.weight", 1, 1), ("two.bias", 0, 1), ("head", 2, 2)]


def test_an_eps_that_is_zero_in_float16_is_an_error() -> None:
    """One step with a gradient of zero really makes the weight NaN."""
    model = Net().half()
    optimizer = torch.optim.AdamW(model.parameters())
    assert "preflight.eps" in found(preflight(model, optimizer=optimizer), least="error")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert bool(model.head.weight.isnan().all())
    larger = torch.optim.AdamW(Net().half().parameters(), eps=1e-4)
    assert "preflight.eps" not in found(preflight(Net().half(), optimizer=larger))


def test_updates_that_bfloat16_loses_are_a_warning() -> None:
    """A weight of 1 does not change at lr = 1e-3, and the dry step reports this too."""
    model = Net().to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    report = preflight(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0),
        dry_step=lambda twin: twin(torch.ones(2, 4, dtype=torch.bfloat16)).sum(),
    )
    assert {"preflight.bf16-weights", "preflight.not-moved"} <= set(found(report))
    assert report.step is not None
    assert (report.step.gradients, report.step.moved) == (6, 0)


def test_integer_parameters_and_mixed_dtypes_are_notes() -> None:
    """Both can be intended."""
    model = Net()
    model.head.double()
    model.register_parameter("scale", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    notes = [one.code for one in preflight(model).findings if one.severity == "note"]
    assert notes == ["preflight.integers", "preflight.mixed-dtypes"]


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "Adam with amsgrad": ("Adam", {"amsgrad": True}),
    "SGD": ("SGD", {}),
    "SGD with momentum": ("SGD", {"momentum": 0.9}),
    "RMSprop": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "Adagrad": ("Adagrad", {}),
    "Adafactor": ("Adafactor", {}),
    "NAdam": ("NAdam", {}),
}
OPTIMIZERS = {name: row for name, row in OPTIMIZERS.items() if hasattr(torch.optim, row[0])}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_memory_estimate_is_exact(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """It equals the bytes of parameters, gradients and state after a step; a frozen layer has no gradient or state."""
    model = Net().to(dtype)
    model.one.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, kind)(parameters, lr=1e-3, **options)
    memory = preflight(model, optimizer=optimizer).memory
    assert memory is not None
    model(torch.ones(2, 4, dtype=dtype)).sum().backward()
    assert memory.parameters == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.step()
    state = sum(v.nbytes for slots in optimizer.state.values() for v in slots.values() if isinstance(v, torch.Tensor))
    assert memory.states[0].nbytes == state
    assert memory.total == memory.parameters + memory.gradients + state


def test_tied_parameters_count_once_and_a_class_may_be_unknown() -> None:
    """Buffers are counted separately."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "n": nn.BatchNorm1d(4)})
    model["b"].weight = model["a"].weight
    memory = preflight(model, optimizer=torch.optim.LBFGS(model.parameters())).memory
    assert memory is not None
    assert (memory.parameters, memory.buffers) == (4 * (16 + 4 + 4 + 8), 4 * 8 + 8)
    assert memory.states[0].nbytes is None


def run_of(kind: Any = torch.optim.AdamW, **options: Any) -> tuple[Net, dict[str, Any]]:
    torch.manual_seed(0)
    model = Net()
    return model, stepped(model, kind(model.named_parameters(), lr=1e-3, **options))


def test_a_run_that_did_not_change_is_ready(tmp_path: Path) -> None:
    """The state may be a state_dict or the file that holds it."""
    saved, state = run_of()
    torch.save({"model": saved.state_dict(), "optimizer": state, "epoch": 3}, tmp_path / "run.pt")
    model = Net()
    live = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    report = preflight(model, optimizer=live, resume=saved, resume_optimizer=state)
    assert report.verdict == "ready"
    assert report.resume is not None
    assert (report.resume.matched, report.resume.positions, report.resume.with_state) == (6, 6, 6)
    with open_checkpoint(tmp_path / "run.pt") as weights, open_optimizer(tmp_path / "run.pt") as inside:
        assert preflight(model, optimizer=live, resume=weights, resume_optimizer=inside) == report


def swap(state: dict[str, Any]) -> None:
    """Change the names as in the file of a model that registered its layers in another order."""
    (group,) = state["param_groups"]
    names = group["param_names"]
    group["param_names"] = [*names[2:4], *names[:2], *names[4:]]


def shrink(state: dict[str, Any]) -> None:
    state["state"][4]["exp_avg"] = torch.zeros(7, 4)
    state["state"][4]["exp_avg_sq"] = torch.zeros(7, 4)


RUNS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "another order": (swap, "error", "preflight.resume-order"),
    "another shape": (shrink, "error", "preflight.resume-shape"),
    "fewer groups": (lambda state: state["param_groups"][0]["params"].pop(), "error", "optim.state-stray"),
    "no state of one": (lambda state: state["state"].pop(0), "warning", "preflight.resume-new"),
    "a slot missing": (lambda state: state["state"][0].pop("exp_avg_sq"), "error", "preflight.resume-class"),
    "another lr": (lambda state: state["param_groups"][0].update(lr=0.5), "warning", "preflight.resume-options"),
    "Adam's decay": (
        lambda state: state["param_groups"][0].update(decoupled_weight_decay=False),
        "error",
        "preflight.resume-class",
    ),
    "no betas": (lambda state: state["param_groups"][0].pop("betas"), "error", "preflight.resume-lost"),
    "a position twice": (lambda state: state["param_groups"][0].update(params=[0, 0, 2, 3, 4, 5]), "error", "optim."),
}


@pytest.mark.parametrize(("change", "severity", "code"), RUNS.values(), ids=RUNS.keys())
def test_a_run_that_differs_is_reported(
    change: Callable[[dict[str, Any]], Any], severity: str, code: str, request: pytest.FixtureRequest
) -> None:
    """torch loads most of these states without an error."""
    if code == "preflight.resume-class" and "decay" in request.node.callspec.id:
        require_option("Adam", "decoupled_weight_decay")
    saved, state = run_of()
    change(state)
    model = Net()
    live = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    report = preflight(model, optimizer=live, resume=saved, resume_optimizer=state)
    assert any(one.severity == severity and one.code.startswith(code) for one in report.findings), report


def test_groups_of_other_sizes_are_an_error() -> None:
    """torch refuses such a state too."""
    saved, state = run_of()
    report = preflight(Net(), groups=SPEC, optimizer="AdamW", resume=saved, resume_optimizer=state)
    assert found(report, least="error") == ["preflight.resume-groups"]
    model = Net()
    live = torch.optim.AdamW([{"params": list(model.head.parameters())}, {"params": list(model.one.parameters())}])
    with pytest.raises(ValueError, match="parameter groups"):
        live.load_state_dict(state)


def test_the_state_of_another_class_is_an_error() -> None:
    """torch loads such a state and fails in the step."""
    saved, state = run_of(torch.optim.SGD, momentum=0.9)
    model = Net()
    live = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    report = preflight(model, optimizer=live, resume=saved, resume_optimizer=state)
    assert "preflight.resume-class" in found(report, least="error")


def test_weights_of_another_model_are_an_error() -> None:
    """Each kind of difference has its own finding."""
    report = preflight(Net(), resume=Net(classes=5))
    assert found(report) == ["preflight.resume-weights"]
    state = {f"module.{key}": value for key, value in Net().state_dict().items()}
    errors = [one for one in preflight(Net(), resume=state).findings if one.severity == "error"]
    assert len(errors) == 2
    assert "'module.*=*'" in errors[0].hint


def test_without_groups_the_model_must_identify_the_parameters() -> None:
    """In one group the order identifies two layers of one shape; in two groups it does not."""
    model = Net()
    state = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert found(preflight(Net(), resume=model, resume_optimizer=copy.deepcopy(state))) == []
    groups = [{"params": list(model.two.parameters())}, {"params": [*model.one.parameters(), *model.head.parameters()]}]
    unclear = stepped(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    assert found(preflight(Net(), resume=model, resume_optimizer=unclear)) == ["preflight.resume-unclear"]


@pytest.mark.parametrize(
    ("rates", "warmup", "severity"),
    [((0.0, 0.0), False, "error"), ((0.1, 0.0), False, "warning"), ((0.1, 0.1), True, None), ((0.1, 0.1), False, None)],
    ids=["all", "one", "warm-up", "none"],
)
def test_an_lr_of_zero_is_not_ready(rates: tuple[float, float], warmup: bool, severity: str | None) -> None:
    """A real step confirms which modules change; a warm-up may begin at 0."""
    model = Net()
    parts = [model.head, nn.Sequential(model.one, model.two)]
    groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(parts, rates, strict=True)]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10) if warmup else None
    report = preflight(model, optimizer=optimizer, schedulers=scheduler)
    assert [one.severity for one in report.findings if one.code == "preflight.lr-zero"] == (
        [severity] if severity else []
    )
    assert (severity == "error") == report.verdict.startswith("not ready: no step changes")
    before = copy.deepcopy(model.state_dict())
    stepped(model, optimizer)
    if scheduler is not None:
        scheduler.step()
        stepped(model, optimizer)
    moved = {
        name.partition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert len(moved) == {"error": 0, "warning": 1, None: 3}[severity]
