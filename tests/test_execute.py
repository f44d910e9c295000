"""An output is written whole or not at all, and no input is damaged."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptkit import TensorInfo, choose_output, execute, open_checkpoint, parse_rules, plan_merge, plan_remap
from ckptkit.errors import ChangedError, CkptkitError, OutputError, PlanError
from tests.helpers_outputs import names_in, same_state, scratch, sha256, state_dicts, tensor_of

ROOT = Path(__file__).parent.parent
STATE = {"a.weight": tensor_of("F32", (4, 3)), "a.bias": tensor_of("F32", (4,), 1), "b": tensor_of("BF16", (5,), 2)}
BYTES = 48 + 16 + 10


def refusal(act: Callable[[], object], error: type[CkptkitError] = OutputError) -> CkptkitError:
    with pytest.raises(error) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def convert(source: Any, out: Path, *, shards: int | None = None, force: bool = False, **more: Any) -> Any:
    return execute(plan_remap(source), source, choose_output(out, max_shard_size=shards, force=force), **more)


def saved(path: Path, state: dict[str, Any] | None = None) -> Path:
    state = STATE if state is None else state
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def state_at(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {key: checkpoint.read(key) for key in checkpoint}


def test_several_inputs_make_one_output(tmp_path: Path) -> None:
    """Base and donor are given by role; equal storage numbers of different inputs are not mixed up."""
    base = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.arange(3.0)}
    donor = {"a": torch.tensor([1.5, 2.0, -7.0]), "x": torch.ones(2)}
    saved(tmp_path / "base.pt", base)
    saved(tmp_path / "donor.pt", donor)
    with open_checkpoint(tmp_path / "base.pt") as first, open_checkpoint(tmp_path / "donor.pt") as second:
        plan = plan_merge(first, second, on_unexpected="add")
        for name in ("out.pt", "out.safetensors"):
            written = execute(plan, {"base": first, "donor": second}, tmp_path / name)
            assert (written.tensors, written.nbytes) == (3, (tmp_path / name).stat().st_size)
            wanted = {"a": donor["a"].to(torch.bfloat16), "b": base["b"], "x": donor["x"]}
            assert same_state(state_at(tmp_path / name), wanted)


def test_a_single_source_needs_no_role(tmp_path: Path) -> None:
    """This holds even for a state_dict with a tensor called ``source``; a plan of two roles needs both."""
    state = {"source": torch.ones(2), "w": torch.zeros(1)}
    execute(plan_remap(state), state, tmp_path / "a.safetensors")
    execute(plan_remap(state), {"source": state}, tmp_path / "b.safetensors")
    assert same_state(load_file(tmp_path / "a.safetensors"), state)
    assert sha256(tmp_path / "a.safetensors") == sha256(tmp_path / "b.safetensors")
    plan = plan_merge({**state, "z": torch.ones(1)}, state)
    assert "the plan reads donor, base" in refusal(lambda: execute(plan, state, tmp_path / "c.pt"), PlanError).reason


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({"w": torch.ones(2, dtype=torch.int32)}, "'w' would be I32, and is F32 in the plan"),
        ({"w": torch.ones(1, 2)}, "'w' would be [1, 2], and is [2] in the plan"),
        ({"v": torch.ones(2)}, "'w' is not in the source"),
        ({"w": TensorInfo("w", "F32", (2,))}, "'w' is a description without values"),
    ],
    ids=["dtype", "shape", "gone", "no bytes"],
)
def test_a_plan_is_executed_only_on_its_inputs(now: Any, reason: str, tmp_path: Path) -> None:
    """An input with other dtypes is refused even where the sizes in bytes are equal."""
    plan = plan_remap({"w": torch.ones(2)})
    error = refusal(lambda: execute(plan, now, tmp_path / "a.safetensors"), PlanError)
    assert error.reason.startswith(reason)
    assert names_in(tmp_path) == []


def test_progress_counts_every_byte_of_the_tensors(tmp_path: Path) -> None:
    """The reported bytes add up to the bytes of all tensors."""
    for name in ("a.safetensors", "a.pt"):
        seen: list[int] = []
        written = convert(STATE, tmp_path / name, progress=seen.append)
        assert BYTES <= sum(seen) <= written.nbytes


def test_a_name_without_a_suffix_is_a_directory(tmp_path: Path) -> None:
    """It is that of shards of 5 GB, also where the name ends in a version. A typo is named."""
    for name in ("model", "model-1.5", "model/"):
        assert choose_output(name) == choose_output(name, max_shard_size="5GB")
    written = convert(STATE, tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == STATE.keys()
    assert written.format == "safetensors"
    assert choose_output("best.pth.tar").format == "torch"
    with pytest.raises(OutputError) as caught:
        choose_output("model.safetensor")
    assert str(caught.value.hint).startswith("did you mean model.safetensors? ")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("-", {}, "the suffix does not name a format to write"),
        ("run::model", {}, "the suffix does not name a format to write"),
        ("py:mynet:build", {}, "the suffix does not name a format to write"),
        ("out.txt", {}, "the suffix does not name a format to write"),
        ("out.pt", {"format": "gguf"}, "unknown format 'gguf'"),
        ("out", {"max_shard_size": 0}, "a shard of at most 0 bytes cannot hold a tensor"),
        ("out.safetensors", {"max_shard_size": 9}, "shards need a directory"),
        ("out", {"max_shard_size": 9, "format": "torch"}, "shards are written as safetensors only"),
    ],
)
def test_invalid_outputs_are_refused(name: str, options: dict[str, Any], reason: str) -> None:
    """The output is refused before any input is read."""
    error = refusal(lambda: choose_output(name, **options))
    assert error.reason == reason
    assert ("name a file in a directory: out/model.safetensors" in str(error.hint)) == ((name, options) == ("out", {}))


def identity(path: Path) -> tuple[int, ...]:
    """Return what changes if a path is replaced; the time of access also changes if a link is followed."""
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"old"), "already exists"),
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/full"), "is not a regular file"),
        (lambda path: path.symlink_to(path), "too many levels of symbolic links"),
    ],
    ids=["exists", "directory", "FIFO", "device", "loop"],
)
def test_existing_paths_are_not_replaced(make: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    """Without force an existing file is refused, and with force anything that is not a file."""
    out = tmp_path / "out.pt"
    make(out)
    before = identity(out)
    for force in (False, *([True] if reason != "already exists" else [])):
        error = refusal(lambda force=force: convert(STATE, out, force=force))  # type: ignore[misc]
        assert (error.reason, error.path) == (reason, str(out))
    assert identity(out) == before
    assert names_in(tmp_path) == ["out.pt"]


@pytest.mark.parametrize("shards", [None, 20])
def test_the_directory_must_exist(shards: int | None, tmp_path: Path) -> None:
    """A missing directory is named and not created, because it may be a typing error."""
    out = tmp_path / "no" / ("out" if shards else "out.pt")
    assert refusal(lambda: convert(STATE, out, shards=shards)).reason == f"the directory {out.parent} does not exist"
    if not shards:
        (tmp_path / "no").write_bytes(b"")
        assert refusal(lambda: convert(STATE, out)).reason == f"{out.parent} is not a directory"


def test_file_modes(tmp_path: Path) -> None:
    """A new file has the mode of the umask, a replaced file keeps its mode."""
    old = os.umask(0o027)
    try:
        for name in ("new.pt", "new.safetensors"):
            convert(STATE, tmp_path / name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
            (tmp_path / name).chmod(0o604)
            convert(STATE, tmp_path / name, force=True)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o604
        convert(STATE, tmp_path / "new", shards=20)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
        (tmp_path / "new").chmod(0o705)
        convert(STATE, tmp_path / "new", shards=20, force=True)
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o705
    finally:
        os.umask(old)


@pytest.mark.parametrize("shards", [None, 20], ids=["file", "directory"])
@pytest.mark.parametrize("dangling", [True, False], ids=["dangling", "to something"])
def test_symbolic_links_are_written_through(tmp_path: Path, shards: int | None, *, dangling: bool) -> None:
    """The link is kept and its target is written, also where the target did not exist."""
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / ("blob" if shards else "blob.pt")
    link = tmp_path / ("link" if shards else "link.pt")
    link.symlink_to(target)
    if not dangling:
        convert({"old": torch.ones(1)}, target, shards=shards)
    convert(STATE, link, shards=shards, force=True)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert same_state(state_at(target), STATE)
    assert names_in(tmp_path / "store") == [target.name]


@pytest.mark.parametrize(
    "name", ["n" * 247 + ".pt", "é" * 123 + "x.pt", "重" * 84 + ".pt", os.fsdecode(b"\xff.pt"), "a::b.pt", "py:x.pt"]
)
@pytest.mark.parametrize("shards", [None, 20], ids=["file", "directory"])
def test_every_valid_file_name_works(name: str, shards: int | None, tmp_path: Path) -> None:
    """Very long names, names that are not text and names with special characters work."""
    out = tmp_path / (name.removesuffix(".pt") if shards else name)
    convert(STATE, out, shards=shards)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    convert(STATE, out, shards=shards, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("name", ["in.safetensors", "in.pt"])
@pytest.mark.parametrize("way", ["same", "dot", "symlink", "hardlink"])
def test_an_input_is_replaced_only_by_force(name: str, way: str, tmp_path: Path) -> None:
    """The input is recognised under any spelling, and read while its replacement is written."""
    source = saved(tmp_path / name)
    out = tmp_path / f"out{source.suffix}"
    if way == "same":
        out = source
    elif way == "dot":
        out = tmp_path / "." / name
    elif way == "symlink":
        out.symlink_to(source)
    else:
        os.link(source, out)
    before = sha256(source)
    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint, ["a.*=c.a.*"])
        assert refusal(lambda: execute(plan, checkpoint, choose_output(out))).reason == "is an input"
        assert sha256(source) == before
        execute(plan, checkpoint, choose_output(out, force=True))
    wanted = {key.replace("a.", "c.a."): value for key, value in STATE.items()}
    assert same_state(state_at(out), wanted)
    assert sha256(source) == (before if way == "hardlink" else sha256(out))


def test_a_training_checkpoint_is_not_replaced_by_its_weights(tmp_path: Path) -> None:
    """An output of tensors alone would lose the other entries, such as the epoch."""
    source = saved(tmp_path / "in.pt", {"state_dict": STATE, "epoch": 3})
    before = sha256(source)
    with open_checkpoint(source) as checkpoint:
        output = choose_output(source, force=True, only_tensors=True)
        error = refusal(lambda: execute(plan_remap(checkpoint), checkpoint, output))
    assert error.reason == "is an input that holds more than tensors: the output would lose epoch"
    assert sha256(source) == before


def test_the_shard_of_an_input_is_never_an_output(tmp_path: Path) -> None:
    """A single shard is refused; the whole directory may be replaced with force."""
    convert(STATE, tmp_path / "in", shards=50)
    before = {name: sha256(tmp_path / "in" / name) for name in names_in(tmp_path / "in")}
    shard = next(name for name in before if name.endswith("00001-of-00002.safetensors"))
    with open_checkpoint(tmp_path / "in") as checkpoint:
        assert (
            "is a shard of an input" in refusal(lambda: convert(checkpoint, tmp_path / "in" / shard, force=True)).reason
        )
        assert "is an input" in refusal(lambda: convert(checkpoint, tmp_path / "in", shards=20)).reason
        assert {name: sha256(tmp_path / "in" / name) for name in names_in(tmp_path / "in")} == before
        convert(checkpoint, tmp_path / "in", shards=20, force=True)
    assert same_state(state_at(tmp_path / "in"), STATE)
    assert not set(before) & set(names_in(tmp_path / "in")) - {"model.safetensors.index.json"}


def test_shards_do_not_replace_a_training_checkpoint(tmp_path: Path) -> None:
    """A single file in the output directory that has the name of a shard is checked as an input."""
    (tmp_path / "run").mkdir()
    source = tmp_path / "run" / "model.safetensors"  # told by its content, which torch wrote
    torch.save({"state_dict": STATE, "epoch": 3}, source)
    with open_checkpoint(source) as checkpoint:
        assert (
            "holds more than tensors"
            in refusal(lambda: convert(checkpoint, tmp_path / "run", shards=20, force=True)).reason
        )
    saved(source)
    with open_checkpoint(source) as checkpoint:
        assert refusal(lambda: convert(checkpoint, tmp_path / "run", shards=20)).reason == "is an input"
        convert(checkpoint, tmp_path / "run", shards=20, force=True)
    assert same_state(state_at(tmp_path / "run"), STATE)


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [shorter, touched])
@pytest.mark.parametrize("before_the_first_byte", [True, False], ids=["before", "during"])
@pytest.mark.parametrize("out", ["out.safetensors", "out.pt"])
@pytest.mark.parametrize("name", ["in.safetensors", "in.pt"])
def test_an_input_that_changes_during_the_run_is_noticed(
    name: str, out: str, change: Callable[[Path], None], tmp_path: Path, *, before_the_first_byte: bool
) -> None:
    """The old output is kept, and no other file is left, where an input changes during the run."""
    source, target = saved(tmp_path / name), tmp_path / out
    target.write_bytes(b"old")
    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint, parse_rules(keep=["*"]), dtype="F16")
        if before_the_first_byte:
            change(source)
        output = choose_output(target, force=True)
        error = refusal(lambda: execute(plan, checkpoint, output, progress=lambda _: change(source)), ChangedError)
    assert error.path == str(source)
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == sorted([name, out])


@settings(deadline=None, max_examples=40)
@given(state_dicts(("F32", "BF16", "U8")), st.integers(1, 100))
def test_shards_are_read_back_as_the_input(state: dict[str, torch.Tensor], limit: int) -> None:
    """Shards are within the limit unless one tensor exceeds it, and read back as the input."""
    with scratch() as name:
        out = Path(name, "out")
        written = convert(state, out, shards=limit)
        assert sorted(written.files) == names_in(out)
        shards = {path.name: load_file(path) for path in out.glob("*.safetensors")}
        for tensors in shards.values():
            sizes = [value.nbytes for value in tensors.values()]
            assert sum(sizes) <= limit or sum(map(bool, sizes)) == 1
        if len(shards) > 1:
            index = json.loads((out / "model.safetensors.index.json").read_bytes())
            assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
            assert index["weight_map"] == {key: shard for shard, tensors in shards.items() for key in tensors}
        assert same_state(state_at(out), state)


def test_old_shards_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    """Old shards are removed; a config.json and a symbolic link to the directory are kept."""
    out = tmp_path / "out"
    convert(STATE, out, shards=20)
    assert len(names_in(out)) == 4
    (out / "config.json").write_text("{}")
    (out / "latest").symlink_to("config.json")
    (out / "pytorch_model.bin").write_bytes(b"of another format, and not ours to remove")
    assert refusal(lambda: convert(STATE, out, shards=50)).reason == "already exists"
    convert(STATE, out, shards=50, force=True)
    assert names_in(out) == [
        "config.json",
        "latest",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ]
    assert os.readlink(out / "latest") == "config.json"
    convert(STATE, out, shards=5000, force=True)
    assert names_in(out) == ["config.json", "latest", "model.safetensors", "pytorch_model.bin"]
    assert names_in(tmp_path) == ["out"]


def test_directories_that_are_more_than_shards_are_not_replaced(tmp_path: Path) -> None:
    """A directory with subdirectories and a file are refused; an empty directory is used."""
    (tmp_path / "out" / "logs").mkdir(parents=True)
    assert refusal(lambda: convert(STATE, tmp_path / "out", shards=20, force=True)).reason == (
        "contains the directory 'logs', so it is not replaced"
    )
    (tmp_path / "file").write_bytes(b"old")
    assert "is a file" in refusal(lambda: convert(STATE, tmp_path / "file", shards=20, force=True)).reason
    (tmp_path / "empty").mkdir()
    convert(STATE, tmp_path / "empty", shards=20)
    assert same_state(state_at(tmp_path / "empty"), STATE)
    assert names_in(tmp_path) == ["empty", "file", "out"]


@pytest.mark.parametrize(
    ("source", "out"),
    [("in.safetensors", "out.safetensors"), ("in.pt", "out.safetensors"), ("in.pt", "out.pt"), ("in.pt", "out"),
     ("in.safetensors", "out.pt")],
)  # fmt: skip
def test_copying_bytes_needs_no_torch(source: str, out: str, tmp_path: Path) -> None:
    """Renaming, converting and sharding contiguous tensors do not import torch."""
    saved(tmp_path / source)
    code = (
        "import sys; from ckptkit import choose_output, execute, open_checkpoint, plan_remap\n"
        f"c = open_checkpoint({str(tmp_path / source)!r})\n"
        f"o = choose_output({str(tmp_path / out)!r}, max_shard_size={20 if out == 'out' else None})\n"
        "execute(plan_remap(c, ['a.*=c.*']), c, o)\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)
    assert same_state(state_at(tmp_path / out), {key.replace("a.", "c."): value for key, value in STATE.items()})
