"""``verify`` says "verified" only of bytes that safetensors or ``torch.load`` read from the output."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from ckptkit import choose_output, convert, execute, open_checkpoint, parse_rules, plan_remap
from ckptkit.core.torch_bridge import CASTABLE, as_checkpoint
from ckptkit.errors import FormatError, OutputError
from ckptkit.formats import safetensors as safetensors_reader
from ckptkit.plans import verify
from ckptkit.plans.plan import Plan
from ckptkit.plans.produce import Producer
from ckptkit.plans.verify import verify_safetensors, verify_torch
from tests.features import has_dtype, safetensors_knows
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import CODES, STORABLE, names_in, tensor_of

SAFETENSORS = f"safetensors {safetensors.__version__}"
TORCH = f"torch {torch.__version__.split('+')[0]}"
STATE = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(7)}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out", "\udcff.safetensors", "\udcff.pt"])
def test_outputs_of_all_dtypes_are_verified_by_another_reader(name: str, tmp_path: Path) -> None:
    """Scalars, empty tensors, views, and casts of every dtype that the reader has are compared."""
    codes = sorted(CASTABLE if name.endswith(".pt") else CASTABLE & set(STORABLE))
    state = {code: tensor_of(code, (3, 4)) for code in codes if code in CODES}
    state |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3), "view": torch.arange(6.0).reshape(2, 3).t()}
    state["tied"] = state["view"]
    out = choose_output(tmp_path / name, max_shard_size=40 if name == "out" else None)
    written = execute(plan_remap(state, parse_rules(drop=["U8"])), state, out, verify=True)
    assert (written.verified, written.read_back) == (TORCH if name.endswith(".pt") else SAFETENSORS, None)


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("inner", ["", "model"])
def test_a_torch_file_with_other_entries_is_verified(inner: str, tmp_path: Path) -> None:
    """The tensors are found in their mapping, also nested ones, where the file has other values too."""
    state = {**STATE, "more": {"d": torch.ones(2)}, "steps": 3}
    source = saved(tmp_path / "in.pt", {"model": state, "epoch": 3} if inner else state)
    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint, parse_rules(rename=["a=x"]))
        written = execute(plan, checkpoint, tmp_path / "out.pt", verify=True)
    assert (written.verified, written.read_back) == (TORCH, None)


def test_what_the_other_reader_refuses_is_not_called_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ckptkit compares the bytes alone, and says for which reason, on the page and in the document."""
    source = saved(tmp_path / "in.pt", {"model": STATE, "args": argparse.Namespace(lr=1)})
    out = tmp_path / "out.pt"
    command = ("convert", source, "-o", out, "--keep-unknown", "--verify", "--force")
    ran = run_ckpt(capsys, *command)
    assert (ran.code, f"cannot read it ({out} holds argparse.Namespace): each of 3" in ran.err) == (0, True)
    assert "read back by ckptkit alone, because" in ran.err
    assert "verified" not in ran.err
    ran = run_ckpt(capsys, *command, "--json")
    output = json.loads(ran.out)["output"]
    assert (output["verified"], output["read_back"]) == (None, f"{out} holds argparse.Namespace")
    ran = run_ckpt(capsys, *command, "--only-tensors", "--json")
    output = json.loads(ran.out)["output"]
    assert (output["verified"], output["read_back"]) == (TORCH, None)


def safetensors_file(path: Path, dtype: str, shape: list[int], nbytes: int) -> Path:
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]},
              "v": {"dtype": "F32", "shape": [1], "data_offsets": [nbytes, nbytes + 4]}}  # fmt: skip
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes + 4))
    return path


def test_a_dtype_that_torch_does_not_have_is_read_back_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No tensor of a file is called verified if safetensors cannot give one of its tensors to this torch."""
    if not safetensors_knows("F8_E8M0"):
        pytest.skip("this safetensors has no F8_E8M0")
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)
    safetensors_reader._reader_refusal.cache_clear()
    out = tmp_path / "out.safetensors"
    with open_checkpoint(safetensors_file(tmp_path / "in.safetensors", "F8_E8M0", [4], 4)) as checkpoint:
        written = execute(plan_remap(checkpoint), checkpoint, out, verify=True)
    safetensors_reader._reader_refusal.cache_clear()
    assert (written.verified, written.read_back) == (None, f"'w' in {out} is F8_E8M0")


PACKED = {
    "F6_E2M3": ("F6_E2M3", [4], 3, "Dtype not understood"),
    "F6_E3M2": ("F6_E3M2", [2, 4], 6, "Dtype not understood"),
    "odd rows": ("F4", [2, 3], 3, "last dim be divisible by 2"),
    "empty odd rows": ("F4", [0, 3], 0, "last dim be divisible by 2"),
    "even rows": ("F4", [3, 2], 3, ""),
}


@pytest.mark.parametrize("name", PACKED)
def test_no_tensor_is_written_that_safetensors_cannot_read_again(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installed library decides: what it reads is written and verified, and what it refuses is refused first."""
    dtype, shape, nbytes, reason = PACKED[name]
    source, out = safetensors_file(tmp_path / "in.safetensors", dtype, shape, nbytes), tmp_path / "out.safetensors"
    if not safetensors_knows(dtype):
        pytest.skip(f"this safetensors has no {dtype}")
    if dtype == "F4" and not has_dtype(dtype):
        pytest.skip(f"this torch has no dtype for {dtype}")
    ran = run_ckpt(capsys, "convert", source, "-o", out, "--verify")
    with safetensors.safe_open(source, framework="pt") as file, contextlib.ExitStack() as stack:
        if reason:
            stack.enter_context(pytest.raises(safetensors.SafetensorError, match=reason))
        file.get_tensor("w")
    if not reason:
        assert (ran.code, "verified by safetensors" in ran.err) == (0, True)
        return
    assert (ran.code, ran.err.count("\n"), out.exists()) == (2, 2, False)
    assert f"'w' would be {dtype} {shape}, which the safetensors library cannot read again" in ran.err
    assert "ckpt remap PATH -o OUT --drop 'w'" in ran.err
    assert run_ckpt(capsys, "remap", source, "-o", out, "--drop", "w").code == 0


def test_large_tensors_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows, and parts of rows that are too large, are read one after the other."""
    monkeypatch.setattr(verify, "_PIECE_BYTES", 40)
    state = {"a": torch.randn(3, 5, 7), "b": torch.randn(100), "c": torch.randn(9, 2), "d": torch.zeros(0, 99)}
    assert execute(plan_remap(state), state, tmp_path / "o.safetensors", verify=True).verified == SAFETENSORS


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "bits": (lambda state: state | {"a": state["a"].neg()}, "'a' does not have the bytes"),
    "more": (lambda state: state | {"more": torch.zeros(1)}, "holds 'more', which the plan does not make"),
    "shape": (lambda state: state | {"a": state["a"].flatten()}, r"'a' should be F32 \[4, 3\], and is F32 \[12\]"),
    "dtype": (lambda state: state | {"b": state["b"].half()}, r"'b' should be BF16 \[5\], and is F16 \[5\]"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_each_difference_is_named(name: str, change: str, tmp_path: Path) -> None:
    """A changed bit, an additional tensor, and another shape or dtype are refused."""
    path, (make, reason) = tmp_path / name, CHANGES[change]
    changed = make(dict(STATE))
    if name.endswith(".pt"):
        torch.save(changed, path)
    else:
        save_file(changed, path)
    with pytest.raises(OutputError, match=reason):
        check(plan_remap(STATE), path)


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_missing_tensors_and_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    """A missing tensor, other metadata and a file that the reader cannot open are refused."""
    path = tmp_path / name
    few = {key: value for key, value in STATE.items() if key != "c"}
    execute(plan_remap(few), few, path)
    with pytest.raises(OutputError, match="'c'"):
        check(plan_remap(STATE), path)
    if name.endswith(".safetensors"):
        save_file(STATE, path, {"format": "pt"})
        with pytest.raises(OutputError, match="metadata"):
            check(plan_remap(STATE), path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(OutputError, match="safetensors cannot open it"):
            check(plan_remap(STATE), path)


def check(plan: Plan, path: Path) -> None:
    roles = {"source": as_checkpoint(STATE, "source")}
    if path.suffix == ".pt":
        verify_torch(str(path), str(path), plan.steps, Producer(roles))
    else:
        verify_safetensors(str(path), str(path), plan.steps, plan.metadata, Producer(roles))


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
def test_an_output_that_differs_never_gets_its_name(name: str, tmp_path: Path) -> None:
    """The source changes after it was written: the old output is kept, and no other file is left."""
    state = {"a": torch.zeros(4), "b": torch.zeros(4)}

    def change(_: int) -> None:
        state["a"].add_(1.0)

    shards = 20 if name == "out" else None
    execute(plan_remap(STATE), STATE, choose_output(tmp_path / name, max_shard_size=shards))
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    output = choose_output(tmp_path / name, max_shard_size=shards, force=True)
    with pytest.raises(
        OutputError, match="'a' does not have the bytes that the plan makes, so the new file was deleted"
    ) as caught:
        execute(plan_remap(state), state, output, verify=True, progress=change)
    assert str(caught.value.path).startswith(str(tmp_path / name))
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names_in(tmp_path) == [name]


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "out"])
def test_a_damaged_input_is_named_before_anything_is_written(out: str, tmp_path: Path) -> None:
    """torch loads damaged bytes, but zipfile compares the CRC-32. Without ``verify``, bytes are copied as they are."""
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(1000.0) + 1}, source := tmp_path / "in.pt")
    data = bytearray(source.read_bytes())
    data[data.find((torch.arange(1000.0) + 1).numpy().tobytes()) + 2000] ^= 16
    source.write_bytes(data)
    damaged = zipfile.ZipFile(source).testzip()
    with pytest.raises(
        FormatError, match=f"'{damaged}' does not match its checksum, so 'b' would be damaged"
    ) as refusal:
        convert(source, tmp_path / out, max_shard_size=None if "." in out else "1kB", verify=True)
    assert refusal.value.path == str(source)
    assert names_in(tmp_path) == ["in.pt"]
    with open_checkpoint(source) as checkpoint:
        execute(plan_remap(checkpoint, parse_rules(drop=["b"])), checkpoint, tmp_path / "a.pt", verify=True)
    convert(source, tmp_path / "copy.pt")
    assert str(zipfile.ZipFile(tmp_path / "copy.pt").testzip()).endswith("/data/1")


def test_verify_prints_one_line_and_needs_no_torch_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names the reader and its version; without ``--verify`` the document has null."""
    save_file(STATE, tmp_path / "in.safetensors")
    command = ("convert", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors", "--force")
    ran = run_ckpt(capsys, *command, "--verify")
    assert f"verified by {SAFETENSORS}: each of 3 tensors has the planned bytes" in ran.err
    output = json.loads(run_ckpt(capsys, *command, "--json").out)["output"]
    assert (output["verified"], output["read_back"]) == (None, None)
    assert json.loads(run_ckpt(capsys, *command, "--json", "--verify").out)["output"]["verified"] == SAFETENSORS
    code = f"from ckptkit.cli import main; import sys; main({[str(part) for part in command]!r}); "
    code += "sys.exit(bool({'torch', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0
    assert load_file(tmp_path / "out.safetensors").keys() == STATE.keys()
