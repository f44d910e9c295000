"""Every command refuses a bad file in the same way; tests/hostile has the many kinds of bad files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers_cli import ROOT, run_ckpt

MakeFile = Callable[[Path], Path]


def _bytes(data: bytes, name: str = "bad.safetensors") -> MakeFile:
    def make(directory: Path) -> Path:
        (directory / name).write_bytes(data)
        return directory / name

    return make


def _cut(source: str, drop: int) -> MakeFile:
    data = (ROOT / "fixtures" / source).read_bytes()
    return _bytes(data[:-drop], source)


def _shards(change: Callable[[Path], None]) -> MakeFile:
    def make(directory: Path) -> Path:
        shutil.copytree(ROOT / "fixtures" / "encoder_sharded", directory / "shards")
        change(directory / "shards")
        return directory / "shards"

    return make


BAD: dict[str, tuple[MakeFile, str]] = {
    "missing": (lambda directory: directory / "none.pt", "no such file"),
    "empty": (_bytes(b""), "the file is empty"),
    "truncated safetensors": (_cut("lenet_10class.safetensors", 12), "12 of 248,024 bytes are missing"),
    "truncated zip": (_cut("lenet_ddp.pt", 100), "truncated"),
    "truncated legacy": (_cut("lenet_10class.pth", 12), "truncated"),
    "missing shard": (_shards(lambda d: (d / "model-00002-of-00002.safetensors").unlink()), "no such file"),
    "directory": (lambda directory: directory, "a directory without a checkpoint"),
}


def _refused(reason: str, err: str) -> None:
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] in (["ckpt"], ["ckpt", "hint"]), err
    assert reason in lines[0]
    assert not any(char < " " for line in lines for char in line)


@pytest.mark.parametrize("command", ["show", "check", "diff", "remap", "merge", "convert"])
@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused(
    command: str, make: MakeFile, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line and perhaps a hint on stderr, nothing on stdout, no file written."""
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
    _refused(reason, ran.err)
    assert list((tmp_path / "out").iterdir()) == []
