"""Zip files of torch.save are read to the bit; an archive that contradicts itself is refused."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.ties import shared_keys
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.features import FLOAT4, needs, needs_module, saves
from tests.helpers_formats import (
    assert_same,
    bits,
    opened,
    random_tensor,
    rezip,
    saved,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
IN_TORCH = [dtype for code, dtype in DTYPES.items() if saves(code) and not code.startswith("Q")]
STATE = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "n": torch.tensor(7)}
GOOD = saved(STATE)


def loaded(path: str) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype.code) for dtype in IN_TORCH])
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, dtype: Any) -> None:
    kind = getattr(torch, dtype.torch_name)
    state = {"m": random_tensor(kind, (3, 4)), "v": random_tensor(kind, (6,), seed=1), "e": random_tensor(kind, (0, 2))}
    if dtype.code != "F4":
        state["s"] = random_tensor(kind, ())
    path = write(tmp_path, saved(state))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, loaded(path))
        assert_same(checkpoint, state)
        assert (checkpoint.format, checkpoint.warnings, checkpoint.references) == ("torch-zip", (), ())


BASE = torch.arange(24, dtype=torch.float32)
COMPLEX = torch.complex(BASE[:8], -BASE[8:16])
with warnings.catch_warnings(action="ignore"):
    HALVES = COMPLEX.to(torch.complex32)
VIEWS = {
    "transposed": BASE.view(4, 6).T,
    "permuted": BASE.view(2, 3, 4).permute(2, 0, 1),
    "sliced": BASE[5:9],
    "strided": BASE[1::5],
    "both": BASE.view(4, 6)[1:, ::2],
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "scalar of many": BASE[7],
    "overlapping": BASE.as_strided((5, 4), (2, 1), 3),
    "empty slice": BASE[24:],
    "conj": COMPLEX.conj(),
    "conj of a slice": COMPLEX[1::3].conj(),
    "neg": COMPLEX.conj().imag,
    "real": COMPLEX.real,
    "half conj": HALVES.conj(),
    "double neg": COMPLEX.to(torch.complex128).conj().imag,
    "half neg": HALVES.conj().imag,
    "int8": torch.arange(6, dtype=torch.int8).view(2, 3).T,
    "bool": torch.tensor([[True, False], [False, False]]).T,
    "float8": random_tensor(torch.float8_e4m3fn, (3, 4)).T,
    "complex128": random_tensor(torch.complex128, (3, 2)).T,
    "many ones": BASE.view(1, 24, *[1] * 60).transpose(1, 0),
}
if saves("U64"):
    VIEWS["uint64"] = random_tensor(torch.uint64, (3, 4))[:, 1]
if FLOAT4:
    VIEWS["float4"] = random_tensor(FLOAT4[0], (3, 8))[:, 1:3]
# torch 2.13 writes these to legacy files and cannot load them again.
UNLOADABLE = (*FLOAT4, torch.float8_e4m3fn, torch.uint64, torch.complex32)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_as_their_logical_values(tmp_path: Path, name: str, legacy: bool) -> None:
    path = write(tmp_path, saved({"w": VIEWS[name]}, legacy=legacy))
    if not (legacy and VIEWS[name].dtype in UNLOADABLE):
        assert bits(loaded(path)["w"]) == bits(VIEWS[name])
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, {"w": VIEWS[name]})
        span = checkpoint.span("w")
        assert (span is None) == (VIEWS[name].is_conj() or VIEWS[name].is_neg())


def test_tied_weights_and_overlapping_views_are_shown_as_shared(tmp_path: Path) -> None:
    tied = nn.Linear(3, 3)
    state = {"a": tied.weight, "b": tied.weight, "c": tied.bias, "head": BASE[:12], "tail": BASE[12:], "all": BASE}
    path = write(tmp_path, saved(state))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, loaded(path))
        shared = {key: set(others) for key, others in shared_keys(checkpoint).items()}
        assert shared == {
            "a": {"b"},
            "b": {"a"},
            "head": {"all", "tail"},
            "tail": {"head", "all"},
            "all": {"head", "tail"},
        }


def test_two_halves_of_one_storage_share_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, saved({"head": BASE[:12], "tail": BASE[12:]})) as checkpoint:
        assert shared_keys(checkpoint) == {}


def test_module_versions_are_kept(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with opened(tmp_path, saved(net.state_dict())) as checkpoint:
        assert_same(checkpoint, net.state_dict())
        metadata: Any = net.state_dict()
        assert checkpoint.versions == {name: entry["version"] for name, entry in metadata._metadata.items()}
        assert checkpoint.versions["1"] == 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch_save_is_read(tmp_path: Path, protocol: int) -> None:
    with opened(tmp_path, saved({"epoch": 3, "lr": 0.5, "state_dict": STATE}, protocol=protocol)) as checkpoint:
        assert_same(checkpoint, STATE)
        assert checkpoint.envelope == "state_dict"


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta", "subclass"])
def test_a_tensor_that_is_not_dense_is_listed_and_cannot_be_read(tmp_path: Path, kind: str) -> None:
    makers: dict[str, Any] = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.5, 0, torch.qint8),
        "meta": lambda: torch.empty(3, 3, device="meta"),
        "subclass": lambda: torch.ones(3, 3).as_subclass(Marked),
    }
    with warnings.catch_warnings(action="ignore"):
        data = saved({"w": torch.ones(2), "x": makers[kind]()})
    with opened(tmp_path, data) as checkpoint:
        assert (checkpoint["x"].kind, checkpoint["x"].shape) == (kind, (3, 3))
        assert checkpoint.read_bytes("w") == bits(torch.ones(2))
        with pytest.raises(FormatError, match=f"'x' is a {kind} tensor"):
            checkpoint.payload("x")


class Marked(torch.Tensor):
    """A tensor subclass that no other process can import."""


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(rezip(GOOD), id="written anew by zipfile"),
        pytest.param(rezip(GOOD, method=zipfile.ZIP_DEFLATED), id="B13 deflated"),
        pytest.param(rezip(GOOD, {"archive/.storage_alignment": b"4096"}), id="B25 a lie about alignment"),
        pytest.param(rezip(GOOD, {"archive/byteorder": None, "archive/.format_version": None}), id="before byteorder"),
        pytest.param(GOOD.replace(b"archive/", b"renamed/"), id="B27 another root"),
    ],
)
def test_the_same_tensors_in_another_container_are_read(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data)
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, loaded(path))


def test_a_deflated_archive_is_said_to_be_compressed_and_parts_of_it_are_read(tmp_path: Path) -> None:
    state = {"whole": torch.arange(3_000_000, dtype=torch.int32)}
    state["part"] = state["whole"][2_000_000:2_000_003]
    state["column"] = state["whole"].view(3000, 1000)[:, 999]
    with opened(tmp_path, rezip(saved(state), method=zipfile.ZIP_DEFLATED)) as checkpoint:
        assert any("compressed" in text for text in checkpoint.warnings)
        assert {key: checkpoint.read_bytes(key) for key in checkpoint} == {key: bits(state[key]) for key in state}


@needs(torch.serialization, "get_crc32_options")
@needs_module("torch.utils.serialization.config")
def test_torch_options_of_saving_change_nothing(tmp_path: Path) -> None:
    """B18: files without checksums and files with page-aligned storages read the same."""
    before = torch.serialization.get_crc32_options()
    config: Any = torch.utils.serialization.config.save
    try:
        torch.serialization.set_crc32_options(False)
        without = saved(STATE)
        config.storage_alignment = 4096
        aligned = saved(STATE)
    finally:
        torch.serialization.set_crc32_options(before)
        config.storage_alignment = 64
    for data in (without, aligned):
        with opened(tmp_path, data) as checkpoint:
            assert_same(checkpoint, STATE)
            assert [line for line in checkpoint.warnings if "no checksums in the archive" in line]
            assert len(checkpoint.warnings) == 1


@needs(torch.serialization, "skip_data")
def test_storages_that_torch_save_skipped_are_named(tmp_path: Path) -> None:
    """B19: a warning names records whose bytes were never written; empty records are complete."""
    with torch.serialization.skip_data():
        skipped, empty = saved(STATE), saved({"e": torch.zeros(0)})
    with opened(tmp_path, skipped) as checkpoint:
        (line,) = checkpoint.warnings
        assert re.match(
            r"torch.save did not write the bytes of storages .*: 2 records .*, such as 'archive/data/0'$", line
        )
        assert checkpoint.read_bytes("w") == bytes(24)
    with opened(tmp_path, empty) as checkpoint:
        assert checkpoint.warnings == ()


@pytest.mark.parametrize("name", ["a.b.c.pt", "noext", "wéights.pt", "x y.bin"])
def test_the_name_of_the_file_says_nothing_about_the_root(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(STATE, path)
    path.rename(tmp_path / "renamed.pt")
    with open_checkpoint(tmp_path / "renamed.pt") as checkpoint:
        assert_same(checkpoint, STATE)
