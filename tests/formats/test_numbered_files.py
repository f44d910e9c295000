"""Files that are parts of one model by their names are never taken as a whole model without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckptkit.errors import FormatError
from ckptkit.formats import codes, open_checkpoint
from tests.helpers_cli import run_ckpt

SLICES = "with the same keys in several: slices of one model, or copies of it"


def save(directory: Path, *names: str, apart: bool = False) -> Path:
    """Write a small state_dict into each file: with ``apart`` each has a key of its own, else all have one key."""
    for number, name in enumerate(names):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f"layer{number if apart else 0}.weight": torch.ones(2, 2)}, path)
    return directory


PARTS = [
    ("model.00.pth", "model.01.pth"),
    ("consolidated.00-of-02.pth", "consolidated.01-of-02.pth"),
    ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
    ("pytorch_model_tp0.pt", "pytorch_model_tp1.pt"),
    ("reshard-model_part-0.pt", "reshard-model_part-1.pt", "reshard-model_part-2.pt"),
    ("rank_0.pt", "rank_1.pt"),
    ("checkpoint_Rank1.pth", "checkpoint_Rank2.pth"),
]


@pytest.mark.parametrize("names", PARTS, ids=" ".join)
def test_parts_are_refused_or_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    """The directory is refused with a reason, and each file is opened with a warning that names the others."""
    directory = save(tmp_path / "run", *names)
    with pytest.raises(FormatError, match=SLICES) as caught:
        open_checkpoint(directory)
    assert names[0] in caught.value.reason
    for name in names:
        with open_checkpoint(directory / name) as checkpoint:
            (warning,) = checkpoint.warnings
            assert getattr(warning, "code", None) is codes.PART_OF_SEVERAL
            assert f"{name} is one of {len(names)} parts by its name" in warning


OTHERS = [
    ("epoch_1.pt", "epoch_2.pt"),
    ("lora_rank_8.pt", "lora_rank_16.pt"),
    ("stage1.pt", "stage2.pt"),
    ("step0.pt", "step1.pt"),
    ("stamp0.pt", "stamp1.pt"),
    ("ep_0.pt", "ep_1.pt"),
    ("encoder.pt", "decoder.pt"),
]


@pytest.mark.parametrize("names", OTHERS, ids=" ".join)
def test_other_numbers_are_not_parts(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Names with the number of an epoch, a step or a rank of LoRA are separate checkpoints."""
    directory = save(tmp_path / "run", *names)
    with pytest.raises(FormatError, match="a directory with 2 files of weights and no index"):
        open_checkpoint(directory)
    for name in names:
        with open_checkpoint(directory / name) as checkpoint:
            assert not checkpoint.warnings


def test_parts_with_different_keys_can_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal of pipeline parts names the command that joins them, and the command does."""
    directory = save(tmp_path / "run", "pp0.pt", "pp1.pt", apart=True)
    with pytest.raises(FormatError, match="with different keys in each") as caught:
        open_checkpoint(directory)
    assert "ckpt merge" in str(caught.value.hint)
    assert "--on-unexpected add" in str(caught.value.hint)
    out = tmp_path / "out.safetensors"
    parts = [directory / "pp0.pt", directory / "pp1.pt"]
    assert run_ckpt(capsys, "merge", *parts, "--on-unexpected", "add", "-o", out).code == 0
    with open_checkpoint(out) as checkpoint:
        assert list(checkpoint) == ["layer0.weight", "layer1.weight"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("consolidated.00-of-02.pth",), "is one of 2 parts by its name, and the other files are missing"),
        (("model_world_size_2_rank_0.pt",), "is one of 2 parts by its name, and the other files are missing"),
        (("layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt"), "holds one file for each layer and rank"),
    ],
    ids=["the other missing", "another rank missing", "layers of GPT-NeoX"],
)
def test_incomplete_parts_are_refused(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    """One part alone, and files of layers, are not a model."""
    directory = save(tmp_path / "run", *names)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(directory)


def test_the_name_of_the_directory_counts(tmp_path: Path) -> None:
    """Megatron gives each rank a directory: opening it, or its file, says that there are others."""
    directory = save(tmp_path / "run", "mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt")
    for path in (directory / "mp_rank_00", directory / "mp_rank_01" / "model_optim_rng.pt", f"{directory}::mp_rank_00"):
        with open_checkpoint(path) as checkpoint:
            assert "is one of 2 parts by its name" in checkpoint.warnings[0]
