"""Every command refuses a bad file alike; the files themselves, and what is said of each, are in tests/hostile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers_cli import ROOT, run_ckpt

Maker = Callable[[Path], Path]


def _bytes(data: bytes, name: str = "bad.safetensors") -> Maker:
    def make(directory: Path) -> Path:
        (directory / name).write_bytes(data)
        return directory / name

    return make


def _cut(source: str, drop: int) -> Maker:
    data = (ROOT / "fixtures" / source).read_bytes()
    return _bytes(data[:-drop], source)


def _shards(change: Callable[[Path], None]) -> Maker:
    def make(directory: Path) -> Path:
        shutil.copytree(ROOT / "fixtures" / "encoder_sharded", directory / "shards")
        change(directory / "shards")
        return directory / "shards"

    return make


BAD: dict[str, tuple[Maker, str]] = {
    "missing": (lambda directory: directory / "none.pt", "no such file"),
    "empty": (_bytes(b""), "the file is empty"),
    "truncated safetensors": (_cut("lenet_10class.safetensors", 12), "12 of 248,024 bytes are missing"),
    "truncated zip": (_cut("lenet_ddp.pt", 100), "truncated"),
    "truncated legacy": (_cut("lenet_10class.pth", 12), "truncated"),
    "missing shard": (_shards(lambda d: (d / "model-00002-of-00002.safetensors").unlink()), "no such file"),
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
    """Exit code 2, one line and a hint, stdout empty, nothing written."""
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
