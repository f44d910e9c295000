"""Universal checkpoints of DeepSpeed give the fp32 weights and the moments that ds_to_universal.py joined."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.core.ties import shared_keys
from ckptkit.errors import ChangedError, FormatError
from ckptkit.formats import open_checkpoint, open_optimizer
from tests.helpers_cli import run_ckpt

MODEL = "mp_rank_00_model_states.pt"
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"emb.weight": (11, 5), "a/b.weight": (3,), "l1.weight": (7, 5), "l1.bias": (7,), "scale": ()}
    return {name.replace("/", "_"): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(directory: Path, *, plain: bool = False, model: bool = True) -> Path:
    """Write the files of ds_to_universal.py; ``plain`` writes bare tensors, as in stage 3."""
    state = weights()
    for name, tensor in state.items():
        at = directory / "zero" / name
        at.mkdir(parents=True)
        for number, kind in enumerate(STATES):
            value = tensor * (number + 1)
            torch.save(value if plain else {"param": value, "cat_dim": 0}, at / f"{kind}.pt")
        torch.save(torch.tensor(3.0), at / "step.pt")
    torch.save({"param_groups": [{"lr": 0.1}]}, directory / "zero" / "optimizer_state.pt")
    if model:
        module: dict[str, Any] = {name: tensor.bfloat16() for name, tensor in reversed(state.items())}
        module |= {"mean": torch.arange(3.0), "head.weight": module["emb.weight"]}
        torch.save(
            {
                "module": OrderedDict(module), "buffer_names": ["mean"], "global_steps": 3,
                "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in state.items())],
                "shared_params": {"head.weight": "emb.weight"}, "universal_checkpoint_info": {},
            },
            directory / MODEL,
        )  # fmt: skip
    return directory


@pytest.mark.parametrize("plain", [False, True], ids=["mappings", "tensors"])
def test_the_weights_and_the_moments_are_read(tmp_path: Path, *, plain: bool) -> None:
    """The weights have the keys of the state_dict in order, with buffers and tied weights; moments are selected."""
    directory = save(tmp_path / "global_step3_universal", plain=plain)
    state = weights()
    with open_checkpoint(directory) as checkpoint:
        assert list(checkpoint) == [*reversed(state), "mean", "head.weight"]
        assert torch.equal(checkpoint.read("mean"), torch.arange(3.0))
        assert shared_keys(checkpoint).keys() == {"emb.weight", "head.weight"}
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
        paths = [entry.path for entry in checkpoint.entries]
        assert {"zero/*/exp_avg.pt", "zero/*/step.pt", "global_steps"} <= set(paths)
    with open_checkpoint(f"{directory}::exp_avg_sq") as moments:
        assert sorted(moments) == sorted(state)
        assert all(torch.equal(moments.read(name), tensor * 3) for name, tensor in state.items())


def test_a_converted_checkpoint_keeps_its_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tied weights are written once, and torch loads the values that were saved."""
    directory, out = save(tmp_path / "run"), tmp_path / "out.pt"
    assert run_ckpt(capsys, "convert", directory, "-o", out).code == 0
    loaded = torch.load(out)
    assert loaded["head.weight"].data_ptr() == loaded["emb.weight"].data_ptr()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights().items())


def test_the_directory_of_the_parameters_opens_the_checkpoint(tmp_path: Path) -> None:
    """The path of ``zero`` means the checkpoint, and not the groups of the optimizer that are stored there."""
    directory = save(tmp_path / "run")
    with open_checkpoint(directory / "zero") as checkpoint, open_checkpoint(directory) as whole:
        assert checkpoint.items() == whole.items()


def test_without_model_states_the_names_are_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory of parameters is enough, and the file latest_universal leads to it."""
    save(tmp_path / "run" / "step3_universal", model=False)
    (tmp_path / "run" / "latest_universal").write_text("step3_universal")
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert list(checkpoint) == sorted(weights())
    out = tmp_path / "out.safetensors"
    assert run_ckpt(capsys, "convert", tmp_path / "run", "-o", out).code == 0
    assert run_ckpt(capsys, "diff", tmp_path / "run", out).code == 0
    assert run_ckpt(capsys, "check", tmp_path / "run").code == 0


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no fp32": (lambda d: (d / "zero/scale/fp32.pt").unlink(), "zero/scale has no file fp32.pt"),
    "no parameter": (
        lambda d: shutil.rmtree(d / "zero/scale"),
        "names 'scale', but zero lacks this parameter",
    ),
    "no tensor": (lambda d: torch.save({"x": 1}, d / "zero/scale/fp32.pt"), "holds no tensor at 'param'"),
    "not torch": (lambda d: (d / "zero/scale/fp32.pt").write_bytes(b"x" * 99), "scale/fp32.pt"),
    "no model": (lambda d: torch.save({"x": 1}, d / MODEL), "is not a file of model states"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """A missing file, and a file without a tensor, is an error that names the file."""
    directory = save(tmp_path / "run")
    damage(directory)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(directory)


def test_other_selections_are_refused(tmp_path: Path) -> None:
    """An unknown state, and the state of a single optimizer, are errors that name what there is."""
    directory = save(tmp_path / "run")
    with pytest.raises(FormatError, match="holds nothing at 'momentum'") as caught:
        open_checkpoint(f"{directory}::momentum")
    assert "exp_avg" in str(caught.value.hint)
    with pytest.raises(FormatError, match="one optimizer state for each parameter"):
        open_optimizer(directory)


def test_many_parameters_need_few_open_files(tmp_path: Path) -> None:
    """More parameters than a process may open files are read, and a change of one is found."""
    for number in range(300):
        at = tmp_path / "run" / "zero" / f"p{number}"
        at.mkdir(parents=True)
        torch.save({"param": torch.full((2,), float(number))}, at / "fp32.pt")
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert len(list(Path("/proc/self/fd").iterdir())) < 250
        assert checkpoint.read("p299").tolist() == [299.0, 299.0]
        assert checkpoint.read("p0").tolist() == [0.0, 0.0]
        path = tmp_path / "run" / "zero" / "p7" / "fp32.pt"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(ChangedError):
            checkpoint.check_unchanged()
