"""validate_param_groups checks the modules too: assignments over methods, lost ties, and dtypes within a module."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import preflight, validate_param_groups
from ckptkit.core.findings import Finding
from ckptkit.errors import GroupsError
from tests.features import needs_optimizer


def findings(model: nn.Module) -> tuple[Finding, ...]:
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    return validate_param_groups(model, optimizer).findings


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


ASSIGNED: dict[str, tuple[str, str, object, str]] = {
    "a method of a parameter": ("0.weight", "requires_grad_", False, "parameter.requires_grad_(False)"),
    "a near miss on a parameter": ("0.weight", "require_grad", False, "parameter.requires_grad_(False)"),
    "requires_grad of a module": ("0", "requires_grad", False, "module.requires_grad_(False)"),
    "requires_grad of the model": ("", "requires_grad", False, "module.requires_grad_(False)"),
    "requires_grad_ of a module": ("0", "requires_grad_", False, "module.requires_grad_(False)"),
    "a near miss on a module": ("0", "requires_gradient", False, "module.requires_grad_(False)"),
    "train": ("0", "train", False, "module.train(False)"),
    "eval": ("", "eval", True, "module.eval()"),
    "zero_grad": ("", "zero_grad", None, "module.zero_grad()"),
}


@pytest.mark.parametrize(("path", "name", "value", "meant"), ASSIGNED.values(), ids=ASSIGNED.keys())
def test_an_assignment_over_a_method_is_an_error(path: str, name: str, value: object, meant: str) -> None:
    """It freezes nothing; the hint has the call that was meant, and preflight says the same."""
    model = two_layers()
    target = model.get_parameter(path) if path.endswith("weight") else model.get_submodule(path)
    target.__dict__[name] = value
    (finding,) = findings(model)
    assert (finding.code, finding.severity, finding.key) == ("groups.assignment", "error", path)
    assert meant in finding.hint
    report = preflight(
        model, optimizer=torch.optim.SGD(model.parameters()), dry_step=lambda m: m(torch.ones(1, 4)).sum()
    )
    assert not report.ok


OWN: dict[str, Callable[[Any], None]] = {
    "true of the parameters": lambda model: (
        model[0].requires_grad_(False),
        model[0].__dict__.update(requires_grad=False),
    )[0],
    "a function in place of a method": lambda model: model[0].__dict__.update(forward=lambda x: x),
    "data under the name of a cast": lambda model: model[0].__dict__.update(type="linear", half=True),
    "an attribute of Megatron": lambda model: model[0].weight.__dict__.update(
        sequence_parallel=True, is_embedding=False, _no_weight_decay=True
    ),
}


@pytest.mark.parametrize("change", OWN.values(), ids=OWN.keys())
def test_attributes_that_change_nothing_have_no_finding(change: Callable[[Any], None]) -> None:
    """Libraries keep data of their own on modules and parameters."""
    model = two_layers()
    change(model)
    assert findings(model) == ()


class Language(nn.Module):
    """A model with an embedding and a head, and a configuration that may tie them."""

    def __init__(self, tie: bool, tied: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tie)
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize(("tie", "tied", "is_fault"), [(True, False, True), (True, True, False), (False, False, False)])
def test_a_tie_of_the_configuration_that_the_model_lost(tie: bool, tied: bool, is_fault: bool) -> None:
    """Two parameters would train apart, and a file keeps one of them."""
    found = findings(Language(tie, tied))
    assert [finding.code for finding in found] == (["groups.tie-lost"] if is_fault else [])


TIED: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "one tensor": lambda saved: saved.update({"head.weight": saved["embed.weight"]}),
    "equal values": lambda saved: saved.update({"head.weight": saved["embed.weight"].clone()}),
}


@pytest.mark.parametrize("tie", TIED.values(), ids=TIED.keys())
def test_a_tie_of_init_that_the_model_lost(tie: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A tied model, a frozen model, and a checkpoint without the tie have no such finding."""
    model = Language(False, False)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    assert "preflight.tie-lost" not in [finding.code for finding in preflight(model, init=saved).findings]
    tie(saved)
    found = [finding.code for finding in preflight(model, init=saved).findings]
    assert found.count("preflight.tie-lost") == 1
    for silent in (Language(False, True), Language(False, False).requires_grad_(False)):
        assert "preflight.tie-lost" not in [finding.code for finding in preflight(silent, init=saved).findings]


def test_a_head_that_init_does_not_have_may_be_a_lost_tie() -> None:
    """The hint names the embedding."""
    model = Language(False, False)
    report = preflight(model, init={"embed.weight": model.embed.weight.detach().clone()})
    (kept,) = [finding for finding in report.findings if finding.code == "preflight.kept"]
    assert "'embed.weight'" in kept.hint


def test_parameters_of_one_module_with_two_dtypes() -> None:
    """A linear layer with a bias in another dtype fails; norms in float32 beside layers in bfloat16 are usual."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    model[1].float()
    assert findings(model) == ()
    model[0].weight = nn.Parameter(torch.ones(4, 4))
    assert [(finding.code, finding.severity) for finding in findings(model)] == [("groups.siblings", "warning")]


class Hidden(nn.Module):
    """A language model with one hidden matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False)])
        self.lm_head = nn.Linear(4, 7, bias=False)


@needs_optimizer("Muon")
def test_muon_is_for_hidden_matrices() -> None:
    """Muon steps embeddings and heads as well, but is not made for them; AdamW may have them."""
    model = Hidden()
    report = validate_param_groups(model, torch.optim.Muon(model.parameters()))
    assert [(finding.code, finding.key) for finding in report.findings] == [("groups.hidden-only", "embed.weight")]
    assert "'lm_head.weight'" in report.findings[0].message
    outer = [model.embed.weight, model.lm_head.weight]
    healthy = [torch.optim.Muon(model.layers.parameters()), torch.optim.AdamW(outer)]
    assert validate_param_groups(model, healthy).findings == ()
    keys = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    groups = [
        {"params": [*model.layers.parameters()], "use_muon": True, **keys},
        {"params": outer, "use_muon": False, "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0},
    ]
    assert validate_param_groups(model, groups).findings == ()
    groups[0]["params"] = [*model.parameters()]
    assert "groups.hidden-only" in [finding.code for finding in validate_param_groups(model, groups[:1]).findings]


def test_step_counts_with_moments_of_zero() -> None:
    """The moments were not loaded, or were reset without the count; one parameter with a gradient of 0 is usual."""
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    model[0].get_parameter("weight").grad.zero_()  # type: ignore[union-attr]
    optimizer.step()
    assert validate_param_groups(model, optimizer).findings == ()
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    (finding,) = validate_param_groups(model, optimizer).findings
    assert (finding.code, finding.severity) == ("groups.state-zero", "warning")


class ScheduleFree(torch.optim.Optimizer):
    """An optimizer with the marks of the package schedulefree, which refuses a step in eval mode."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "train_mode": False, "k": 0})

    def train(self) -> None:
        self.param_groups[0]["train_mode"] = True

    def step(self) -> None:  # type: ignore[override]
        if not self.param_groups[0]["train_mode"]:
            raise ValueError("not in train mode")
        self.param_groups[0]["k"] += 1
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["z"] = parameter.detach().clone()


def test_a_schedule_free_optimizer_in_train_mode_while_the_model_is_evaluated() -> None:
    """schedulefree marks its mode in each group; before the first step the two kinds of weights are equal."""
    model = two_layers()
    optimizer = ScheduleFree(model.parameters())
    optimizer.train()
    model.eval()
    assert validate_param_groups(model, optimizer).findings == ()
    optimizer.step()
    assert [finding.code for finding in validate_param_groups(model, optimizer).findings] == ["groups.train-mode"]
    model.train()
    assert validate_param_groups(model, optimizer).findings == ()


def test_a_schedule_free_optimizer_is_ready_and_resumes() -> None:
    """The dry step puts the copy into train mode; what the class counts in its groups is no option."""
    model = two_layers()
    optimizer = ScheduleFree(model.parameters())
    report = preflight(model, optimizer=optimizer, dry_step=lambda copy: copy(torch.ones(1, 4)).sum())
    assert "preflight.step-failed" not in [finding.code for finding in report.findings]
    assert optimizer.param_groups[0]["train_mode"] is False
    saved = two_layers()
    run = ScheduleFree(saved.parameters())
    run.train()
    run.step()
    report = preflight(model, optimizer=optimizer, resume=saved.state_dict(), resume_optimizer=run.state_dict())
    assert [finding.code for finding in report.findings if finding.severity != "note"] == []
    assert "optim.train-mode" in [finding.code for finding in report.findings]


class Computed(nn.Module):
    """A model with a tensor that was computed from a parameter, and activations that it keeps."""

    def __init__(self, change: Callable[[nn.Parameter], torch.Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = change(nn.Parameter(torch.ones(4)))
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.layer(x) * self.scale
        return self.kept


@pytest.mark.parametrize(
    "change",
    [lambda values: values.to(torch.float64), lambda values: values * 0.02, lambda values: values.bfloat16().float()],
    ids=["to", "product", "casts"],
)
def test_a_tensor_that_was_computed_from_a_parameter_never_trains(change: Callable[..., torch.Tensor]) -> None:
    """Kept activations have no finding, and the dry step copies both."""
    model = Computed(change)
    model(torch.ones(1, 4))
    (finding,) = findings(model)
    assert (finding.code, finding.key) == ("groups.unregistered", "scale")
    report = preflight(model, dry_step=lambda copy: copy(torch.ones(1, 4)).sum())
    assert report.step is not None
    assert report.step.gradients == 2
    model = Computed(lambda values: values)
    model(torch.ones(1, 4))
    assert findings(model) == ()


LAZY: dict[str, Any] = {"live": torch.optim.AdamW, "class": "AdamW", "none": None}


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_model_has_a_report(kind: str) -> None:
    """The dry step makes the parameters on the copy; those of the model stay without a shape."""
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    optimizer = LAZY[kind](model.parameters()) if kind == "live" else LAZY[kind]
    report = preflight(model, optimizer=optimizer, dry_step=lambda copy: copy(torch.randn(8, 3)).square().mean())
    assert [(finding.code, finding.key) for finding in report.findings if finding.severity == "warning"] == [
        ("groups.lazy", "0.weight")
    ]
    assert report.step is not None
    assert report.step.gradients == 6
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_a_value_over_a_method_that_lists_parameters_is_refused() -> None:
    """Nothing can be checked without the method."""
    for name in ("parameters", "named_modules", "state_dict"):
        model = two_layers()
        model[0].__dict__[name] = None
        with pytest.raises(GroupsError, match=rf"'0' has a NoneType in place of the method {name}\(\)"):
            preflight(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_model_gets_no_dry_step() -> None:
    """A copy of it runs with the parameters of the original, which would get gradients."""
    model = torch.jit.script(two_layers())
    report = preflight(model, dry_step=lambda copy: copy(torch.ones(1, 4)).sum())
    assert [finding.code for finding in report.findings] == ["preflight.no-copy"]
    assert all(parameter.grad is None for parameter in model.parameters())
