"""Real file systems that share blocks: XFS and Btrfs in files that are mounted. Needs root and their tools."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import convert, execute, open_checkpoint, plan_remap

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
    subprocess.run(["umount", place], check=True)


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
