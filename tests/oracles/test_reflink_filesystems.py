"""Real file systems that share blocks: XFS and Btrfs in files that are mounted. Needs root and their tools."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import choose_output, convert, execute, open_checkpoint, plan_remap
from ckptkit.errors import OutputError
from tests.helpers_faults import Case, Faults, fail_each_call, kill_at_each_call, outcome, saved
from tests.helpers_outputs import names_in, sha256

MAKE = {"xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q")}


@pytest.fixture(params=MAKE)
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    command = MAKE[request.param]
    if os.geteuid() or shutil.which(command[0]) is None:
        pytest.skip(f"needs root and {command[0]}")
    image, place = tmp_path / "image", tmp_path / "place"
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([*command, image], check=True, capture_output=True)
    place.mkdir()
    if subprocess.run(["mount", "-o", "loop", image, place], check=False, capture_output=True).returncode:
        pytest.skip("a file cannot be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # a call of close() that failed leaves a file open


def used(place: Path) -> int:
    os.sync()
    disk = os.statvfs(place)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


def test_blocks_are_shared_and_files_independent(mounted: Path) -> None:
    """An output of 60 MB takes less than 2 MB of the disk, and a later change of the input does not change it."""
    state = {f"l{number}": torch.randn(1_500_000) for number in range(10)}
    save_file(state, mounted / "in.safetensors")
    torch.save(state, mounted / "in.pt")
    before = used(mounted)
    with open_checkpoint(mounted / "in.safetensors") as checkpoint:
        plan = plan_remap(checkpoint, ["l*=layer.*"])
        written = execute(plan, checkpoint, mounted / "out.safetensors", verify=True)
    edited = convert(mounted / "in.pt", mounted / "out.pt", verify=True, reflink="always")
    assert written.shared > 59_000_000
    assert edited.shared > 59_000_000
    assert used(mounted) - before < 4_000_000
    with (mounted / "in.safetensors").open("r+b") as file:
        file.seek(1 << 20)
        file.write(bytes(1 << 20))
    found = load_file(mounted / "out.safetensors")
    assert all(torch.equal(found[f"layer.{key[1:]}"], value) for key, value in state.items())


def test_never_takes_space(mounted: Path) -> None:
    save_file({"w": torch.randn(5_000_000)}, mounted / "in.safetensors")
    before = used(mounted)
    convert(mounted / "in.safetensors", mounted / "out.safetensors", reflink="never")
    assert used(mounted) - before > 19_000_000


FEW = {"a": torch.arange(30_000.0), "b": torch.arange(50_001.0), "small": torch.ones(3)}
CASES = [
    Case("in.safetensors", "out.safetensors"),
    Case("run.pt", "out.pt"),
    Case("in.pt", "out.safetensors", dtype="F64"),
    Case("in.safetensors", "out", 130_000),
]


@pytest.mark.parametrize("case", CASES, ids=[case.out + str(case.dtype or "") for case in CASES])
def test_any_system_call_may_fail(case: Case, mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th call fails, also the one that shares blocks: the output is the old or the new one."""
    fail_each_call(case, saved(mounted / case.name, FEW), mounted, Faults(monkeypatch))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=["file", "training checkpoint", "shards"])
def test_a_process_may_be_killed_at_any_system_call(case: Case, mounted: Path) -> None:
    kill_at_each_call(case, saved(mounted / case.name, FEW), mounted)


@pytest.mark.parametrize("mounted", ["xfs"], indirect=True)  # Btrfs needs space for the tables of its own
def test_shared_blocks_fit_on_a_full_disk_and_new_bytes_do_not(mounted: Path) -> None:
    """A renamed copy of 60 MB fits on a disk with less space free. A cast does not, and the old output stays."""
    save_file({"w": torch.randn(15_000_000)}, mounted / "in.safetensors")
    with (mounted / "other").open("wb") as file, contextlib.suppress(OSError):
        while (disk := os.statvfs(mounted)).f_bavail * disk.f_frsize > 40 << 20:
            os.pwrite(file.fileno(), bytes(4 << 20), os.fstat(file.fileno()).st_size)
            os.fsync(file.fileno())
    written = convert(mounted / "in.safetensors", mounted / "copy.safetensors", reflink="always", verify=True)
    assert written.shared > 59_000_000
    before = sha256(mounted / "copy.safetensors")
    with open_checkpoint(mounted / "in.safetensors") as checkpoint:
        output = choose_output(mounted / "copy.safetensors", force=True)
        refusal = outcome(lambda: execute(plan_remap(checkpoint, dtype="F64"), checkpoint, output))
    assert isinstance(refusal, OutputError)
    assert refusal.reason.startswith("not enough disk space: 120.0 MB needed, ")
    assert sha256(mounted / "copy.safetensors") == before
    assert names_in(mounted) == ["copy.safetensors", "in.safetensors", "other"]
