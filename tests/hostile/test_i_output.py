"""Table I, outputs: a harmful or impossible output path is refused before the first byte is written."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers_outputs import names_in, same_state, scratch
from tests.helpers_shards import NAMES, STATE, save, shard
from tests.hostile.contract import Accepted, Command, Refused, assert_refused, run_limited

FIRST, _, INDEX = NAMES["safetensors"]
SHARDED = ("--max-shard-size", "1kB")


def converting(out: Callable[[Path], Path | str], *options: str) -> Command:
    """Return a command that converts a good file to the path that ``out`` prepares."""

    def make(directory: Path) -> list[str | Path]:
        save(STATE, directory / "in.safetensors")
        return ["convert", directory / "in.safetensors", "-o", out(directory), *options]

    return make


def of_shards(out: Callable[[Path], Path], *options: str) -> Command:
    """Return a command that converts a directory of shards to the path that ``out`` prepares."""

    def make(directory: Path) -> list[str | Path]:
        shard(directory / "set")
        return ["convert", directory / "set", "-o", out(directory / "set"), *options]

    return make


def training(directory: Path) -> list[str | Path]:
    torch.save({"state_dict": dict(STATE), "epoch": 3}, directory / "run.pt")
    return ["convert", directory / "run.pt", "-o", directory / "run.pt", "--force", "--only-tensors"]


def with_old(directory: Path, name: str = "o.safetensors") -> Path:
    (directory / name).write_bytes(b"old")
    return directory / name


def linked(directory: Path, link: Callable[[Path], object]) -> Path:
    link(directory / "o.safetensors")
    return directory / "o.safetensors"


def loop(directory: Path) -> Path:
    (directory / "loop").symlink_to("loop")
    return directory / "loop"


def fifo(directory: Path) -> Path:
    os.mkfifo(directory / "o.pt")
    return directory / "o.pt"


def old_shards_of_pickles(directory: Path) -> Path:
    shard(directory / "set", "bin")
    return directory / "set"


REFUSED: dict[str, Refused] = {
    "I1 a file": Refused(converting(with_old), "already exists"),
    "I1 a directory with files": Refused(converting(lambda at: shard(at / "set").parent, *SHARDED), "already exists"),
    "I2 the same path": Refused(converting(lambda at: at / "in.safetensors"), "already exists"),
    "I2 the same with a dot": Refused(converting(lambda at: f"{at}/./in.safetensors"), "already exists"),
    "I2 a symbolic link": Refused(
        converting(lambda at: linked(at, lambda out: out.symlink_to("in.safetensors"))), "already exists"
    ),
    "I2 a hard link": Refused(
        converting(lambda at: linked(at, lambda out: os.link(at / "in.safetensors", out))), "already exists"
    ),
    "I2 a shard of the input": Refused(
        of_shards(lambda at: at / FIRST, "--force"), "is a shard of an input, and the other"
    ),
    "I2 the index of the input": Refused(
        of_shards(lambda at: at / INDEX, "--force", "--format", "safetensors"), "is a shard of an input, and the other"
    ),
    "I2 a new shard of the input": Refused(
        of_shards(lambda at: at / "model-00009-of-00009.safetensors"), "would be read as a shard of an input"
    ),
    "I2 the directory of the input": Refused(of_shards(lambda at: at, *SHARDED), "already exists"),
    "I2 a training checkpoint": Refused(
        training, "is an input that holds more than tensors: the output would lose epoch"
    ),
    "I3 missing": Refused(converting(lambda at: at / "no" / "o.pt"), "does not exist"),
    "I3 missing, for shards": Refused(converting(lambda at: at / "no" / "set", *SHARDED), "does not exist"),
    "I3 a file": Refused(converting(lambda at: at / "in.safetensors" / "o.pt"), "in.safetensors is not a directory"),
    "I3 a file, for shards": Refused(
        converting(lambda at: at / "in.safetensors" / "set", *SHARDED), "is not a directory"
    ),
    "I4 a directory": Refused(converting(lambda at: at, "--format", "torch", "--force"), "is a directory"),
    "I4 a file where shards go": Refused(converting(with_old, *SHARDED), "shards need a directory"),
    "I4 a FIFO": Refused(converting(fifo, "--force"), "is not a regular file"),
    "I4 /dev/full": Refused(converting(lambda _: "/dev/full", "--format", "torch", "--force"), "is not a regular file"),
    "I4 /dev/stdout": Refused(
        converting(lambda _: "/dev/stdout", "--format", "torch", "--force"), "is not a regular file"
    ),
    "I4 no name": Refused(converting(lambda _: ""), "the output has no name"),
    "I4 no name, for shards": Refused(converting(lambda _: "", *SHARDED), "the output has no name"),
    "I4 the current directory": Refused(converting(lambda _: ".", *SHARDED), "is the current directory"),
    "I4 the root": Refused(converting(lambda _: "/", *SHARDED, "--force"), "contains the directory"),
    "I5 a loop": Refused(converting(loop, "--format", "torch", "--force"), "too many levels of symbolic links"),
    "I5 a loop where shards go": Refused(converting(loop, *SHARDED), "too many levels of symbolic links"),
    "I16 old shards that would be read instead": Refused(
        converting(old_shards_of_pickles, *SHARDED, "--force"),
        "holds other weights, which would be read instead of the output",
    ),
    "I20 ENAMETOOLONG": Refused(converting(lambda at: at / f"{'n' * 300}.pt"), "file name too long"),
    "I20 ENAMETOOLONG, for shards": Refused(converting(lambda at: at / ("n" * 300), *SHARDED), "file name too long"),
    "I20 ENOTDIR": Refused(converting(lambda at: at / "in.safetensors" / "x" / "o.pt"), "does not exist"),
}
ACCEPTED: dict[str, Accepted] = {}
OTHER = (
    "I2 a bind mount", "I3 read-only", "I5 written through", "I6 a limit on file sizes", "I9 mode and owner",
    "I9 a directory that hands on its group", "I10 250 bytes", "I16 weights that stay", "I20 EROFS", "I20 no inode",
)  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a directory on a fast disk with a good file in it."""
    with scratch() as name:
        save(STATE, Path(name) / "in.safetensors")
        yield Path(name)


@contextlib.contextmanager
def mounted(at: Path, *options: str | Path) -> Iterator[None]:
    at.mkdir()
    done = subprocess.run(["mount", *options, at], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs privileges that this user does not have")
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True)


def test_i2_a_shard_behind_a_bind_mount_is_recognised(place: Path) -> None:
    shard(place / "set")
    with mounted(place / "again", "--bind", place / "set"):
        ran = run_limited("convert", place / "set", "-o", place / "again" / FIRST, "--force")
    assert ran.code == 2
    assert "is a shard of an input" in ran.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only directories")
def test_i3_a_read_only_directory_is_named(place: Path) -> None:
    (place / "closed").mkdir(0o555)
    ran = run_limited("convert", place / "in.safetensors", "-o", place / "closed" / "o.pt")
    assert (ran.code, ran.err) == (2, f"ckpt: {place}/closed/o.pt: permission denied\n")


@pytest.mark.parametrize("dangling", [True, False], ids=["dangling", "to a file"])
def test_i5_a_link_is_written_through(place: Path, *, dangling: bool) -> None:
    """With --force too: the link is kept, and its target is whole."""
    target = place / ("new.safetensors" if dangling else "in.safetensors")
    (place / "link.safetensors").symlink_to(target.name)
    ran = run_limited("convert", place / "in.safetensors", "-o", place / "link.safetensors", "--force", "-q")
    assert (ran.code, ran.err) == (0, "")
    assert (place / "link.safetensors").is_symlink()
    assert same_state(load_file(target), STATE)
    assert names_in(place) == sorted({"in.safetensors", "link.safetensors", target.name})


def test_i6_a_limit_on_file_sizes_leaves_the_old_file(place: Path) -> None:
    """Space is reserved before the first byte, so an output that does not fit changes nothing."""
    save_file({"w": torch.zeros(1_000_000)}, place / "large.safetensors")
    out = with_old(place)
    ran = run_limited("convert", place / "large.safetensors", "-o", out, "--force", file_size=100_000)
    assert (ran.code, ran.out, out.read_bytes()) == (2, "", b"old")
    assert ran.err.startswith(f"ckpt: {out}: a file of 4.0 MB is larger than the limit of this process, 100.0 kB")
    assert names_in(place) == ["in.safetensors", "large.safetensors", "o.safetensors"]


@pytest.mark.parametrize("options", [(), SHARDED], ids=["file", "shards"])
def test_i9_the_mode_and_the_owner_are_kept(place: Path, options: tuple[str, ...]) -> None:
    """A new output follows the umask; a replaced output keeps its mode and owner."""
    out = place / ("set" if options else "o.safetensors")
    old = os.umask(0o027)
    try:
        assert run_limited("convert", place / "in.safetensors", "-o", out, *options).code == 0
        assert stat.S_IMODE(out.stat().st_mode) == (0o750 if options else 0o640)
        out.chmod(0o700)
        if os.geteuid() == 0:
            os.chown(out, 1234, 4321)
        before = out.stat()
        assert run_limited("convert", place / "in.safetensors", "-o", out, *options, "--force").code == 0
    finally:
        os.umask(old)
    after = out.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_i9_a_setgid_directory_sets_the_group(place: Path) -> None:
    """In a setgid directory, new directories are setgid too, and new files have its group."""
    group = 4321 if os.geteuid() == 0 else os.getgid()
    (place / "shared").mkdir()
    os.chown(place / "shared", -1, group)
    (place / "shared").chmod(0o2775)
    for name, options in (("set", SHARDED), ("o.safetensors", ())):
        out = place / "shared" / name
        assert run_limited("convert", place / "in.safetensors", "-o", out, *options).code == 0
        assert out.stat().st_gid == group
    assert (place / "shared" / "set").stat().st_mode & stat.S_ISGID


def test_i10_a_name_of_250_bytes_has_a_temporary_name(place: Path) -> None:
    out = place / ("n" * 247 + ".pt")
    assert run_limited("convert", place / "in.safetensors", "-o", out).code == 0
    assert names_in(place) == ["in.safetensors", out.name]


def test_i16_a_warning_names_other_weights_in_the_directory(place: Path) -> None:
    """ckpt does not remove weights with other names, and other programs could read them."""
    (place / "set").mkdir()
    for name in ("pytorch_model.bin", "config.json", "model-00001-of-00009.safetensors"):
        (place / "set" / name).write_bytes(b"x")
    ran = run_limited("convert", place / "in.safetensors", "-o", place / "set", *SHARDED, "--force")
    assert ran.code == 0
    assert "the directory also holds other weights: pytorch_model.bin\n" in ran.err
    assert names_in(place / "set") == ["config.json", "model.safetensors", "pytorch_model.bin"]


def test_i20_a_read_only_disk_is_named(place: Path) -> None:
    with mounted(place / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs"):
        for name, options in (("o.pt", ()), ("set", SHARDED)):
            ran = run_limited("convert", place / "in.safetensors", "-o", place / "disk" / name, *options)
            assert (ran.code, ran.err) == (2, f"ckpt: {place}/disk/{name}: read-only file system\n")


def test_i20_a_disk_without_free_inodes_is_named(place: Path) -> None:
    """The disk has room for the bytes, so the error does not give a number of bytes."""
    with mounted(place / "disk", "-t", "tmpfs", "-o", "size=1m,nr_inodes=1", "tmpfs"):
        ran = run_limited("convert", place / "in.safetensors", "-o", place / "disk" / "o.pt")
    assert ran.code == 2
    assert ran.err.startswith(f"ckpt: {place}/disk/o.pt: the disk cannot hold more files\n")
