"""Files of DTensors, one for each rank, give the tensors that were distributed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptkit import load_into
from ckptkit.errors import ChangedError, FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.layout import Box
from ckptkit.formats.pickle.values import CodeName, Placeholder
from ckptkit.formats.torch.dtensor import describe_pieces, piece_of, read_layout
from ckptkit.formats.torch.objects import StorageRef, TensorRef
from tests.features import Partial, Replicate, Shard, _StridedShard
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import refusal
from tests.helpers_ranks import Placed, save_dtensors, save_sharded_tensors


def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape).to(dtype)


FLAT: Placed = {
    "rows": (made(5, 3), "", (Shard(0),)),
    "columns": (made(4, 9, dtype=torch.bfloat16), "", (Shard(1),)),
    "last": (made(2, 3, 7), "", (Shard(-1),)),
    "short": (made(2), "", (Shard(0),)),
    "empty": (made(0, 3), "", (Shard(0),)),
    "copy": (made(3), "", (Replicate(),)),
    "scalar": (made(), "", (Replicate(),)),
}
GRID: Placed = {
    "hsdp": (made(7, 3), "", (Replicate(), Shard(0))),
    "both": (made(5, 6), "", (Shard(0), Shard(1))),
    "twice": (made(9, 3), "", (Shard(0), Shard(0))),
    "only dp": (made(5, 2), "dp", (Shard(0),)),
    "only tp": (made(3, 5), "tp", (Shard(1),)),
    "copies": (made(3), "", (Replicate(), Replicate())),
}
if _StridedShard is not None:
    GRID = {
        **GRID,
        "strided": (made(8, 3), "", (_StridedShard(0, split_factor=2), Shard(0))),
    }
if hasattr(_StridedShard, "local_shard_size_and_offset"):  # without it, torch does not split other sizes
    GRID = {
        **GRID,
        "rest strided": (made(10, 3), "", (_StridedShard(0, split_factor=2), Shard(0))),
        "uneven strided": (made(7, 2), "", (_StridedShard(0, split_factor=2), Shard(0))),
    }
PLAIN = {"buffer": torch.tensor([1, 2])}


@pytest.mark.parametrize(
    ("shape", "placed"),
    [
        pytest.param((1,), FLAT, id="one rank"),
        pytest.param((2,), FLAT, id="two ranks"),
        pytest.param((3,), FLAT, id="three ranks"),
        pytest.param((2, 2), GRID, id="a grid of four"),
    ],
)
def test_the_whole_tensors_are_joined(tmp_path: Path, shape: tuple[int, ...], placed: Placed) -> None:
    """Each tensor is as before it was distributed, also with shards of different sizes and on slices of a mesh."""
    directory = save_dtensors(tmp_path / "run", shape, placed, plain=PLAIN)
    expected = {key: tensor for key, (tensor, _, _) in placed.items()} | PLAIN
    with open_checkpoint(directory) as checkpoint:
        assert list(checkpoint) == list(expected)
        assert not checkpoint.warnings
        assert len(checkpoint.files) == len(list(directory.iterdir()))
        for key, tensor in expected.items():
            assert checkpoint[key].kind == "dense"
            assert torch.equal(checkpoint.read(key), tensor)


def test_commands_take_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Convert, check and ``load_into`` see whole tensors, and an optimizer of a rank is listed as an entry."""
    model = torch.nn.Linear(3, 5)
    placed: Placed = {key: (value, "", (Shard(0),)) for key, value in model.state_dict().items()}
    run = save_dtensors(tmp_path / "run", (2,), placed)
    for rank in range(2):
        torch.save({"state": {}, "param_groups": []}, run / f"optim_world_size_2_rank_{rank}.pt")
    shown = run_ckpt(capsys, "show", run)
    assert shown.code == 0
    assert "optim_world_size_2_rank_*.pt" in shown.out
    assert run_ckpt(capsys, "check", run).code == 0
    assert run_ckpt(capsys, "convert", run, "-o", tmp_path / "out.safetensors").code == 0
    assert all(torch.equal(value, placed[key][0]) for key, value in load_file(tmp_path / "out.safetensors").items())
    other = torch.nn.Linear(3, 5)
    with open_checkpoint(run) as checkpoint:
        load_into(other, checkpoint)
    assert torch.equal(other.weight, model.weight)


def test_the_state_dict_of_an_envelope_is_joined(tmp_path: Path) -> None:
    """A state_dict under a key is found or selected, as in one file."""
    run = save_dtensors(
        tmp_path / "run", (2,), FLAT, name="step-{rank}.pt", wrap=lambda state: {"model": state, "step": 3}
    )
    for path in (str(run), f"{run}::model"):
        with open_checkpoint(path) as checkpoint:
            assert torch.equal(checkpoint.read("rows"), FLAT["rows"][0])
            assert [entry.path for entry in checkpoint.entries] == ["step"]


def test_one_file_is_not_taken_as_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of one rank says which piece of the tensors it holds, and is neither read nor converted."""
    path = save_dtensors(tmp_path / "run", (2,), FLAT) / "model_world_size_2_rank_1.pt"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["rows"].kind == "dtensor"
        assert checkpoint["copy"].kind == "dense"
        assert "the pieces of rank 1 of 2" in checkpoint.warnings[0]
        with pytest.raises(FormatError, match="is a dtensor tensor"):
            checkpoint.read("rows")
    converted = run_ckpt(capsys, "convert", path, "-o", tmp_path / "out.safetensors")
    assert converted.code == 2
    assert "give the path of the directory with the files of all ranks" in converted.err


def resave(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    """Return a function that replaces the file of rank 1 by a file of another run."""

    def damage(run: Path) -> None:
        placed: dict[str, Any] = dict(FLAT)
        change(placed)
        other = save_dtensors(run.parent / "other", (2,), placed)
        shutil.copy(other / R1, run)

    return damage


R0, R1 = "model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"


def alone(run: Path) -> None:
    """Leave one file, with a name that does not state the number of ranks."""
    (run / R1).unlink()
    (run / R0).rename(run / "rank_0.pt")


def rows(*shape: int, dim: int = 0, dtype: torch.dtype = torch.float32) -> Callable[[Path], object]:
    return resave(lambda state: state.update(rows=(made(*shape, dtype=dtype), "", (Shard(dim),))))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing rank": (lambda run: (run / R1).unlink(), "the files of some ranks are missing: rank 1"),
    "a missing first rank": (lambda run: (run / R0).unlink(), "the files of some ranks are missing: rank 0"),
    "one file alone": (alone, "the files of some are missing: rank 1"),
    "one file twice": (lambda run: shutil.copy(run / R0, run / R1), "name says rank 1, but rank 0 saved 'rows'"),
    "a key missing": (resave(lambda state: state.pop("copy")), f"'copy' is in {R0}, but not"),
    "a key added": (resave(lambda state: state.update(x=FLAT["rows"])), f"'x' is in {R1}, but not"),
    "another shape": (rows(7, 3), r"'rows' is F32 \[5, 3\] \(dtensor\)"),
    "another dtype": (rows(5, 3, dtype=torch.float64), "'rows' is F32 in .* but F64"),
    "another placement": (rows(5, 3, dim=1), "'rows' has another mesh or placement"),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """A missing file, and a file of another run, is an error that names the rank or the key."""
    run = save_dtensors(tmp_path / "run", (2,), FLAT)
    damage(run)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(run)


def test_partial_values_are_refused_by_name(tmp_path: Path) -> None:
    """The sum of several ranks is not in any file, and an order of the cuts that is not read is not guessed."""
    run = save_dtensors(
        tmp_path / "run", (2,), {"w": (made(4, 2), "", (Shard(0),)), "sum": (made(4), "", (Partial(),))}
    )
    assert "'sum' is a DTensor with the placement 'Partial'" in refusal(str(run)).reason


def test_a_plain_tensor_that_differs_between_ranks_is_named(tmp_path: Path) -> None:
    """Values that are not split are read from rank 0, with a warning where the ranks differ."""
    run = save_dtensors(tmp_path / "run", (2,), FLAT, plain=PLAIN)
    save_dtensors(tmp_path / "other", (2,), FLAT, plain={"buffer": torch.tensor([1, 3])})
    shutil.copy(tmp_path / "other" / R1, run)
    with open_checkpoint(run) as checkpoint:
        assert list(checkpoint.warnings) == ["'buffer' differ between the ranks: the values of rank 0 are read"]
        assert torch.equal(checkpoint.read("buffer"), PLAIN["buffer"])


def test_sharded_tensors_are_joined(tmp_path: Path) -> None:
    """The ShardedTensors of FSDP1 state their offsets, also where the last rank holds nothing."""
    whole = {"w": made(7, 3), "b": made(2), "half": made(5).bfloat16()}
    run = save_sharded_tensors(tmp_path / "run", 3, whole)
    with open_checkpoint(run) as checkpoint:
        assert checkpoint.format == "sharded-tensor torch-zip (3 files)"
        assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in whole.items())
    with open_checkpoint(run / "model_rank_1.pt") as checkpoint:
        assert checkpoint["w"].kind == "sharded"
        assert any("is split among ranks" in text or "are split among ranks" in text for text in checkpoint.warnings)
        with pytest.raises(FormatError, match="is a sharded tensor"):
            checkpoint.read("w")
    (run / "model_rank_2.pt").unlink()
    assert "'w': row 6 is covered by no chunk" in refusal(str(run)).reason


def test_flat_parameters_are_refused_by_name(tmp_path: Path) -> None:
    """LOCAL_STATE_DICT of FSDP1 stores flat parameters, which do not say which parameters they hold."""
    run = save_sharded_tensors(tmp_path / "run", 2, {"layer._flat_param": made(8)})
    assert "'layer._flat_param' is a flat parameter of FSDP1" in refusal(str(run)).reason


def test_a_change_on_disk_is_found(tmp_path: Path) -> None:
    """A file that changes after it was opened is an error."""
    run = save_dtensors(tmp_path / "run", (2,), FLAT)
    with open_checkpoint(run) as checkpoint:
        (run / R1).write_bytes((run / R1).read_bytes() + b"\0")
        with pytest.raises(ChangedError):
            checkpoint.check_unchanged()


def spec(mesh: dict[object, object], *dims: int) -> TensorRef:
    """Return a DTensor as a pickle of another version of torch describes it."""

    def of(name: str, state: dict[object, object]) -> Placeholder:
        value = Placeholder(CodeName("torch.distributed", name))
        value.state = state
        return value

    if "_layout" in mesh:
        mesh["_layout"] = of("_MeshLayout", mesh["_layout"])  # type: ignore[arg-type]
    placements = tuple(of("Shard", {"dim": dim}) for dim in dims)
    local = TensorRef("F32", (2, 2), StorageRef("0", "F32", 16), 0, (2, 1))
    return TensorRef(
        "F32", (4, 4), kind="dtensor", local=local,
        spec=of("DTensorSpec", {"mesh": of("DeviceMesh", mesh), "placements": placements}),
    )  # fmt: skip


MESH = TensorRef("I32", (2, 2), StorageRef("1", "I32", 16), 0, (2, 1))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(
            {"mesh": MESH, "_flatten_mesh_list": (0, 1, 2, 3), "_coordinate_on_dim": [1, 0]}, id="torch 2.4 to 2.9"
        ),
        pytest.param(
            {
                "_layout": {"shape": (2, 2), "stride": (2, 1)}, "_flatten_rank_map": (0, 1, 2, 3),
                "_coordinate_on_dim": [1, 0],
            },
            id="torch 2.10",
        ),
        pytest.param(
            {"_layout": {"shape": (2, 2), "stride": (2, 1)}, "_flatten_rank_map": (0, 1, 2, 3), "_rank": 2},
            id="torch 2.11 and 2.12",
        ),
    ],
)  # fmt: skip
def test_the_meshes_of_older_torch_are_read(mesh: dict[object, object]) -> None:
    """The attributes of a pickled DeviceMesh changed twice; each form gives ranks and coordinates."""
    tensor = spec(mesh, 0, 1)
    layout = read_layout(tensor, 2, {})
    assert (layout.mesh.shape, layout.mesh.ranks, layout.mesh.own) == ((2, 2), (0, 1, 2, 3), 2)
    assert piece_of(layout, (1, 0)) == Box((2, 0), (2, 2))
    assert describe_pieces({"w": tensor}) == "'w' is split among ranks: the file holds the pieces of rank 2 of 4"
