"""``ckpt check`` fails for malformed files that other checkers accept, and passes for files that they cannot open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from tests.helpers_cli import run_ckpt
from tests.helpers_formats import f32, safetensors_file, saved
from tests.helpers_shards import shard

GOOD = save({"a": torch.arange(64.0), "b": torch.arange(64.0) * 3})
FP8 = torch.arange(64.0).to(torch.float8_e4m3fn)
BROKEN = torch.arange(64.0)
BROKEN[3], BROKEN[5] = torch.nan, torch.inf

MALFORMED: dict[str, tuple[bytes, int, str]] = {
    # id: (the file, the exit code, a part of the output)
    "data truncated": (GOOD[: len(GOOD) // 2], 2, "bytes are missing at the end"),
    "header truncated": (GOOD[:40], 2, "truncated?"),
    "not JSON": (safetensors_file("{"), 2, "the header is not JSON"),
    "empty": (b"", 2, "the file is empty"),
    "header of 2^62 bytes": ((1 << 62).to_bytes(8, "little") + b"{}", 2, "unknown format: the first bytes are 00 00"),
    "overlapping": (safetensors_file({"a": f32(0, 4), "b": f32(2, 6)}, bytes(6)), 2, "overlaps the tensor before it"),
    "a gap": (safetensors_file({"a": f32(0, 4), "b": f32(8, 12)}, bytes(12)), 2, "leaves a gap before it"),
    "shape and bytes": (safetensors_file({"a": f32(0, 4, [2])}, bytes(4)), 2, "needs 8 bytes, offsets give 4"),
    "trailing bytes": (GOOD + bytes(48), 2, "not part of a tensor: 48 bytes after the last tensor"),
    "a key twice": (safetensors_file(f'{{"a":{json.dumps(f32())},"a":{json.dumps(f32())}}}', bytes(4)), 2, "'a' twice"),
    "unknown dtype": (safetensors_file({"a": f32(dtype="Q4")}, bytes(4)), 2, "unknown dtype 'Q4'"),
    "a list": (safetensors_file("[]"), 2, "unknown format: the first bytes are 02 00"),
    "no dtype": (safetensors_file({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), 2, "has no dtype"),
    "NaN in BF16": (save({"a": BROKEN.bfloat16()}), 1, "'a': 1 of 64 numbers is NaN, and 1 infinite"),
    "NaN in FP8": (save({"a": BROKEN.to(torch.float8_e4m3fn)}), 1, "NaN"),
    "NaN beside FP8": (save({"a": BROKEN, "q": FP8}), 1, "'a': 1 of 64 numbers is NaN, and 1 infinite"),
    "NaN in a .pt": (saved({"a": BROKEN.half()}), 1, "'a': 1 of 64 numbers is NaN, and 1 infinite"),
    "random bytes": (b"\1" * 100, 2, "unknown format: the first bytes are 01 01"),
}


@pytest.mark.parametrize(("data", "code", "text"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_fail(
    data: bytes, code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 means findings, 2 a file that cannot be opened; there is a message, and never a traceback."""
    (tmp_path / "x.safetensors").write_bytes(data)
    for options in ([], ["--json"]):
        ran = run_ckpt(capsys, "check", tmp_path / "x.safetensors", *options)
        assert (ran.code, text in (ran.out if code == 1 else ran.err)) == (code, True), ran
        assert code == 1 or ran.out == ""
    assert code == 2 or json.loads(ran.out)["summary"]["errors"] == 1


def _directory(at: Path) -> Path:
    return shard(at / "d").parent


def _fp8(at: Path) -> Path:
    save_file({"q": FP8, "w": torch.arange(64.0)}, at / "x.safetensors")
    return at / "x.safetensors"


def _pickled(at: Path) -> Path:
    torch.save({"model": {"w": torch.arange(64.0)}, "epoch": 3}, at / "x.pt")
    return at / "x.pt"


UNDAMAGED: dict[str, Callable[[Path], Path]] = {
    "a directory of shards": _directory,
    "an index": lambda at: shard(at / "d"),
    "FP8": _fp8,
    "a training checkpoint": _pickled,
}


@pytest.mark.parametrize("make", UNDAMAGED.values(), ids=UNDAMAGED.keys())
def test_undamaged_files_pass(make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Undamaged files of any form have only notes, and the last says how many tensors were checked."""
    ran = run_ckpt(capsys, "check", make(tmp_path), "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["summary"]["errors"], document["summary"]["warnings"]) == (0, 0, 0), ran.out
    assert "values of" in document["findings"][-1]["message"]


@pytest.mark.parametrize(("path", "text"), [("gone.safetensors", "no such file"), (".", "without a checkpoint")])
def test_paths_without_a_checkpoint_are_errors(
    path: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_ckpt(capsys, "check", tmp_path / path)
    assert (ran.code, ran.out, text in ran.err) == (2, "", True), ran.err
