"""Pickled modules give the state_dict that torch gives, without importing a class."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptkit import open_checkpoint
from ckptkit.errors import FormatError

SOURCE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.stride = torch.tensor([8.0, 16.0])

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2)
        self.tied.weight = self.head.weight
"""

SAVE = """
import detector, torch
torch.manual_seed(0)
model = detector.Detector()
torch.save(model.state_dict(), directory + "/state.pt")
torch.save(model, directory + "/model.pt", _use_new_zipfile_serialization=new)
torch.save({"epoch": 3, "model": None, "ema": model}, directory + "/trainer.pt", _use_new_zipfile_serialization=new)
half = model.half()
torch.save(half.state_dict(), directory + "/half.pt")
args = {"task": "detect", "imgsz": 640, "lr0": 0.01, "model": "detector.yaml"}
best = {"epoch": -1, "best_fitness": None, "model": half, "ema": None, "updates": None, "optimizer": None,
        "train_args": args, "train_metrics": {"fitness": 0.5}, "date": "2026-01-01", "version": "8.4.0"}
torch.save(best, directory + "/best.pt", _use_new_zipfile_serialization=new)
"""


@pytest.fixture(scope="module", params=["zip", "legacy"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a pickled model, whose classes could be imported only while it was saved."""
    directory = tmp_path_factory.mktemp("saved")
    (directory / "detector.py").write_text(SOURCE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.syspath_prepend(directory)
        exec(SAVE, {"directory": str(directory), "new": request.param == "zip"})  # noqa: S102 - the text above
        del sys.modules["detector"]
    return directory


@pytest.mark.parametrize("name", ["model.pt", "trainer.pt"])
def test_a_module_is_its_state_dict(saved: Path, name: str) -> None:
    """Names, order, values and ties equal ``state_dict()``; a note names what ``state_dict()`` leaves out."""
    state = torch.load(saved / "state.pt", weights_only=True)
    with open_checkpoint(saved / name) as checkpoint:
        assert list(checkpoint) == list(state)
        assert all(torch.equal(checkpoint.read(key), value) for key, value in state.items())
        view = checkpoint["head.weight"].view
        assert view is not None
        assert view == checkpoint["tied.weight"].view
        assert "detector.Detector" in checkpoint.references
        assert any("non-persistent buffer" in text and "layers.0.scratch" in text for text in checkpoint.warnings)
        assert any("tensor attribute" in text and "layers.0.stride" in text for text in checkpoint.warnings)
        assert checkpoint.envelope == ("ema" if name == "trainer.pt" else "")
    assert "detector" not in sys.modules


def test_what_a_detector_trainer_publishes_is_the_state_dict_of_its_model(saved: Path) -> None:
    """The weights are the half-precision model; the ema and the training arguments are entries."""
    state = torch.load(saved / "half.pt", weights_only=True)
    with open_checkpoint(saved / "best.pt") as checkpoint:
        assert checkpoint.envelope == "model"
        assert list(checkpoint) == list(state)
        assert {info.dtype for info in checkpoint.values()} == {"F16", "I64"}
        assert all(torch.equal(checkpoint.read(key), value) for key, value in state.items())
        entries = {entry.path: entry.value for entry in checkpoint.entries}
        assert (entries["ema"], entries["epoch"], entries["best_fitness"]) == (None, -1, None)
        assert entries["train_args"] == {"task": "detect", "imgsz": 640, "lr0": 0.01, "model": "detector.yaml"}
    assert "detector" not in sys.modules


def test_a_module_that_contains_itself_ends(tmp_path: Path) -> None:
    """A cycle of modules is refused."""
    model = nn.Sequential(nn.Linear(1, 1))
    model._modules["again"] = model
    path = tmp_path / "loop.pt"
    torch.save(model, path)
    with pytest.raises(FormatError, match=r"nested too deeply|expand too far"):
        open_checkpoint(path)
