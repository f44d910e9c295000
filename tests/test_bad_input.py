"""Bad input, at the command line: exit code 2, one line and a hint, stdout empty, nothing written, nothing run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers_cli import ROOT, run_ckpt

Maker = Callable[[Path], Path]


def _bytes(data: bytes, name: str = "bad.safetensors") -> Maker:
    def make(directory: Path) -> Path:
        (directory / name).write_bytes(data)
        return directory / name

    return make


def _safetensors(header: object, size: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _cut(source: str, drop: int) -> Maker:
    data = (ROOT / "fixtures" / source).read_bytes()
    return _bytes(data[:-drop], source)


def _shards(change: Callable[[Path], None]) -> Maker:
    def make(directory: Path) -> Path:
        shutil.copytree(ROOT / "fixtures" / "encoder_sharded", directory / "shards")
        change(directory / "shards")
        return directory / "shards"

    return make


def _climb(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8").replace("model-00001", "../model-00001"), encoding="utf-8")


def _extra(directory: Path) -> None:
    shutil.copy(directory / "model-00001-of-00002.safetensors", directory / "model-00003-of-00003.safetensors")


BAD: dict[str, tuple[Maker, str]] = {
    "missing": (lambda directory: directory / "none.pt", "no such file"),
    "empty": (_bytes(b""), "the file is empty"),
    "truncated safetensors": (_cut("lenet_10class.safetensors", 12), "12 of 248,024 bytes are missing"),
    "truncated zip": (_cut("lenet_ddp.pt", 100), "truncated"),
    "truncated legacy": (_cut("lenet_10class.pth", 12), "truncated"),
    "header beyond the file": (_bytes(struct.pack("<Q", 900) + b"{}"), "the header is said to have 900 bytes"),
    "overlap": (
        _bytes(_safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, 12)),
        "'b' overlaps the tensor before it",
    ),
    "gap": (_bytes(_safetensors({"a": _entry([2], 0, 8), "b": _entry([2], 12, 20)}, 20)), "'b' leaves a gap"),
    "shape": (
        _bytes(_safetensors({"w": _entry([3, 2], 0, 16)}, 16)),
        "'w': F32 [3, 2] needs 24 bytes, offsets give 16",
    ),
    "duplicate key": (
        _bytes(
            _safetensors(
                b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
                b'"data_offsets":[0,1]}}',
                1,
            )
        ),
        "names 'a' twice",
    ),
    "escape code in a key": (_bytes(_safetensors({"\x1b[2J": _entry([3], 0, 16)}, 16)), r"'\x1b[2J': F32"),
    "missing shard": (_shards(lambda d: (d / "model-00002-of-00002.safetensors").unlink()), "no such file"),
    "extra shard": (_shards(_extra), "lies beside the index and is not named in it"),
    "shard that climbs out": (_shards(_climb), "unsafe shard"),
    "directory": (lambda directory: directory, "a directory without a checkpoint in it"),
}


def _refused(said: str, err: str) -> None:
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] in (["ckpt"], ["ckpt", "hint"]), err
    assert said in lines[0]
    assert not any(char < " " for line in lines for char in line)


@pytest.mark.parametrize("command", ["show", "check", "diff", "remap", "merge", "convert"])
@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused(
    command: str, make: Maker, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command refuses a bad file alike, and writes nothing."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = make(tmp_path / "in")
    good = ROOT / "fixtures" / "lenet_10class.pth"
    more: list[str | Path] = [good] if command in ("diff", "merge") else []
    output: list[str | Path] = (
        [] if command in ("show", "check", "diff") else ["-o", tmp_path / "out" / "o.safetensors"]
    )
    ran = run_ckpt(capsys, command, path, *more, *output)
    assert (ran.code, ran.out) == (2, "")
    _refused(said, ran.err)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wrong_suffix_works_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The format is told by content; the name that says something else is mentioned."""
    path = shutil.copy(ROOT / "fixtures" / "lenet_10class.safetensors", tmp_path / "lenet.pt")
    ran = run_ckpt(capsys, "show", path)
    assert ran.code == 0
    assert "the name says torch, the content is safetensors" in ran.err


def _ckpt(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "ckptkit", *map(str, arguments)]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Room is reserved before the first byte: what does not fit changes nothing."""
    source, out = tmp_path / "in.safetensors", tmp_path / "o.safetensors"
    save_file({"w": torch.zeros(1_000_000)}, source)
    out.write_bytes(b"old")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = _ckpt("convert", source, "-o", out, "--force")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (done.returncode, done.stdout, out.read_bytes()) == (2, "", b"old")
    _refused("no room: needs 4.0 MB", done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "o.safetensors"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only directories")
def test_a_read_only_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that cannot be written to is named."""
    tmp_path.chmod(0o555)
    ran = run_ckpt(capsys, "convert", ROOT / "fixtures" / "lenet_ddp.pt", "-o", tmp_path / "o.safetensors")
    tmp_path.chmod(0o755)
    assert (ran.code, ran.out) == (2, "")
    _refused("permission denied", ran.err)


def test_killed_in_mid_write(tmp_path: Path) -> None:
    """After kill -9 the old file is what it was."""
    source, out = tmp_path / "in.pt", tmp_path / "o.pt"
    torch.save({str(index): torch.zeros(1_000_000)[::2] for index in range(150)}, source)  # gathered: slow to write
    out.write_bytes(b"old")
    with subprocess.Popen(_ckpt("remap", source, "-o", out, "--rename", "*=x.*", "--force"), cwd=ROOT) as process:
        while len(list(tmp_path.iterdir())) < 3 and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old"
