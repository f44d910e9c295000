"""Write ``fixtures/old_torch/optimizers-VERSION.pt``: a run of each optimizer class of an older torch.

The classes are the code of that version: ``torch/optim`` of its wheel, which is pure Python, run by the torch that is
installed. A wheel for another system is small enough, and has the same code:

    pip download --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --python-version 3.10 torch==1.13.1
    python -m tests.make_old_torch torch-1.13.1-cp310-none-macosx_11_0_arm64.whl
"""

from __future__ import annotations

import copy
import importlib
import sys
import tempfile
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = Path(__file__).parent.parent / "fixtures" / "old_torch"
NAME = "old_torch_optim"
# The classes that can step a small dense model, with their options.
CLASSES: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}


class Net(nn.Module):
    """A model of two parameters, so that the files stay small."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.fc(x))


def import_optim(wheel: Path, folder: str) -> Any:
    """Return ``torch.optim`` of a wheel as a module of its own, which imports nothing from the installed one."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("torch/optim/") and name.endswith(".py"):
                target = Path(folder, NAME, *Path(name).parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(archive.read(name).decode().replace("torch.optim", NAME))
    six: Any = types.ModuleType("torch._six")  # torch 1.13 has this module
    six.inf = float("inf")
    sys.modules.setdefault("torch._six", six)
    sys.path.insert(0, folder)
    return importlib.import_module(NAME)


def run_of(kind: Any, optim: Any, **options: Any) -> dict[str, Any]:
    """Return the weights, the optimizer and the scheduler after three steps, which moved the rate."""
    torch.manual_seed(0)
    model = Net()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    return copy.deepcopy(saved)


def main(wheels: list[str]) -> None:
    """Write one file for each wheel."""
    for wheel in map(Path, wheels):
        version = wheel.name.split("-")[1]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optim = import_optim(wheel, folder)
            runs = {
                kind: run_of(getattr(optim, kind), optim, **options)
                for kind, options in CLASSES.items()
                if hasattr(optim, kind)
            }
        torch.save({"version": version, "runs": runs}, FOLDER / f"optimizers-{version}.pt")
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
            del sys.modules[name]


if __name__ == "__main__":
    main(sys.argv[1:])
