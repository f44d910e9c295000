"""Outputs that take seconds to write and to read again."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from ckptkit import TensorInfo
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.formats.torch.write import layout_torch_zip, write_torch_zip
from ckptkit.formats.writing.atomic import AtomicFile


def test_more_entries_than_16_bits_can_count(tmp_path: Path) -> None:
    """An archive of 65,536 entries is read by every reader."""
    live = as_checkpoint({"w": torch.ones(1)}, "live").payload("w")
    infos = [TensorInfo(f"t{number}", "F32", (1,)) for number in range(0x10000 - 3)]
    layout = layout_torch_zip(infos, lambda _: live, lambda _: None)
    with AtomicFile(str(tmp_path / "many.pt"), layout.nbytes) as file:
        list(write_torch_zip(layout, file))
    with zipfile.ZipFile(tmp_path / "many.pt") as archive:
        assert len(archive.namelist()) == 0x10000
    found = torch.load(tmp_path / "many.pt", weights_only=True)
    assert list(found) == [info.key for info in infos]
    assert all(value.item() == 1 for value in found.values())
