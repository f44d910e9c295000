"""Every optimizer and scheduler of torch.optim, small models for them, real steps, and the findings of a validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from ckptkit.param_groups.validate import validate_param_groups
from tests.features import only_known

Maker = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "ASGD": torch.optim.ASGD,
    "Adadelta": torch.optim.Adadelta,
    **{kind.__name__: kind for kind in only_known(torch.optim, "Adafactor", "Muon")},
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "Adam-amsgrad": lambda groups: torch.optim.Adam(groups, amsgrad=True),
    "AdamW": torch.optim.AdamW,
    "AdamW-tensor-lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.001)),
    "Adamax": torch.optim.Adamax,
    "LBFGS": torch.optim.LBFGS,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "RMSprop-centered": lambda groups: torch.optim.RMSprop(groups, centered=True, momentum=0.9),
    "Rprop": torch.optim.Rprop,
    "SGD": torch.optim.SGD,
    "SGD-momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "SparseAdam": torch.optim.SparseAdam,
}
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lr_scheduler.ConstantLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, [group["lr"] for group in o.param_groups], cycle_momentum="momentum" in o.defaults
    ),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LinearLR": lr_scheduler.LinearLR,
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, [group["lr"] for group in o.param_groups], total_steps=10, cycle_momentum="momentum" in o.defaults
    ),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "SWALR": lambda o: swa_utils.SWALR(o, [group["lr"] / 2 for group in o.param_groups]),  # type: ignore[arg-type]
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 8)], [2]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
}


class Net(nn.Module):
    """Two linear layers and a norm; with ``matrices`` only the two weights."""

    def __init__(self, classes: int = 3, *, matrices: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5, bias=not matrices)
        self.norm = nn.Identity() if matrices else nn.LayerNorm(5)
        self.head = nn.Linear(5, classes, bias=not matrices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.body(x)))
        return out


class Sparse(nn.Module):
    """An embedding with sparse gradients, which only SparseAdam steps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.table(x.long() % 4)
        return out


def net_for(name: str) -> Any:
    """Return a model that the optimizer called ``name`` can step."""
    return Sparse() if name == "SparseAdam" else Net(matrices=name == "Muon")


def step(model: nn.Module, optimizer: Optimizer, count: int = 1) -> None:
    """Make real steps on one fixed batch."""
    batch = torch.linspace(-1, 1, 8, dtype=next(model.parameters()).dtype).reshape(2, 4)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(batch).pow(2).sum()
        loss.backward()
        return loss.detach()

    for _ in range(count):
        optimizer.step(closure)


def codes(model: nn.Module, groups: Any, schedulers: Any = None) -> list[tuple[str, str, str]]:
    """Return code, severity and key of each finding; every finding must have a hint and a message of one line."""
    report = validate_param_groups(model, groups, schedulers=schedulers)
    assert all(finding.hint and "\n" not in finding.message for finding in report.findings)
    return [(finding.code.removeprefix("groups."), finding.severity, finding.key) for finding in report.findings]


def message(model: nn.Module, groups: Any, schedulers: Any = None) -> str:
    """Return the message of the only finding."""
    (finding,) = validate_param_groups(model, groups, schedulers=schedulers).findings
    return finding.message
