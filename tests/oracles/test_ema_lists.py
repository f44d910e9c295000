"""What torch_ema and diffusers keep as a list gets the names that their own copy_to() gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_into


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3))


def average(library: str) -> Any:
    if library == "torch_ema":
        return pytest.importorskip("torch_ema").ExponentialMovingAverage
    return pytest.importorskip("diffusers.training_utils", exc_type=ImportError).EMAModel


@pytest.mark.parametrize("library", ["torch_ema", "diffusers"])
def test_the_library_and_load_into_fill_the_same_model(library: str, tmp_path: Path) -> None:
    """After some steps, the saved average and copy_to() give every parameter the same value."""
    trained = model()
    kept = average(library)(trained.parameters(), decay=0.5)
    update = kept.update if library == "torch_ema" else kept.step
    for _ in range(3):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn_like(parameter))
        update(trained.parameters())
    torch.save(kept.state_dict(), tmp_path / "ema.pt")
    theirs, ours = model(), model()
    kept.copy_to(theirs.parameters())
    load_into(ours, tmp_path / "ema.pt")
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(one, other), name
