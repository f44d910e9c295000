"""A dry step says of each parameter what it saw: used or not, where the graph is cut, and who changed a frozen one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ckptkit import preflight
from ckptkit.core.findings import Finding
from ckptkit.readiness import Preflight
from tests.helpers_outputs import same_state


def said(report: Preflight, code: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == f"preflight.{code}"]


def faults(report: Preflight) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity != "note"]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Parts(nn.Module):
    """A frozen embedding, a layer that is used in the way of ``use``, and a head."""

    def __init__(self, use: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4).requires_grad_(False)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.use(self, self.embed(x)))
        return out


def token_loss(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(torch.tensor([[1, 2], [3, 4]])).square().mean()
    return out


def without_grad(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.layer(x)
        return out


def reads_dtype(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x.to(model.layer.weight.dtype)


USES: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "unused": (lambda _, x: x, "does not use"),
    "only its dtype is read": (reads_dtype, "does not use"),
    "no_grad": (without_grad, "gradients are off"),
    "reentrant checkpoint after a frozen embedding": (
        lambda model, x: checkpoint(model.layer, x, use_reentrant=True),
        "checkpoint(use_reentrant=True)",
    ),
    "detach": (lambda model, x: model.layer(x).detach(), "the graph is cut after 'layer'"),
    "argmax": (lambda model, x: x + model.layer(x).argmax(-1, keepdim=True), "the graph is cut after 'layer'"),
    "the output is dropped": (lambda model, x: (model.layer(x), x)[1], "the graph is cut after 'layer'"),
    ".data": (lambda model, x: x @ model.layer.weight.data + model.layer.bias.detach(), "only as .data or detach()"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize(("use", "cause"), USES.values(), ids=USES.keys())
def test_the_cause_of_a_missing_gradient_is_what_was_seen(use: Callable[..., Any], cause: str) -> None:
    """A parameter that the forward pass uses is never called unused."""
    model = Parts(use)
    report = preflight(model, optimizer=torch.optim.AdamW(trained(model)), dry_step=token_loss)
    (finding,) = said(report, "no-gradient")
    assert finding.key == "layer.weight"
    assert cause in finding.message
    assert ("does not use" in finding.message) == (cause == "does not use")


HEALTHY: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "a call": lambda model, x: model.layer(x),
    "without the module": lambda model, x: nn.functional.linear(x, model.layer.weight, model.layer.bias),
    "checkpoint": lambda model, x: checkpoint(model.layer, x, use_reentrant=False),
    "vmap": lambda model, x: torch.func.vmap(model.layer)(x),
}


@pytest.mark.filterwarnings(
    "ignore:.torch.cpu.amp.autocast:FutureWarning"
)  # some versions checkpoint with it themselves
@pytest.mark.parametrize("use", HEALTHY.values(), ids=HEALTHY.keys())
def test_a_parameter_with_a_gradient_has_no_finding(use: Callable[..., Any]) -> None:
    """The use of the parameter need not be a call of its module."""
    model = Parts(use)
    report = preflight(model, optimizer=torch.optim.AdamW(trained(model)), dry_step=token_loss)
    assert faults(report) == []
    assert report.step is not None
    assert report.step.moved == 4


def test_a_loss_without_a_graph_lists_what_was_seen() -> None:
    """The layer is unused, and the graph of the head ends at the output of the model."""
    model = Parts(lambda _, x: x)
    report = preflight(model, dry_step=lambda copy: token_loss(copy).detach())
    (finding,) = said(report, "step-failed")
    assert "'head.weight', 'head.bias': the forward pass uses them" in finding.message
    assert "the graph is cut after the model" in finding.message
    assert "'layer.weight', 'layer.bias': the forward pass does not use them" in finding.message


class Factors(nn.Module):
    """A branch whose last factor is zero: B of LoRA, a zero scale, or a gate that a zero layer computes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.zeros(4))
        self.kind = kind
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = self.a(x)
        if self.kind == "b":
            branch = self.b(branch)
        elif self.kind == "scale":
            branch = self.scale * branch
        else:
            branch = self.gate(branch).chunk(1, -1)[0] * branch
        return x + branch


@pytest.mark.parametrize("kind", ["b", "scale", "gate"])
def test_a_gradient_behind_a_factor_of_zero_is_a_note(kind: str) -> None:
    """The factor trains, so the first step ends this; a factor that is frozen at zero stays a warning."""
    model = Factors(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("a.", kind)))

    def loss(copy: Any) -> torch.Tensor:
        out: torch.Tensor = copy(torch.ones(2, 4)).square().mean()
        return out

    report = preflight(model, optimizer=torch.optim.SGD(trained(model), lr=0.1), dry_step=loss)
    (finding,) = said(report, "zero-gradient")
    assert (finding.severity, finding.key) == ("note", "a.weight")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("a."))
    report = preflight(model, optimizer=torch.optim.SGD(trained(model), lr=0.1), dry_step=loss)
    assert [finding.severity for finding in said(report, "zero-gradient")] == ["warning"]


def test_a_zero_bias_explains_no_gradient_of_zero() -> None:
    """A bias is added, so it blocks no gradient."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100)  # type: ignore[operator]
        model[2].bias.zero_()  # type: ignore[operator]
    report = preflight(model, dry_step=lambda copy: (copy(torch.ones(2, 4)) + 1).square().mean())
    assert said(report, "zero-gradient")[0].severity == "warning"


def test_a_warm_up_from_zero_is_ready() -> None:
    """The dry step uses the rate that the warm-up reaches, and leaves the live groups as they are."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
    report = preflight(
        model, optimizer=optimizer, schedulers=scheduler, dry_step=lambda copy: copy(torch.ones(2, 4)).sum()
    )
    assert faults(report) == []
    assert "initial_lr (0.001)" in said(report, "warm-up")[0].message
    assert report.step is not None
    assert report.step.moved == 2
    assert optimizer.param_groups[0]["lr"] == 0


class Grows(nn.Module):
    """A model that makes its head in the first forward pass, or replaces a parameter in each."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.what = what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "makes" and not hasattr(self, "head"):
            self.head = nn.Linear(4, 2)
        if self.what == "replaces":
            self.a.weight = nn.Parameter(self.a.weight.detach() * 2)
        out: torch.Tensor = self.a(x)
        return self.head(out) if self.what == "makes" else out


@pytest.mark.parametrize(("what", "key"), [("makes", "head.weight"), ("replaces", "a.weight")])
def test_a_parameter_of_the_first_forward_pass_is_named(what: str, key: str) -> None:
    """An optimizer that was built before does not hold it; without one, it is a warning."""
    model = Grows(what)
    report = preflight(
        model, optimizer=torch.optim.AdamW(model.parameters()), dry_step=lambda copy: copy(torch.ones(2, 4)).sum()
    )
    assert [(finding.severity, finding.key) for finding in said(report, "made-in-forward")] == [("error", key)]
    report = preflight(model, dry_step=lambda copy: copy(torch.ones(2, 4)).sum())
    assert [(finding.severity, finding.key) for finding in said(report, "made-in-forward")] == [("warning", key)]


class Muon(torch.optim.Optimizer):
    """An optimizer that steps parameters without a gradient too, as the first Muon did."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


def writes_in_place(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.add_(1)


def writes_data(model: Any) -> None:
    model[0].weight.data = model[0].weight.data * 0.5


@pytest.mark.parametrize(
    ("write", "optimizer", "cause"),
    [
        (writes_in_place, torch.optim.SGD, "the forward or backward pass writes"),
        (writes_data, torch.optim.SGD, "the forward or backward pass writes"),
        (lambda _: None, Muon, "the step of Muon changed"),
    ],
    ids=["in place", ".data", "the optimizer"],
)
def test_who_changed_a_frozen_parameter(write: Callable[[Any], None], optimizer: Any, cause: str) -> None:
    """The forward pass is blamed only where the values changed before the step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)

    def loss(copy: Any) -> torch.Tensor:
        write(copy)
        out: torch.Tensor = copy(torch.ones(2, 4)).square().mean()
        return out

    report = preflight(model, optimizer=optimizer(model.parameters()), dry_step=loss)
    (finding,) = said(report, "frozen-moved")
    assert finding.key == "0.weight"
    assert cause in finding.message


def backbone(mode: str) -> nn.Module:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=mode != "no affine")), nn.Linear(4, 2)
    )
    model[0].requires_grad_(False)
    model.train()
    if mode == "eval":
        model[0].eval()
    if mode == "trains":
        model[0].requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("mode", "is_fault"), [("train", True), ("no affine", True), ("eval", False), ("trains", False)]
)
def test_statistics_of_a_frozen_module_must_not_move(mode: str, is_fault: bool) -> None:
    """Without a dry step this is a note; a dry step sees the change, and leaves the statistics of the model."""
    model = backbone(mode)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    notes = [finding.code for finding in preflight(model, optimizer=optimizer).findings]
    assert ("groups.frozen-statistics" in notes) == is_fault
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = preflight(model, optimizer=optimizer, dry_step=lambda copy: copy(torch.randn(8, 4)).square().mean())
    assert [finding.key for finding in faults(report)] == (["0.1.running_mean"] if is_fault else [])
    assert same_state(dict(model.named_buffers()), before)


class Experts(nn.Module):
    """A mixture that sends the batch to one of its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts[1](x)
        return out


def test_an_expert_that_the_batch_does_not_use_is_a_note() -> None:
    """Another batch will use it."""
    model = Experts()
    report = preflight(
        model, optimizer=torch.optim.AdamW(model.parameters()), dry_step=lambda copy: copy(torch.ones(2, 4)).sum()
    )
    assert [(finding.severity, finding.key) for finding in said(report, "no-gradient")] == [
        ("note", "experts.0.weight")
    ]


def test_the_loss_of_one_of_two_optimizers_is_a_note_about_the_other() -> None:
    """A GAN has a loss for each of its optimizers."""
    model = nn.ModuleDict({"generator": nn.Linear(4, 4), "critic": nn.Linear(4, 1)})
    optimizers = [torch.optim.Adam(part.parameters()) for part in model.values()]
    report = preflight(
        model,
        optimizer=optimizers,
        dry_step=lambda copy: copy["critic"](copy["generator"](torch.ones(2, 4)).detach()).sum(),
    )
    assert [(finding.severity, finding.key) for finding in said(report, "no-gradient")] == [
        ("note", "generator.weight")
    ]
    assert faults(report) == []


def test_random_numbers_of_python_and_numpy_stay() -> None:
    """A loss function may draw from them."""
    import random

    numpy = pytest.importorskip("numpy")

    def loss(copy: Any) -> torch.Tensor:
        factor = random.gauss() + numpy.random.rand()
        out: torch.Tensor = (copy(torch.ones(2, 4)) * factor).sum()
        return out

    random.seed(1)
    numpy.random.seed(1)
    wanted = random.gauss(), numpy.random.rand()
    random.seed(1)
    numpy.random.seed(1)
    preflight(nn.Linear(4, 2), dry_step=loss)
    assert (random.gauss(), numpy.random.rand()) == wanted
