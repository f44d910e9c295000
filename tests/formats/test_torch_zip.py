"""torch's zip files: what torch.save writes is read bit by bit; an archive that contradicts itself is refused."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zipfile
import zlib
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
    mapping,
    opened,
    patch_central,
    pickled,
    random_tensor,
    refused,
    rezip,
    saved,
    storage,
    tensor,
    torch_zip,
    write,
    zip_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
IN_TORCH = [dtype for dtype in DTYPES.values() if dtype.torch_name and not dtype.code.startswith("Q")]
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
    "float4": random_tensor(torch.float4_e2m1fn_x2, (3, 8))[:, 1:3],
    "uint64": random_tensor(torch.uint64, (3, 4))[:, 1],
    "complex128": random_tensor(torch.complex128, (3, 2)).T,
    "many ones": BASE.view(1, 24, *[1] * 60).transpose(1, 0),
}
# torch 2.13 writes these into legacy files and cannot load them from there.
UNLOADABLE = (torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.uint64, torch.complex32)


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
def test_what_is_no_dense_tensor_is_listed_and_cannot_be_read(tmp_path: Path, kind: str) -> None:
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
    """A subclass that nobody else knows."""


# --- the container ---------------------------------------------------------------------------------------------------


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


def test_torch_options_of_saving_change_nothing(tmp_path: Path) -> None:
    """B18: without checksums; and with storages aligned to pages."""
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


def test_storages_skipped_at_save_are_said_to_be(tmp_path: Path) -> None:
    """B19: the records are there, with zeros in place of what was never written; empty ones lack nothing."""
    with torch.serialization.skip_data():
        skipped, empty = saved(STATE), saved({"e": torch.zeros(0)})
    with opened(tmp_path, skipped) as checkpoint:
        (line,) = checkpoint.warnings
        assert re.match(r"storage bytes were skipped at save .*: 2 records .*, such as 'archive/data/0'$", line)
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


def test_many_entries_are_read(tmp_path: Path) -> None:
    """B21, and the zip64 directory that 65,536 entries need."""
    extra: dict[str, bytes | None] = {f"archive/extra/{index}": b"" for index in range(70_000)}
    with opened(tmp_path, rezip(GOOD, extra)) as checkpoint:
        assert_same(checkpoint, STATE)


def sparse_archive(path: Path, entries: list[tuple[str, bytes, int]]) -> None:
    """An archive in zip64 with room for (name, content, size), as torch writes it: sizes in the directory only."""
    directory = b""
    with path.open("wb") as file:
        for name, content, size in entries:
            raw, header = name.encode(), file.tell()
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0x808, 0, 0, 0, 0, 0, 0, len(raw), 0) + raw)
            file.seek(size - len(content), 1)
            file.write(content)
            crc, extra = (
                (zlib.crc32(content) if len(content) == size else 0),
                struct.pack("<HH3Q", 1, 24, size, size, header),
            )
            fields = (45, 45, 0x808, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1, len(raw), len(extra), 0, 0, 0, 0, 2**32 - 1)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + raw + extra
        start, count = file.tell(), len(entries)
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
        file.write(directory + end64 + locator + end)


def test_a_storage_beyond_four_gigabytes_is_found(tmp_path: Path) -> None:
    """B28, in a sparse file: 64-bit sizes and offsets, and nothing of it is read but what is asked for."""
    size = (1 << 32) + 64
    body = mapping(
        {
            "big": tensor(storage("0", size // 4), size=(size // 4,), stride=(1,)),
            "end": tensor(storage("0", size // 4), offset=size // 4 - 1, size=(1,), stride=(1,)),
            "w": tensor(storage("1")),
        }
    )
    data = pickled(body)
    path = tmp_path / "big.pt"
    records = [("data.pkl", data, len(data)), ("data/0", b"last", size), ("data/1", bytes(range(16)), 16)]
    sparse_archive(path, [(f"archive/{name}", content, room) for name, content, room in records])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["big"].nbytes == size
        assert checkpoint.read_bytes("end") == b"last"
        assert checkpoint.read_bytes("w") == bytes(range(16))


# --- hostile archives (table B) --------------------------------------------------------------------------------------


def moved(data: bytes, name: str, other: str) -> bytes:
    """The archive with one entry of the directory pointing to the local header of another."""
    return patch_central(data, name, header=data.find(other.encode()) - 30)


def local_name(data: bytes, name: str, other: str) -> bytes:
    at = data.find(name.encode())
    return data[:at] + other.encode() + data[at + len(name) :]


def local_method(data: bytes, name: str, method: int) -> bytes:
    at = data.find(name.encode()) - 30
    return data[: at + 8] + struct.pack("<H", method) + data[at + 10 :]


def with_record(name: str, content: bytes = b"x") -> bytes:
    return rezip(GOOD, {name: content})


def twice(name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(GOOD)) as archive:
        entries = [(item, archive.read(item)) for item in archive.namelist()]
    data = zip_of([*entries, (name.replace("archive", "archivE"), b"x")])
    return data.replace(b"archivE", b"archive")


def damaged(data: bytes, name: str) -> bytes:
    """The archive with the first byte of one entry's content overwritten."""
    at = data.find(name.encode())
    at += sum(struct.unpack_from("<HH", data, at - 4))
    return data[:at] + b"\xff" + data[at + 1 :]


def longer_than_said() -> bytes:
    data = rezip(GOOD, {"archive/data/0": bytes(400)}, zipfile.ZIP_DEFLATED)
    at = data.find(b"archive/data/0") - 8
    return patch_central(data[:at] + struct.pack("<L", 24) + data[at + 4 :], "archive/data/0", size=24)


HOSTILE = [
    pytest.param(b"PK\3\4", "without a directory at its end", id="A2 only the magic"),
    pytest.param(GOOD[: len(GOOD) // 2], "without a directory at its end: truncated", id="B1 half"),
    pytest.param(GOOD[:-10], "without a directory at its end: truncated", id="B1 ten bytes short"),
    pytest.param(b"junk" + GOOD, "an unknown format", id="B2 junk before"),
    pytest.param(GOOD + b"junk", "4 bytes follow the end", id="B3 junk behind"),
    pytest.param(twice("archive/data.pkl"), "two zip entries are called 'archive/data.pkl'", id="B4 two pickles"),
    pytest.param(twice("archive/data/0"), "two zip entries are called 'archive/data/0'", id="B5 two storages"),
    pytest.param(with_record("other/data.pkl"), "2 entries called data.pkl", id="B6 two roots"),
    pytest.param(with_record("data.pkl"), "2 entries called data.pkl", id="B6 and one without root"),
    pytest.param(rezip(GOOD, {"archive/data.pkl": None}), "no data.pkl", id="B7 no pickle"),
    pytest.param(zip_of([]), "unknown format", id="B7 empty archive"),
    pytest.param(zip_of([("a.txt", b"hello")]), "no data.pkl", id="B7 any other archive"),
    pytest.param(
        local_name(GOOD, "archive/data/0", "archive/data/9"), "disagree on its name", id="B8 another local name"
    ),
    pytest.param(
        moved(GOOD, "archive/data/0", "archive/data/1"), "disagree on its name|overlaps", id="B9 pointing elsewhere"
    ),
    pytest.param(
        patch_central(GOOD, "archive/data/0", header=2**31), "lies beyond the archive", id="B9 pointing outside"
    ),
    pytest.param(
        patch_central(GOOD, "archive/data/0", size=2**31 - 1), "is stored with 24 bytes and claims", id="B10 size"
    ),
    pytest.param(
        patch_central(GOOD, "archive/data/0", size=2**31 - 1, packed=2**31 - 1),
        "ends beyond the archive",
        id="B10 both",
    ),
    pytest.param(
        patch_central(GOOD, "archive/data/0", size=8, packed=8), "storage '0': 24 bytes named, 8 stored", id="B10 less"
    ),
    pytest.param(
        patch_central(rezip(GOOD), "archive/data/0", size=8, packed=8), "disagree on its size", id="B10 local header"
    ),
    pytest.param(
        patch_central(GOOD, "archive/data/0", attributes=0x10), "marked as a directory", id="B11 directory bit"
    ),
    pytest.param(patch_central(GOOD, "archive/data/0", method=8), "disagree on its method", id="B12 method"),
    pytest.param(
        patch_central(local_method(GOOD, "archive/data/0", 8), "archive/data/0", method=8),
        "compressed data is damaged|ends .* bytes early",
        id="B12 both headers lie about the method",
    ),
    pytest.param(rezip(GOOD, method=zipfile.ZIP_LZMA), "compression method 14 is not supported", id="B14 LZMA"),
    pytest.param(rezip(GOOD, method=zipfile.ZIP_BZIP2), "compression method 12 is not supported", id="B14 BZ2"),
    pytest.param(
        patch_central(GOOD, "archive/data/0", flags=0x809), "'archive/data/0' is encrypted", id="B15 encrypted"
    ),
    pytest.param(damaged(GOOD, "archive/data.pkl"), "data.pkl does not match its checksum", id="B17 flipped pickle"),
    pytest.param(
        damaged(rezip(GOOD, method=8), "archive/data/0"), "compressed data is damaged", id="B17 flipped deflate"
    ),
    pytest.param(longer_than_said(), "compressed data goes on behind 24 bytes", id="B20 inflates to more than named"),
    pytest.param(rezip(GOOD, {"archive/version": b"99\n"}), "format version is '99', newer", id="B22 version"),
    pytest.param(rezip(GOOD, {"archive/version": b"x" * 5000}), "has 5000 bytes", id="B22 a long version"),
    pytest.param(rezip(GOOD, {"archive/byteorder": b"big"}), "big-endian machine", id="B23 big"),
    pytest.param(rezip(GOOD, {"archive/byteorder": b"middle"}), "its byte order is 'middle'", id="B24 middle"),
    pytest.param(with_record("archive/constants.pkl"), "a TorchScript archive", id="B26 TorchScript"),
    pytest.param(with_record("archive/../data/0"), "unsafe name 'archive/../data/0'", id="B29 parent"),
    pytest.param(with_record("/archive/x"), "unsafe name '/archive/x'", id="B29 absolute"),
    pytest.param(with_record("archive\\x"), r"unsafe name 'archive\\\\x'", id="B29 backslash"),
    pytest.param(with_record("archive/q_q").replace(b"q_q", b"q\0q"), r"unsafe name 'archive/q\\x00q'", id="B29 NUL"),
    pytest.param(with_record("archive/q_q").replace(b"q_q", b"q\xffq"), "a name that is not UTF-8", id="B29 not UTF-8"),
    pytest.param(torch_zip(mapping({"w": tensor()}), {}), "storage '0' is not in the archive", id="D7 no record"),
    pytest.param(torch_zip(mapping({"w": tensor(storage("../data/0"))})), "storage '../data/0' is not", id="D7 key"),
    pytest.param(torch_zip(mapping({"w": tensor()}), {"0": bytes(20)}), "16 bytes named, 20 stored", id="D6 larger"),
    pytest.param(torch_zip(mapping({"w": tensor()}), {"0": bytes(12)}), "16 bytes named, 12 stored", id="D6 smaller"),
]


@pytest.mark.parametrize(("data", "reason"), HOSTILE)
def test_an_archive_that_contradicts_itself_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    error = refused(tmp_path, data)
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
