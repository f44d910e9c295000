"""ZeRO checkpoints of DeepSpeed give the weights that its own script makes."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.payloads import Extent
from ckptkit.core.ties import shared_keys
from ckptkit.errors import ChangedError, CkptkitError, FormatError
from ckptkit.formats import open_checkpoint, open_optimizer
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import CODE_OF, bits, refusal

MODEL = "mp_rank_00_model_states.pt"
STEP = "global_step2"
GROUPS: list[dict[str, tuple[int, ...]]] = [
    {"emb.weight": (11, 5), "l1.weight": (7, 5), "l2.weight": (5, 7)},
    {"scale": (1,), "l1.bias": (7,), "nothing": (0, 3), "alone": ()},
]
FROZEN: dict[str, tuple[int, ...]] = {"frozen.weight": (3, 5), "frozen.bias": (3,)}


def optim(rank: int, prefix: str = "") -> str:
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_of(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def weights() -> dict[str, torch.Tensor]:
    """Return every fp32 weight by key, as it must be read."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for group in GROUPS for name, shape in group.items()}


def frozen() -> dict[str, torch.Tensor]:
    return {name: torch.arange(float(math.prod(shape))).reshape(shape).bfloat16() for name, shape in FROZEN.items()}


BUFFERS = {"mean": torch.arange(7.0, dtype=torch.bfloat16), "count": torch.tensor(3)}


def expected() -> dict[str, torch.Tensor]:
    whole = weights()
    return {**whole, **BUFFERS, **frozen(), "head.weight": whole["emb.weight"]}


def _sizes(shapes: dict[str, tuple[int, ...]]) -> OrderedDict[str, torch.Size]:
    return OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())


def _model_states(module: dict[str, torch.Tensor], fragments: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "module": OrderedDict(module), "buffer_names": list(BUFFERS), "optimizer": None,
        "param_shapes": [_sizes(group) for group in GROUPS], "frozen_param_shapes": _sizes(FROZEN),
        "shared_params": {"head.weight": "emb.weight"}, "frozen_param_fragments": OrderedDict(fragments),
        "global_steps": 2, "dp_world_size": 2, "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": "0.19.8",
    }  # fmt: skip


def _base(step: int = 2) -> dict[str, Any]:
    state = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(64)}}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}


def _cut_evenly(flat: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    share = -(-len(flat) // ranks)
    padded = torch.cat([flat, flat.new_full((share * ranks - len(flat),), torch.nan)])
    return [part.clone() for part in padded.reshape(ranks, share)] if share else [flat.clone()] * ranks


def save_stage2(
    directory: Path,
    ranks: int = 2,
    *,
    lean: bool = True,
    paddings: bool = False,
    prefix: str = "",
    legacy: bool = False,
) -> Path:
    """Write the files of stages 1 and 2: one vector for each group, padded to twice the ranks and split among them."""
    save_directory = directory / STEP
    save_directory.mkdir(parents=True)
    whole, gaps = weights(), [[0] * len(group) for group in GROUPS]
    parts: list[list[torch.Tensor]] = []
    for number, group in enumerate(GROUPS):
        pieces = []
        for index, name in enumerate(group):
            gaps[number][index] = 3 + index if paddings else 0
            pieces += [whole[name].flatten(), torch.full((gaps[number][index],), torch.nan)]
        flat = torch.cat(pieces)
        end = 2 * ranks * -(-len(flat) // (2 * ranks))
        padded = torch.cat([flat, torch.full((end - len(flat),), torch.nan)])
        parts.append([part[: max(0, len(flat) - n * len(part))] if lean else part
                      for n, part in enumerate(padded.reshape(ranks, -1))])  # fmt: skip
    for rank in range(ranks):
        states: dict[str, Any] = {
            "loss_scaler": None, "base_optimizer_state": _base(), "zero_stage": 2,
            "single_partition_of_fp32_groups": [group[rank].clone() for group in parts],
            "partition_count": [ranks] * len(GROUPS), "ds_version": "0.19.8",
        }  # fmt: skip
        if paddings:
            states["param_alignment_paddings"] = gaps
        torch.save(
            {"optimizer_state_dict": states, "ds_config": {}}, save_directory / optim(rank, prefix),
            _use_new_zipfile_serialization=not legacy,
        )  # fmt: skip
    half = {name: tensor.bfloat16() for name, tensor in whole.items()}
    module = {**half, **BUFFERS, **frozen(), "head.weight": half["emb.weight"]}
    torch.save(_model_states(module, frozen()), save_directory / MODEL)
    (directory / "latest").write_text(STEP)
    (directory / "zero_to_fp32.py").write_text("raise SystemExit('run')")
    return directory


def save_stage3(directory: Path, ranks: int = 2) -> Path:
    """Write the files of stage 3: each parameter is split among the ranks, and the module is empty."""
    save_directory = directory / STEP
    save_directory.mkdir(parents=True)
    cut: dict[str, list[torch.Tensor]] = {
        name: _cut_evenly(tensor.flatten(), ranks) for name, tensor in weights().items()
    }
    cut_frozen = {name: _cut_evenly(tensor.flatten(), ranks) for name, tensor in frozen().items()}
    module = {name: torch.empty(0) for name in (*cut, *cut_frozen, "head.weight")}
    for rank in range(ranks):
        states = {
            "zero_stage": 3, "partition_count": ranks, "optimizer_state_dict": _base(),
            "fp32_flat_groups": [torch.cat([cut[name][rank] for name in group]) for group in GROUPS],
        }  # fmt: skip
        torch.save({"optimizer_state_dict": states, "ds_config": {}}, save_directory / optim(rank))
        fragments = {name: parts[rank] for name, parts in cut_frozen.items()}
        torch.save(_model_states({**module, **BUFFERS}, fragments), save_directory / model_of(rank))
    (directory / "latest").write_text(STEP)
    return directory


def assert_whole(checkpoint: Checkpoint, expected_tensors: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint) == set(expected_tensors)
    for key, tensor in expected_tensors.items():
        info = checkpoint[key]
        assert (info.dtype, info.shape) == (CODE_OF[tensor.dtype], tuple(tensor.shape)), key
        assert checkpoint.payload(key).nbytes == info.nbytes, key
        assert checkpoint.read_bytes(key) == bits(tensor), key


SAVES: dict[str, Callable[[Path], Path]] = {
    "stage 2": save_stage2,
    "stage 2, one rank": lambda path: save_stage2(path, 1),
    "stage 2, three ranks": lambda path: save_stage2(path, 3),
    "stage 2, more ranks than elements": lambda path: save_stage2(path, 40),
    "stage 2, parts with their padding": lambda path: save_stage2(path, 3, lean=False),
    "stage 2, padding behind each parameter": lambda path: save_stage2(path, 2, paddings=True),
    "bf16 names": lambda path: save_stage2(path, prefix="bf16_"),
    "files from before torch 1.6": lambda path: save_stage2(path, legacy=True),
    "stage 3": save_stage3,
    "stage 3, one rank": lambda path: save_stage3(path, 1),
    "stage 3, three ranks": lambda path: save_stage3(path, 3),
    "stage 3, more ranks than elements": lambda path: save_stage3(path, 40),
}


@pytest.mark.parametrize("inside", [False, True], ids=["by latest", "the directory itself"])
@pytest.mark.parametrize("way", SAVES)
def test_the_parts_of_all_ranks_are_joined_to_the_weights(tmp_path: Path, way: str, inside: bool) -> None:
    """Bytes, dtypes and shapes are those of the weights; buffers and frozen parameters keep their dtype."""
    directory = SAVES[way](tmp_path / "run")
    with open_checkpoint(directory / STEP if inside else directory) as checkpoint:
        assert_whole(checkpoint, expected())
        assert shared_keys(checkpoint)["head.weight"] == ("emb.weight",)
        assert checkpoint.format.startswith(f"deepspeed zero stage {'3' if '3' in way[:7] else '1 or 2'} (")
        assert [text.startswith("these are the fp32 weights of the optimizer") for text in checkpoint.warnings] == [
            True
        ]
        assert {entry.path for entry in checkpoint.entries} == {
            "global_steps", "dp_world_size", "ds_config", "ds_version"
        }  # fmt: skip
        checkpoint.check_unchanged()


def test_the_order_is_that_of_the_state_dict(tmp_path: Path) -> None:
    directory = save_stage2(tmp_path / "run")
    module = torch.load(directory / STEP / MODEL)["module"]
    with open_checkpoint(directory) as checkpoint:
        assert list(checkpoint) == list(module)


def test_a_weight_in_one_file_is_a_range_of_that_file(tmp_path: Path) -> None:
    """A weight in the part of one rank is a range of its file; a split weight is read from both files."""
    with open_checkpoint(save_stage2(tmp_path / "run")) as checkpoint:
        plain = {key: isinstance(checkpoint.payload(key), Extent) for key in ("emb.weight", "l1.weight", "l2.weight")}
        assert plain == {"emb.weight": True, "l1.weight": False, "l2.weight": True}


def test_a_zero_checkpoint_can_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = save_stage3(tmp_path / "run", 3)
    ran = run_ckpt(capsys, "convert", directory, "-o", tmp_path / "whole.pt")
    assert ran.code == 0, ran.err
    loaded = torch.load(tmp_path / "whole.pt")
    assert loaded.keys() == expected().keys()
    assert all(bits(loaded[key]) == bits(tensor) for key, tensor in expected().items())
    assert loaded["head.weight"].data_ptr() == loaded["emb.weight"].data_ptr()


def test_the_files_are_reachable(tmp_path: Path) -> None:
    """Each file can be opened by its name after ``::``; a warning names the file of the model's own weights."""
    directory = save_stage2(tmp_path / "run")
    with open_checkpoint(directory) as checkpoint:
        assert f"::{MODEL}" in checkpoint.warnings[0]
    with open_checkpoint(f"{directory}::{MODEL}") as checkpoint:
        assert checkpoint["l1.weight"].dtype == "BF16"
    with open_checkpoint(f"{directory}::{optim(1)}.optimizer_state_dict.base_optimizer_state") as checkpoint:
        assert list(checkpoint) == ["state.0.step", "state.0.exp_avg"]
    assert "holds nothing at 'module'" in refusal(f"{directory}::module").reason
    with pytest.raises(FormatError, match="holds one optimizer state for each rank"):
        open_optimizer(directory)


def test_frozen_parameters_that_are_not_listed_come_from_the_module(tmp_path: Path) -> None:
    """Stage 1 lists no frozen parameters: DeepSpeed's script leaves them out, though the model file has them."""
    directory = save_stage2(tmp_path / "run")
    change(
        directory / STEP / MODEL, lambda states: states.update(frozen_param_shapes=None, frozen_param_fragments=None)
    )
    with open_checkpoint(directory) as checkpoint:
        assert_whole(checkpoint, expected())
        assert "2 parameters without fp32 weights" in checkpoint.warnings[1]


def test_a_warning_names_keys_without_weights(tmp_path: Path) -> None:
    """A tied weight of stage 3 that shared_params does not list is in no file: it is left out with a warning."""
    directory = save_stage3(tmp_path / "run")
    for rank in range(2):
        change(directory / STEP / model_of(rank), lambda states: states.update(shared_params={}))
    with open_checkpoint(directory) as checkpoint:
        assert_whole(checkpoint, {key: tensor for key, tensor in expected().items() if key != "head.weight"})
        assert "left out: head.weight" in checkpoint.warnings[1]


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    states = torch.load(path)
    edit(states)
    torch.save(states, path)


def _inner(rank: int, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda at: change(at / optim(rank), lambda states: edit(states["optimizer_state_dict"]))


def _longer(states: dict[str, Any], more: int) -> None:
    key = "fp32_flat_groups" if "fp32_flat_groups" in states else "single_partition_of_fp32_groups"
    states[key][0] = torch.cat([states[key][0], torch.zeros(more)]) if more > 0 else states[key][0][:more].clone()


def _to_half(states: dict[str, Any]) -> None:
    states["single_partition_of_fp32_groups"][0] = states["single_partition_of_fp32_groups"][0].bfloat16()


def _shape(at: Path, *shape: int) -> None:
    change(at / MODEL, lambda states: states["param_shapes"][0].update({"l2.weight": torch.Size(shape)}))


def _inside_itself() -> list[Any]:
    nested: list[Any] = []
    nested.append(nested)
    return nested


def _remove_optim(at: Path) -> None:
    for path in at.glob("*_optim_states.pt"):
        path.unlink()


_SHORT = {"frozen.bias": torch.ones(2)}

BROKEN: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object], str, str]] = {
    "a rank is missing": (
        save_stage2, lambda at: (at / optim(1)).unlink(), "2 ranks saved, but 1 optim_states file found", ""),
    "the first rank is missing": (
        save_stage2, lambda at: (at / optim(0)).unlink(), "the optim_states file of rank 0 is missing", ""),
    "a rank too many": (
        save_stage2, lambda at: shutil.copy(at / optim(0), at / optim(2)),
        "2 ranks saved, but 3 optim_states files found", ""),
    "a file is cut off": (
        save_stage2, lambda at: (at / optim(1)).write_bytes((at / optim(1)).read_bytes()[:-99]), "truncated", optim(1)),
    "a file is empty": (save_stage2, lambda at: (at / optim(1)).write_bytes(b""), "the file is empty", optim(1)),
    "no model file": (save_stage2, lambda at: (at / MODEL).unlink(), f"{MODEL} is missing, which holds the names", ""),
    "another step": (
        save_stage2, _inner(1, lambda states: states.update(base_optimizer_state=_base(3))),
        "rank 1 was saved at another step of the optimizer than rank 0", optim(1)),
    "another number of ranks": (
        save_stage2, _inner(1, lambda states: states.update(partition_count=[3, 3])), "another number of", optim(1)),
    "experts": (
        save_stage2, _inner(0, lambda states: states.update(partition_count=[2, 1])), "different number", optim(0)),
    "another dtype": (save_stage2, _inner(1, _to_half), "rank 1 has its weights in another dtype", optim(1)),
    "a group more": (
        save_stage2, _inner(1, lambda states: states["single_partition_of_fp32_groups"].append(torch.ones(2))),
        "rank 1 has 3 groups of weights, but rank 0 has 2", optim(1)),
    "a part is short": (
        save_stage2, _inner(0, lambda states: _longer(states, -4)),
        r"'l2.weight': elements 90 to 125 of group 0, but the ranks hold 121", ""),
    "a part is long": (
        save_stage2, _inner(0, lambda states: _longer(states, 9)), "hold 134 elements of group 0, .* have 125", ""),
    "shapes are larger": (save_stage2, lambda at: _shape(at, 5, 8), "'l2.weight': elements 90 to 130 of group 0", ""),
    "shapes are huge": (save_stage2, lambda at: _shape(at, 2**40, 2**40), "'l2.weight': the shape .* overflows", MODEL),
    "shapes are smaller": (save_stage2, lambda at: _shape(at, 5, 5), "125 elements of group 0, .* have 115", ""),
    "a group less of shapes": (
        save_stage2, lambda at: change(at / MODEL, lambda states: states["param_shapes"].pop()), "has 1 group, b", ""),
    "a shape of another kind": (
        save_stage2, lambda at: change(at / MODEL, lambda states: states["param_shapes"][0].update({"l1.weight": 7})),
        "param_shapes has no shape for 'l1.weight'", MODEL),
    "no shapes": (
        save_stage2, lambda at: change(at / MODEL, lambda states: states.pop("param_shapes")),
        "param_shapes is missing", MODEL),
    "no weights": (
        save_stage2, _inner(0, lambda states: states.pop("single_partition_of_fp32_groups")), "no fp32 weig", optim(0)),
    "no flat vector": (
        save_stage2, _inner(0, lambda states: states.update(single_partition_of_fp32_groups=[torch.ones(2, 2)] * 2)),
        "the partition of group 0 is F32", optim(0)),
    "a frozen one is short": (
        save_stage2,
        lambda at: change(at / MODEL, lambda states: states["frozen_param_fragments"].update(_SHORT)),
        "'frozen.bias': the shape has 3 elements, but the fragments have 2", ""),
    "a frozen one is missing": (
        save_stage2, lambda at: change(at / MODEL, lambda states: states["frozen_param_fragments"].pop("frozen.bias")),
        "'frozen.bias' is frozen, but this file has no fragment of the parameter", MODEL),
    "model-parallel": (
        save_stage2, lambda at: shutil.copy(at / optim(0), at / "zero_pp_rank_0_mp_rank_01_optim_states.pt"),
        "model-parallel: each mp rank has its own slice", ""),
    "pipeline": (
        save_stage2, lambda at: (at / "layer_00-model_00-model_states.pt").touch(), "holds layers or experts", ""),
    "bf16 and not": (
        save_stage2, lambda at: shutil.copy(at / optim(0), at / optim(0, "bf16_")), "files of two saves: only", ""),
    "stage 3: a part is short": (
        save_stage3, _inner(1, lambda states: _longer(states, -4)),
        "'l1.bias': elements 65 to 69 of rank 1, which holds 66", ""),
    "stage 3: a part is long": (
        save_stage3, _inner(1, lambda states: _longer(states, 1)), "rank 1 holds .* elements, but its parameters", ""),
    "stage 3: no optim_states": (
        save_stage3, _remove_optim,
        "ZeRO-3: the weights are in the optim_states files, and the directory has none", ""),
    "stage 3: a model file is missing": (
        save_stage3, lambda at: (at / model_of(1)).unlink(), f"{model_of(1)} is missing", ""),
    "stage 3: another step": (
        save_stage3, lambda at: change(at / model_of(1), lambda states: states.update(global_steps=3)),
        f"saved at step 3, but {model_of(0)} at step 2", model_of(1)),
    "stage 3: a step that is none": (
        save_stage3, lambda at: change(at / model_of(1), lambda states: states.update(global_steps=10**6000)),
        f"saved at step None, but {model_of(0)} at step 2", model_of(1)),
    "an enormous number of ranks": (
        save_stage2, _inner(0, lambda states: states.update(partition_count=[10**6000] * 2)),
        "has no partition_count", optim(0)),
    "an enormous size": (
        save_stage2, lambda at: change(at / MODEL, lambda states: states["param_shapes"][0].update(scale=[10**6000])),
        "no shape for 'scale'", MODEL),
    "300,000 sizes": (
        save_stage2,
        lambda at: change(at / MODEL, lambda states: states["param_shapes"][0].update(scale=[255] * 300_000)),
        "no shape for 'scale'", MODEL),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit_together_are_refused(tmp_path: Path, case: str) -> None:
    """Opening the directory raises an error that names the file or the tensor."""
    save, damage, reason, name = BROKEN[case]
    at = save(tmp_path / "run") / STEP
    damage(at)
    with pytest.raises(CkptkitError) as caught:
        open_checkpoint(at)
    assert re.search(reason, caught.value.reason), caught.value.reason
    assert caught.value.path == str(at / name if name else at)


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("../run", "names the unsafe directory '../run'"),
        ("/etc", "names the unsafe directory '/etc'"),
        ("", "names the unsafe directory ''"),
        (".", "names the unsafe directory '.'"),
        ("global_step9", "names 'global_step9', but there is no save of that name in the directory"),
        ("\x1b[2J", r"names '\x1b[2J', but there is no save of that name"),
    ],
)
def test_latest_must_name_a_directory_of_the_save(tmp_path: Path, tag: str, reason: str) -> None:
    directory = save_stage2(tmp_path / "run")
    (directory / "latest").write_text(tag)
    error = refusal(str(directory))
    assert reason in error.reason
    assert error.path == str(directory / "latest")


def test_a_directory_called_latest_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    torch.save(BUFFERS, tmp_path / "weights.pt")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_whole(checkpoint, BUFFERS)


def test_a_model_file_of_stage_3_says_where_its_weights_are(tmp_path: Path) -> None:
    """H15: the file holds names, buffers and pieces of frozen weights, and every other weight in it is empty."""
    path = save_stage3(tmp_path / "run") / STEP / model_of(0)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["l1.weight"].shape == (0,)
        pieces, empty = checkpoint.warnings
    assert pieces == "reads the weights in 'module', and no other tensors: 'frozen_param_fragments'"
    assert empty.startswith("10 weights are empty: ZeRO-3 stores")


def test_steps_that_contain_themselves_are_not_compared(tmp_path: Path) -> None:
    save_stage3(tmp_path / "run")
    for rank in range(2):
        change(tmp_path / "run" / STEP / model_of(rank), lambda states: states.update(global_steps=_inside_itself()))
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert_whole(checkpoint, expected())


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    directory = save_stage2(tmp_path / "run")
    with open_checkpoint(directory) as checkpoint:
        os.utime(directory / STEP / optim(1), ns=(1, 1))
        with pytest.raises(ChangedError):
            checkpoint.check_unchanged()


def test_whole_weights_win_over_a_save_with_a_warning(tmp_path: Path) -> None:
    """transformers writes the gathered weights beside the directory of DeepSpeed."""
    directory = save_stage2(tmp_path / "run")
    torch.save(weights(), directory / "pytorch_model.bin")
    with open_checkpoint(directory) as checkpoint:
        assert_whole(checkpoint, weights())
        (text,) = checkpoint.warnings
        assert text.startswith(f"the folder '{STEP}' holds a further checkpoint, not read; only 'pytorch_model.bin'")
        assert text.endswith(f"'{directory}::{STEP}' opens it")
    with open_checkpoint(f"{directory}::{STEP}") as checkpoint:
        assert_whole(checkpoint, expected())
