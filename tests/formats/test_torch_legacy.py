"""torch's format before 1.6 is read bit by bit, what torch itself cannot load too; a lie about a storage is refused."""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.tensors import DTYPES, shared_keys
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
IN_TORCH = [dtype for dtype in DTYPES.values() if dtype.torch_name and not dtype.code.startswith("Q")]
# torch 2.13 writes these through its untyped storage, and then finds no dtype on it when it loads them.
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
        assert len(checkpoint.entries) == 1500


def part(*numbers: int) -> bytes:
    """A storage of four floats, of which the pickle takes a part: (key of the view, offset, size), in elements."""
    return storage("0", 4, "torch.FloatStorage", "cpu", several(text("v"), *map(number, numbers)))


def test_a_view_of_a_part_of_a_storage_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    whole = storage("0", 4, "torch.FloatStorage", "cpu", b"N")
    body = mapping({"all": tensor(whole), "part": tensor(part(1, 3), offset=1, size=(2,), stride=(1,))})
    path = write(tmp_path, legacy_file(body))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, torch.load(path, weights_only=True))
        assert checkpoint.read_bytes("part") == bytes(range(8, 16))
        assert shared_keys(checkpoint) == {"all": ("part",), "part": ("all",)}


def test_source_code_that_a_legacy_module_embeds_is_reported(tmp_path: Path) -> None:
    """F6: the file holds the path of somebody's source file, and its text."""
    body = mapping(
        {"w": tensor(), "m": several(text("module"), text("Net"), text("net.py"), text("class Net: ...")) + b"Q"}
    )
    with opened(tmp_path, legacy_file(body)) as checkpoint:
        assert checkpoint.warnings == ("embeds source code of net.py",)
        assert checkpoint.read_bytes("w") == bytes(range(16))


GOOD = legacy_file(mapping({"w": tensor()}))
TWO = mapping({"w": tensor(), "v": tensor(storage("1"))})
FLOATS = struct.pack("<q", 4) + bytes(16)
LARGE = struct.pack("<q", 2**50) + bytes(16)
LAUGHS: Any = [1]
for _ in range(60):
    LAUGHS = [LAUGHS, LAUGHS]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(legacy_file(mapping({"w": tensor()}), magic=0x1950), "a bare pickle", id="F1 magic"),
        pytest.param(
            legacy_file(mapping({"w": tensor()}), protocol=1002), "another protocol than 1001", id="F1 protocol"
        ),
        pytest.param(
            legacy_file(b"}", protocol=10**5000), "another protocol than 1001", id="F1 protocol of 5,000 digits"
        ),
        pytest.param(
            GOOD.replace(pickle.dumps(1001, 2), pickle.dumps(LAUGHS, 2)), "another protocol", id="F1 protocol of laughs"
        ),
        pytest.param(
            legacy_file(mapping({"w": tensor()}), (), b""), "storage '0' is not in the file", id="F2 empty list"
        ),
        pytest.param(legacy_file(TWO, ("0",), FLOATS), "storage '1' is not in the file", id="F2 one is missing"),
        pytest.param(
            legacy_file(mapping({"w": tensor()}), ("9",)), "'9' is in the file and belongs to no", id="F2 unknown"
        ),
        pytest.param(legacy_file(TWO, ("0", "0"), FLOATS + FLOATS), "storage '0' is listed twice", id="F2 twice"),
        pytest.param(legacy_file(b"}", {"0": 1}), "without a list of storages", id="F2 no list"),
        pytest.param(legacy_file(b"}", (1.5,)), "without a list of storages", id="F2 no names"),
        pytest.param(legacy_file(b"}", (10**5000,)), "without a list of storages", id="F2 a name of 5,000 digits"),
        pytest.param(
            legacy_file(mapping({"w": tensor()}), stored=struct.pack("<q", 5) + bytes(20)),
            "storage '0': 16 bytes named, 5 elements of 4 bytes stored",
            id="F3 more than named",
        ),
        pytest.param(
            legacy_file(mapping({"w": tensor()}), stored=struct.pack("<q", -4) + bytes(16)),
            "-4 elements",
            id="F3 negative",
        ),
        pytest.param(
            legacy_file(mapping({"w": tensor()}), stored=LARGE), "1125899906842624 elements", id="F3 2^50 stored"
        ),
        pytest.param(
            legacy_file(mapping({"w": tensor(storage("0", 2**50))}), stored=LARGE),
            "ends 4503599627370480 bytes before the end of storage '0'",
            id="F3 2^50 named and stored",
        ),
        pytest.param(GOOD[:-1], "ends 1 bytes before the end of storage '0'", id="F4 truncated"),
        pytest.param(GOOD[:-20], "ends before storage '0'", id="F4 no length"),
        pytest.param(GOOD + b"junk", "4 bytes follow the last storage", id="F4 junk behind"),
        pytest.param(
            legacy_file(mapping({"w": tensor(part(2, 3))})), "ends at byte 20 of 16", id="F5 view past the end"
        ),
        pytest.param(
            legacy_file(mapping({"w": tensor(part(2, 2))})), "'w': .* byte 16 .* has 8", id="F5 past its part"
        ),
        pytest.param(legacy_file(mapping({"w": tensor(part(-1, 2))})), "described wrongly", id="F5 negative"),
        pytest.param(legacy_file(mapping({"w": tensor(part(1))})), "described wrongly", id="F5 two numbers"),
        pytest.param(legacy_file(mapping({"w": tensor(part(2**70, 1))})), "described wrongly", id="F5 beyond 64 bits"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    error = refused(tmp_path, data)
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncation_at_every_byte_is_refused(tmp_path: Path, legacy: bool) -> None:
    """C3, F4: a download that stopped is never taken for a whole checkpoint."""
    data = saved({"w": torch.arange(3.0), "epoch": 3, "name": "x" * 300}, legacy=legacy)
    reasons = {refused(tmp_path, data[:size]).reason for size in range(len(data))}
    assert len(reasons) > 3
