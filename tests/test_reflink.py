"""Outputs that share blocks of the disk with their inputs. The file system of most tests shares by copying."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import choose_output, convert, execute, merge, open_checkpoint, plan_remap
from ckptkit.errors import ChangedError, OutputError
from ckptkit.formats.writing import reflink
from tests.helpers_cli import run_ckpt
from tests.helpers_faults import Faults, outcome
from tests.helpers_outputs import names_in

BLOCK = 4096
STATE = {"a": torch.arange(30_000.0), "b": torch.arange(50_001.0), "small": torch.ones(3), "c": torch.zeros(40_000)}


class Clones:
    """A file system that shares blocks, in the place of the real one; ``nth`` is the trial that fails, if any."""

    def __init__(self, nth: int = 0) -> None:
        self.nth = nth
        self.calls = 0
        self.shared = 0

    def __call__(self, fd: int, request: int, argument: bytes) -> int:
        assert request == 0x4020940D
        self.calls += 1
        if self.calls == self.nth:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        source, offset, nbytes, at = struct.unpack("@qQQQ", argument)
        assert (offset % BLOCK, nbytes % BLOCK, at % BLOCK) == (0, 0, 0)
        assert os.pwrite(fd, os.pread(source, nbytes, offset), at) == nbytes
        if self.calls > 1:
            self.shared += nbytes
        return 0


@pytest.fixture
def clones(monkeypatch: pytest.MonkeyPatch) -> Clones:
    sharing = Clones()
    monkeypatch.setattr(reflink, "_blocks", {})
    monkeypatch.setattr(fcntl, "ioctl", sharing)
    return sharing


def saved(path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save({"model": STATE, "epoch": 3}, path)
    else:
        save_file(STATE, path)
    return path


def loaded(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        return {key: value for name in names_in(path) if name.endswith(".safetensors")
                for key, value in load_file(path / name).items()}  # fmt: skip
    found: Any = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    state: dict[str, torch.Tensor] = found.get("model", found)
    return state


def same(found: dict[str, torch.Tensor], renamed: str = "a") -> bool:
    wanted = {renamed if key == "a" else key: value for key, value in STATE.items()}
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("name", "out"), [("in.safetensors", "out.safetensors"), ("in.pt", "out.pt")])
def test_whole_blocks_of_unchanged_bytes_are_shared(name: str, out: str, tmp_path: Path, clones: Clones) -> None:
    """Only the header and the ends of ranges are written; other libraries read the same tensors."""
    with open_checkpoint(saved(tmp_path / name)) as checkpoint:
        written = execute(plan_remap(checkpoint, ["a=first.a"]), checkpoint, tmp_path / out)
    assert same(loaded(tmp_path / out), "first.a")
    assert written.shared == clones.shared
    assert written.shared > sum(tensor.nbytes for tensor in STATE.values()) - 3 * 2 * BLOCK
    assert f"shares {written.shared / 1000:.1f} kB on the disk with the input (reflink)" in str(written)


def test_shards_are_shared_too(tmp_path: Path, clones: Clones) -> None:
    written = convert(saved(tmp_path / "in.safetensors"), tmp_path / "out", max_shard_size=300_000)
    assert same(loaded(tmp_path / "out"))
    assert written.shared == clones.shared
    assert written.shared > 300_000


def test_a_merge_shares_what_it_copies(tmp_path: Path, clones: Clones) -> None:
    save_file({"c": torch.ones(40_000)}, tmp_path / "donor.safetensors")
    base = saved(tmp_path / "base.safetensors")
    written = merge(base, tmp_path / "donor.safetensors", tmp_path / "out.safetensors")
    assert same({**loaded(tmp_path / "out.safetensors"), "c": STATE["c"]})
    assert written.shared == clones.shared > 0


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_trial_may_fail(nth: int, tmp_path: Path, clones: Clones) -> None:
    """The first trial, or any later one: the bytes are copied, and the output is the same."""
    clones.nth = nth
    written = convert(saved(tmp_path / "in.pt"), tmp_path / "out.pt", verify=True)
    assert same(loaded(tmp_path / "out.pt"))
    assert (written.shared == 0) == (nth == 1)


@pytest.mark.parametrize("name", ["in.safetensors", "in.pt"])
def test_any_system_call_may_fail_while_blocks_are_shared(name: str, tmp_path: Path, clones: Clones) -> None:
    """The n-th call fails, for n = 1 until all succeed: the output is the old or the new one, and nothing is left."""
    source, out = saved(tmp_path / name), tmp_path / f"out{Path(name).suffix}"
    for nth in itertools.count(1):
        out.write_bytes(b"old")
        clones.calls = 0
        reflink._blocks.clear()  # each run tries whether blocks can be shared
        with open_checkpoint(source) as checkpoint, pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch)
            plan, output = plan_remap(checkpoint), choose_output(out, force=True)
            faults.arm(nth, errno.EIO)
            refusal = outcome(lambda: execute(plan, checkpoint, output))  # noqa: B023 - called at once
        # The directory could not be flushed after the output had its name: then the output is whole.
        assert (refusal is not None and out.read_bytes() == b"old") or same(loaded(out)), nth
        assert names_in(tmp_path) == sorted([name, out.name])
        if faults.count < nth:
            assert refusal is None
            assert clones.calls > 1  # after the trial
            assert nth > 20
            return


def renamed_over(path: Path) -> None:
    save_file({"newer": torch.ones(4)}, path.with_name("newer"))
    path.with_name("newer").replace(path)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(200_000))
    os.utime(path, ns=(1, 1))  # as if the clock had gone on since the file was written


@pytest.mark.parametrize("change", [renamed_over, rewritten, lambda path: os.truncate(path, 300_000)])
def test_an_input_may_change_while_blocks_are_shared(
    change: Callable[[Path], None], tmp_path: Path, clones: Clones
) -> None:
    """An input that is renamed over, written in place or cut is refused: a mix of both never gets the name."""
    source, out = saved(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    seen: list[bytes] = []

    def progress(_: int) -> None:
        if not seen:
            change(source)
            seen.append(source.read_bytes())

    with open_checkpoint(source) as checkpoint, pytest.raises(ChangedError):
        execute(plan_remap(checkpoint), checkpoint, choose_output(out, force=True), progress=progress)
    assert clones.shared
    assert (source.read_bytes(), out.read_bytes()) == (seen[0], b"old")
    assert names_in(tmp_path) == ["in.safetensors", "out.safetensors"]


def test_never_copies(tmp_path: Path, clones: Clones, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the kernel copies, since it shares blocks by itself where it can."""

    def refuse(*_: object) -> int:
        raise AssertionError

    monkeypatch.setattr(os, "copy_file_range", refuse)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    source = saved(tmp_path / "a" / "model.safetensors")
    for out in ("model.safetensors", "model.pt"):
        written = convert(source, tmp_path / "b" / out, reflink="never", carry=True, force=True)
        assert same(loaded(tmp_path / "b" / out))
        assert (written.shared, written.carried, clones.calls) == (0, ("tokenizer.json",), 0)


def test_always_refuses_a_file_system_that_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clones: Clones
) -> None:
    """Nothing is written, and the hint says how the bytes are copied instead."""
    clones.nth = 1
    source = saved(tmp_path / "in.safetensors")
    found = run_ckpt(capsys, "convert", source, "-o", tmp_path / "out.pt", "--reflink", "always")
    assert (found.code, found.out) == (2, "")
    assert f"{tmp_path}/out.pt: cannot share blocks with {source}" in found.err
    assert "hint: --reflink auto copies" in found.err
    with pytest.raises(OutputError, match="cannot share blocks"):
        convert(source, tmp_path / "out", max_shard_size="1MB", reflink="always")
    assert names_in(tmp_path) == ["in.safetensors"]


def test_a_small_file_keeps_its_short_header(tmp_path: Path, clones: Clones) -> None:
    """Spaces for the sake of a block are not worth it where there are few blocks."""
    save_file({"w": torch.ones(200)}, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").stat().st_size < 1000
    assert clones.shared == 0


def test_an_output_is_chosen_with_one_of_three_words() -> None:
    assert [choose_output("a.pt", reflink=word).reflink for word in ("auto", "always", "never")] == list(
        reflink.REFLINKS
    )
