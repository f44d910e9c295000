"""torch loads a distributed checkpoint that ckptkit writes: whole, by key, and through its own converter."""

from __future__ import annotations

import pickletools
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from ckptkit import choose_output, execute, open_checkpoint, plan_remap
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import OutputError, PlanError
from ckptkit.plans.produce import Producer
from ckptkit.plans.verify import verify_dcp
from tests.helpers_cli import run_ckpt
from tests.helpers_dcp import edit, loaded, metadata_of, save
from tests.helpers_outputs import names_in, raw, same_state, scratch, state_dicts

STATE = {
    "layer.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3), "layer.bias": torch.ones(3).bfloat16(),
    "norm.count": torch.tensor(7), "none": torch.zeros(0, 5), "ü\n": torch.tensor([True, False]),
}  # fmt: skip
FILES = [".metadata", "__0_0.distcp"]


def write(source: Any, out: Path, **options: Any) -> Any:
    force = options.pop("force", False)
    return execute(plan_remap(source), source, choose_output(out, format="dcp", force=force), **options)


def load(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what ``torch.distributed.checkpoint.load`` puts into new tensors of these shapes and dtypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in state.items()}
        load_distributed(found, checkpoint_id=str(path))
    return found


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@settings(max_examples=25, deadline=None)
@given(state_dicts())
def test_torch_loads_every_tensor(state: dict[str, torch.Tensor]) -> None:
    """Tensors of all dtypes, shapes and strides come back from torch's own loader, bit for bit."""
    with scratch() as directory:
        write(state, Path(directory) / "out")
        found = load(Path(directory) / "out", state)
        assert {key: raw(tensor) for key, tensor in found.items()} == {key: raw(value) for key, value in state.items()}


def test_every_reader_finds_the_same(tmp_path: Path) -> None:
    """The converter of torch, its loader and our own reader find the same state, in a directory of two files."""
    written = write(STATE, tmp_path / "out", verify=True)
    assert names_in(tmp_path / "out") == FILES
    assert (written.format, written.verified) == ("dcp", f"torch {torch.__version__.split('+')[0]}")
    assert same_state(loaded(str(tmp_path / "out"), tmp_path), STATE)
    assert same_state(load(tmp_path / "out", STATE), STATE)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert (checkpoint.format, checkpoint.warnings) == ("dcp", ())
        assert same_state({key: checkpoint.read(key) for key in checkpoint}, STATE)
        assert all(record.payload.nbytes >= 0 for record in checkpoint.records())


def test_the_metadata_is_what_torch_writes(tmp_path: Path) -> None:
    """Shapes, dtypes, chunks and paths are equal to those that torch writes for the same state."""
    write(STATE, tmp_path / "ours")
    save(tmp_path / "theirs", STATE)
    ours, theirs = (metadata_of(str(tmp_path / name)) for name in ("ours", "theirs"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == getattr(theirs, "version", "1.0.0")
    assert FileSystemReader(str(tmp_path / "ours")).read_metadata().storage_data == ours.storage_data


def test_a_flat_key_is_a_name_in_the_nested_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that begin with ``model.`` load into the state {"model": state_dict}, as many training loops save it."""
    save_file(STATE, tmp_path / "in.safetensors")
    ran = run_ckpt(capsys, "remap", tmp_path / "in.safetensors", "-o", tmp_path / "out", "--format", "dcp",
                   "--rename", "*=model.*", "--verify")  # fmt: skip
    assert ran.code == 0
    assert "verified by torch" in ran.err
    nested = {"model": {"layer.weight": torch.zeros(4, 3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_distributed(nested, checkpoint_id=str(tmp_path / "out"))
    assert torch.equal(nested["model"]["layer.weight"], STATE["layer.weight"])


def test_a_copy_is_written_without_torch(tmp_path: Path) -> None:
    """Writing the two files imports neither torch nor numpy."""
    save_file(STATE, tmp_path / "in.safetensors")
    code = (
        "import sys; from ckptkit.cli import main; "
        f"code = main(['convert', {str(tmp_path / 'in.safetensors')!r}, '-o', {str(tmp_path / 'out')!r}, "
        "'--format', 'dcp', '-q']); sys.exit(code or int('torch' in sys.modules or 'numpy' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert same_state(load(tmp_path / "out", STATE), STATE)


def test_the_pickle_names_only_descriptions(tmp_path: Path) -> None:
    """.metadata has protocol 2, and names only classes of DCP, torch.Size, dtypes and the layout."""
    write(STATE, tmp_path / "out")
    names = {
        str(argument) for op, argument, _ in pickletools.genops((tmp_path / "out" / ".metadata").read_bytes())
        if op.name == "GLOBAL"
    }  # fmt: skip
    modules = {name.split()[0] for name in names}
    assert modules == {
        "torch", "torch.serialization", "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
    }  # fmt: skip


def test_an_existing_checkpoint_is_replaced_only_with_force(tmp_path: Path) -> None:
    """With force, the old files of a distributed checkpoint go, all at once, and other files stay."""
    out = tmp_path / "out"
    save(out, {"old": torch.zeros(2)})
    (out / "__1_0.distcp").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        write(STATE, out)
    write(STATE, out, force=True)
    assert names_in(out) == [*FILES, "notes.txt"]
    assert same_state(load(out, STATE), STATE)


def test_other_weights_in_the_directory_are_named(tmp_path: Path) -> None:
    """Weights of another format stay beside the checkpoint that is read, and the result names them."""
    (tmp_path / "out").mkdir()
    save_file({"old": torch.zeros(2)}, tmp_path / "out" / "model.safetensors")
    assert write(STATE, tmp_path / "out", force=True).beside == ("model.safetensors",)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert set(checkpoint) == set(STATE)


def test_a_checkpoint_can_replace_itself(tmp_path: Path) -> None:
    """The output can be the directory of the input, which is read until the new directory is complete."""
    save(tmp_path / "out", STATE)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        write(checkpoint, tmp_path / "out", force=True)
    assert same_state(load(tmp_path / "out", STATE), STATE)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("out.safetensors", {"format": "dcp"}, "a distributed checkpoint is a directory"),
        ("out", {"format": "dcp", "max_shard_size": 10}, "shards are written as safetensors only"),
    ],
)
def test_an_output_that_is_not_a_directory_is_refused(name: str, options: Any, reason: str) -> None:
    """A file name, and a size of shards, contradict the format."""
    with pytest.raises(OutputError, match=reason):
        choose_output(name, **options)


def test_a_counter_is_refused(tmp_path: Path) -> None:
    """In a state of DCP, a number called step counts the steps; as a weight of that name it would be lost."""
    state = {"step": torch.tensor(7), "w": torch.ones(2)}
    with pytest.raises(PlanError, match="'step' would be read from a distributed checkpoint as"):
        write(state, tmp_path / "out")
    write({"model.step": state["step"], "w": state["w"]}, tmp_path / "out")


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    """A cast that makes inf is found while tensors are written, and neither file nor directory is left."""
    state = {"a": torch.tensor([1e9])}
    with pytest.raises(PlanError, match="inf"):
        execute(plan_remap(state, dtype="f16"), state, choose_output(tmp_path / "out", format="dcp"))
    assert names_in(tmp_path) == []


def test_verification_finds_what_torch_reads_differently(tmp_path: Path) -> None:
    """A byte, a description or a tensor that torch reads and the plan does not make is found and named."""
    write(STATE, tmp_path / "out")
    data, plan, sources = tmp_path / "out" / FILES[1], plan_remap(STATE), {"source": as_checkpoint(STATE, "source")}
    content = data.read_bytes()

    def verify() -> None:
        verify_dcp(str(tmp_path / "out"), "shown", plan.steps, Producer(sources))

    at = content.index(raw(STATE["layer.weight"]))
    data.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(OutputError, match=r"layer\.weight"):
        verify()
    data.write_bytes(content)
    verify()
    edit(str(tmp_path / "out"), lambda metadata: metadata.state_dict_metadata.pop("norm.count"))
    with pytest.raises(OutputError, match=r"'norm\.count' should be I64"):
        verify()


def test_what_the_output_cannot_hold_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The metadata of a safetensors file is left out, and said."""
    save_file(STATE, tmp_path / "in.safetensors", {"license": "MIT"})
    ran = run_ckpt(capsys, "convert", tmp_path / "in.safetensors", "-o", tmp_path / "out", "--format", "dcp")
    assert ran.code == 0
    assert "left out, stored outside of the weights: __metadata__" in ran.err
