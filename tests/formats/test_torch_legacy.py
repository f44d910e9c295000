"""Files of torch before 1.6 are read to the bit; a file that contradicts itself is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.ties import shared_keys
from ckptkit.formats import open_checkpoint
from tests.features import saves
from tests.helpers_formats import (
    assert_same,
    bits,
    legacy_file,
    mapping,
    number,
    opened,
    random_tensor,
    refused,
    saved,
    several,
    storage,
    tensor,
    text,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
IN_TORCH = [dtype for code, dtype in DTYPES.items() if saves(code) and not code.startswith("Q")]
# torch 2.13 writes these with untyped storages, and fails to load them because the dtype is missing.
UNLOADABLE = {code for code in DTYPES if code.startswith(("F4", "F8", "U16", "U32", "U64", "C32", "BITS"))}


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype.code) for dtype in IN_TORCH])
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, dtype: Any) -> None:
    kind = getattr(torch, dtype.torch_name)
    state = {"m": random_tensor(kind, (3, 4)), "v": random_tensor(kind, (6,), seed=1), "e": random_tensor(kind, (0, 2))}
    if dtype.code != "F4":
        state["s"] = random_tensor(kind, ())
    path = write(tmp_path, saved(state, legacy=True))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, state)
        assert (checkpoint.format, checkpoint.warnings) == ("torch-legacy", ())
    if dtype.code not in UNLOADABLE:
        loaded = torch.load(path, weights_only=True)
        assert {key: bits(value) for key, value in loaded.items()} == {key: bits(value) for key, value in state.items()}


def test_tied_weights_and_versions_are_kept(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    state: Any = net.state_dict()
    path = write(tmp_path, saved(state, legacy=True))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, torch.load(path, weights_only=True))
        assert shared_keys(checkpoint) == {"0.weight": ("2.weight",), "2.weight": ("0.weight",)}
        assert checkpoint.versions == {name: entry["version"] for name, entry in state._metadata.items()}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch_save_is_read(tmp_path: Path, protocol: int) -> None:
    state = {"w": torch.arange(3.0), "n": torch.tensor(2)}
    with opened(tmp_path, saved(state, legacy=True, protocol=protocol)) as checkpoint:
        assert_same(checkpoint, state)


def test_a_pickle_longer_than_the_first_window_is_read(tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0), "names": ["x" * 1000 + str(index) for index in range(1500)]}
    with opened(tmp_path, saved(state, legacy=True)) as checkpoint:
        assert checkpoint.read_bytes("w") == bits(state["w"])  # type: ignore[arg-type]
        assert [(entry.path, entry.value) for entry in checkpoint.entries] == [("names", "1,500 items")]


def part(*numbers: int) -> bytes:
    """Return the persistent id of a view of a storage: (key of the view, offset, size), in elements."""
    return storage("0", 4, "torch.FloatStorage", "cpu", several(text("v"), *map(number, numbers)))


def test_a_view_of_a_part_of_a_storage_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    whole = storage("0", 4, "torch.FloatStorage", "cpu", b"N")
    body = mapping({"all": tensor(whole), "part": tensor(part(1, 3), offset=1, size=(2,), stride=(1,))})
    path = write(tmp_path, legacy_file(body))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, torch.load(path, weights_only=True))
        assert checkpoint.read_bytes("part") == bytes(range(8, 16))
        assert shared_keys(checkpoint) == {"all": ("part",), "part": ("all",)}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncation_at_every_byte_is_refused(tmp_path: Path, legacy: bool) -> None:
    """C3, F4: a partial download is never accepted as a whole checkpoint."""
    data = saved({"w": torch.arange(3.0), "epoch": 3, "name": "x" * 300}, legacy=legacy)
    reasons = {refused(tmp_path, data[:size]).reason for size in range(len(data))}
    assert len(reasons) > 3
