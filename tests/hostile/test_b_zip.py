"""Table B: a zip archive that contradicts itself is refused, and an odd archive is read with a warning."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.features import require
from tests.helpers_formats import (
    bits,
    mapping,
    patch_central,
    pickled,
    refused,
    rezip,
    saved,
    storage,
    tensor,
    zip_of,
)
from tests.hostile.contract import Accepted, Refused, assert_accepted, assert_refused, run_limited, written

STATE = {"w": torch.arange(6, dtype=torch.float32).reshape(2, 3), "n": torch.tensor(7)}
GOOD = saved(STATE)


def moved(data: bytes, name: str, other: str) -> bytes:
    """Return the archive with a directory entry that points to the local header of another entry."""
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
    """Return the archive with the first byte of the content of an entry overwritten."""
    at = data.find(name.encode())
    at += sum(struct.unpack_from("<HH", data, at - 4))
    return data[:at] + b"\xff" + data[at + 1 :]


def without_checksums() -> bytes:
    require(torch.serialization, "get_crc32_options")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return saved(STATE)
    finally:
        torch.serialization.set_crc32_options(before)


def skipped() -> bytes:
    require(torch.serialization, "skip_data")
    with torch.serialization.skip_data():
        return saved(STATE)


def zip64(path: Path, entries: Sequence[tuple[str, bytes, int, int]], claimed: int | None = None) -> Path:
    """Write an archive of (name, bytes, bytes in the file, bytes after inflating), sizes in the directory only.

    Missing bytes of an entry become a hole before its content. ``claimed`` is a false number of entries.
    """
    directory = bytearray()
    with path.open("wb") as file:
        for name, content, packed, size in entries:
            raw, header, method = name.encode(), file.tell(), 0 if packed == size else 8
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0x808, method, 0, 0, 0, 0, 0, len(raw), 0) + raw)
            file.seek(packed - len(content), 1)
            file.write(content)
            crc = zlib.crc32(content) if len(content) == size else 0
            extra = struct.pack("<HH3Q", 1, 24, size, packed, header)
            fields = (45, 45, 0x808, method, 0, 0, crc, 2**32 - 1, 2**32 - 1, len(raw), 28, 0, 0, 0, 0, 2**32 - 1)
            directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + raw + extra
        start, count = file.tell(), len(entries) if claimed is None else claimed
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
        file.write(directory + end64 + locator + end)
    return path


BLOCK = 64 << 20


@cache
def zeros(blocks: int) -> bytes:
    """Return bytes that inflate to a thousand times as many zeros."""
    machine = zlib.compressobj(9, zlib.DEFLATED, -15)
    # After a full flush the stream does not depend on earlier bytes, so the block can be repeated.
    return (machine.compress(bytes(BLOCK)) + machine.flush(zlib.Z_FULL_FLUSH)) * blocks + machine.flush()


def bomb(name: str, *, size: int, blocks: int = 160, directory: Path) -> Path:
    """Write an archive of one tensor with an entry that inflates to ten gigabytes, but has the size ``size``."""
    contents = {"data.pkl": pickled(mapping({"w": tensor()})), "data/0": bytes(16), "version": b"3"}
    entries = [(f"archive/{entry}", data, len(data), len(data)) for entry, data in contents.items() if entry != name]
    packed = zeros(blocks)
    return zip64(directory / "bomb.pt", [*entries, (f"archive/{name}", packed, len(packed), size)])


def crowded(count: int, directory: Path, *, claimed: int | None = None) -> Path:
    pickle = pickled(mapping({"w": tensor()}))
    entries = [("archive/data.pkl", pickle, len(pickle), len(pickle)), ("archive/data/0", bytes(16), 16, 16)]
    entries += [(f"archive/x/{index}", b"", 0, 0) for index in range(count)]
    return zip64(directory / "crowded.pt", entries, claimed)


FULL = 160 * BLOCK
REFUSED: dict[str, Refused] = {
    "B1 half": Refused(written(GOOD[: len(GOOD) // 2]), "no directory at its end, so it is probably truncated"),
    "B1 ten bytes short": Refused(written(GOOD[:-10]), "no directory at its end, so it is probably truncated"),
    "B2 junk before": Refused(written(b"junk" + GOOD), "unknown format: the first bytes are 6a 75 6e 6b"),
    "B3 junk behind": Refused(written(GOOD + b"junk"), "4 bytes follow the end"),
    "B4 two pickles": Refused(written(twice("archive/data.pkl")), "two zip entries are called 'archive/data.pkl'"),
    "B5 two storages": Refused(written(twice("archive/data/0")), "two zip entries are called 'archive/data/0'"),
    "B6 two roots": Refused(written(with_record("other/data.pkl")), "2 entries called data.pkl"),
    "B7 no pickle": Refused(written(rezip(GOOD, {"archive/data.pkl": None})), "no data.pkl"),
    "B7 empty": Refused(written(zip_of([])), "an empty zip archive"),
    "B8 another local name": Refused(
        written(local_name(GOOD, "archive/data/0", "archive/data/9")), "directory and local header disagree on its name"
    ),
    "B9 pointing elsewhere": Refused(
        written(moved(GOOD, "archive/data/0", "archive/data/1")), "directory and local header disagree on its name"
    ),
    "B10 larger": Refused(
        written(patch_central(GOOD, "archive/data/0", size=2**31 - 1)), "stored with 24 bytes and says 2147483647"
    ),
    "B10 smaller": Refused(
        written(patch_central(GOOD, "archive/data/0", size=8, packed=8)),
        "storage '0': the pickle says 24 bytes, the archive has 8",
    ),
    "B11 directory bit": Refused(
        written(patch_central(GOOD, "archive/data/0", attributes=0x10)), "'archive/data/0' is marked as a directory"
    ),
    "B12 method": Refused(
        written(patch_central(GOOD, "archive/data/0", method=8)), "directory and local header disagree on its method"
    ),
    "B14 LZMA": Refused(written(rezip(GOOD, method=zipfile.ZIP_LZMA)), "compression method 14 is not supported"),
    "B14 BZ2": Refused(written(rezip(GOOD, method=zipfile.ZIP_BZIP2)), "compression method 12 is not supported"),
    "B15 encrypted": Refused(
        written(patch_central(GOOD, "archive/data/0", flags=0x809)), "'archive/data/0' is encrypted"
    ),
    "B17 flipped pickle": Refused(written(damaged(GOOD, "archive/data.pkl")), "data.pkl does not match its checksum"),
    "B20 storage": Refused(
        lambda directory: bomb("data/0", size=FULL, directory=directory),
        "storage '0': the pickle says 16 bytes, the archive has 10737418240",
    ),
    "B20 pickle": Refused(
        lambda directory: bomb("data.pkl", size=3 * BLOCK, blocks=3, directory=directory),
        "to 201326592 bytes: a zip bomb",
    ),
    "B20 pickle that hides it": Refused(
        lambda directory: bomb("data.pkl", size=1000, directory=directory), "compressed data continues after 1000 bytes"
    ),
    "B20 version": Refused(
        lambda directory: bomb("version", size=FULL, directory=directory),
        "zip entry 'archive/version' has 10737418240 bytes",
    ),
    "B21 a million entries": Refused(
        lambda directory: crowded(0, directory, claimed=1_000_000), "has 1,000,000 entries, more than the limit"
    ),
    "B22 version": Refused(written(rezip(GOOD, {"archive/version": b"99\n"})), "format version '99' is newer"),
    "B24 middle": Refused(written(rezip(GOOD, {"archive/byteorder": b"middle"})), "its byte order is 'middle'"),
    "B29 parent": Refused(written(with_record("archive/../data/0")), "unsafe name 'archive/../data/0'"),
    "B29 absolute": Refused(written(with_record("/archive/x")), "unsafe name '/archive/x'"),
    "B29 backslash": Refused(written(with_record("archive\\x")), r"unsafe name 'archive\\x'"),
    "B29 NUL": Refused(written(with_record("archive/q_q").replace(b"q_q", b"q\0q")), r"unsafe name 'archive/q\x00q'"),
}
ACCEPTED: dict[str, Accepted] = {
    "B13 deflated": Accepted(written(rezip(GOOD, method=zipfile.ZIP_DEFLATED)), "the archive is compressed", "F32"),
    "B16 flipped storage": Accepted(written(damaged(GOOD, "archive/data/0")), "", "F32"),
    "B18 no checksums": Accepted(written(without_checksums), "no checksums in the archive", "F32"),
    "B19 skipped": Accepted(written(skipped), "torch.save did not write the bytes of storages", "F32"),
    "B21 70,000 entries": Accepted(lambda directory: crowded(70_000, directory), "", "F32"),
    "B25 alignment": Accepted(written(rezip(GOOD, {"archive/.storage_alignment": b"4096"})), "", "F32"),
    "B27 another root": Accepted(written(GOOD.replace(b"archive/", b"renamed/")), "", "F32"),
    "B30 unused": Accepted(
        written(with_record("archive/data/9")), "no tensor uses 1 stored record, such as 'archive/data/9'", "F32"
    ),
}
OTHER = (
    "B16 flipped storage checked",
    "B20 storage that hides it",
    "B23 big",
    "B26 TorchScript",
    "B28 beyond four gigabytes",
)


@pytest.mark.parametrize("name", REFUSED)
def test_an_archive_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_archive_is_listed(name: str, tmp_path: Path) -> None:
    assert_accepted(tmp_path, ACCEPTED[name])


def test_b20_a_storage_that_inflates_to_more_than_its_size_is_not_written(tmp_path: Path) -> None:
    """``show`` reads no tensor; a command that reads one stops at the size of the entry."""
    case = Refused(lambda directory: bomb("data/0", size=16, directory=directory), "compressed data continues after 16")
    assert_refused(tmp_path, case, command="convert")


def test_b16_a_flipped_bit_is_found_by_check(tmp_path: Path) -> None:
    """``show`` reads only headers and says so; ``check`` reads every byte."""
    (tmp_path / "x.pt").write_bytes(damaged(GOOD, "archive/data/0"))
    ran = run_limited("check", tmp_path / "x.pt")
    assert (ran.code, ran.err) == (1, "")
    assert "'archive/data/0' does not match its checksum" in ran.out
    assert "it holds 'w'" in ran.out


def test_b23_big_endian_storages_are_swapped_or_refused(tmp_path: Path) -> None:
    """Big-endian bytes are never read as little-endian numbers."""
    swapped: dict[str, bytes | None] = {
        f"archive/data/{index}": bits(tensor.reshape(-1, 1).view(torch.uint8).flip(-1))
        for index, tensor in enumerate(STATE.values())
    }
    (tmp_path / "big.pt").write_bytes(rezip(GOOD, {"archive/byteorder": b"big", **swapped}))
    ran = run_limited("convert", tmp_path / "big.pt", "-o", tmp_path / "o.safetensors", memory=4 << 30)
    if ran.code == 0:
        assert {key: bits(tensor) for key, tensor in load_file(tmp_path / "o.safetensors").items()} == {
            key: bits(tensor) for key, tensor in STATE.items()
        }
    else:
        assert_refused(tmp_path, Refused(lambda _: tmp_path / "big.pt", "big-endian"))


def test_b26_torchscript_is_named(tmp_path: Path) -> None:
    """The format is named, whether the file is shown or refused."""
    (tmp_path / "script.pt").write_bytes(rezip(GOOD, {"archive/constants.pkl": pickled(b")")}))
    ran = run_limited("show", tmp_path / "script.pt")
    assert "torchscript" in (ran.out if ran.code == 0 else ran.err).lower(), ran
    assert ran.code in (0, 2)


def test_b28_a_storage_beyond_four_gigabytes_is_found(tmp_path: Path) -> None:
    """A sparse file has 64-bit sizes and offsets, and only the requested bytes are read."""
    size = (1 << 32) + 64
    body = mapping(
        {
            "big": tensor(storage("0", size // 4), size=(size // 4,), stride=(1,)),
            "end": tensor(storage("0", size // 4), offset=size // 4 - 1, size=(1,), stride=(1,)),
            "w": tensor(storage("1")),
        }
    )
    data = pickled(body)
    records = [("data.pkl", data, len(data)), ("data/0", b"last", size), ("data/1", bytes(range(16)), 16)]
    path = zip64(tmp_path / "big.pt", [(f"archive/{name}", content, room, room) for name, content, room in records])
    ran = run_limited("show", path)
    assert ran.code == 0
    assert "4.3 GB" in ran.out
    with open_checkpoint(path) as checkpoint:
        assert checkpoint["big"].nbytes == size
        assert checkpoint.read_bytes("end") == b"last"
        assert checkpoint.read_bytes("w") == bytes(range(16))


def longer_than_said() -> bytes:
    data = rezip(GOOD, {"archive/data/0": bytes(400)}, zipfile.ZIP_DEFLATED)
    at = data.find(b"archive/data/0") - 8
    return patch_central(data[:at] + struct.pack("<L", 24) + data[at + 4 :], "archive/data/0", size=24)


VARIANTS = [
    pytest.param(with_record("data.pkl"), "2 entries called data.pkl", id="B6 and one without root"),
    pytest.param(zip_of([("a.txt", b"hello")]), "no data.pkl", id="B7 any other archive"),
    pytest.param(
        patch_central(GOOD, "archive/data/0", header=2**31),
        "is beyond the end of the archive",
        id="B9 pointing outside",
    ),
    pytest.param(
        patch_central(GOOD, "archive/data/0", size=2**31 - 1, packed=2**31 - 1),
        "ends beyond the archive",
        id="B10 both",
    ),
    pytest.param(
        patch_central(rezip(GOOD), "archive/data/0", size=8, packed=8), "disagree on its size", id="B10 local header"
    ),
    pytest.param(
        patch_central(local_method(GOOD, "archive/data/0", 8), "archive/data/0", method=8),
        "compressed data is damaged|ends .* bytes early",
        id="B12 both headers lie about the method",
    ),
    pytest.param(
        damaged(rezip(GOOD, method=8), "archive/data/0"), "compressed data is damaged", id="B17 flipped deflate"
    ),
    pytest.param(longer_than_said(), "compressed data continues after 24 bytes", id="B20 inflates to more than named"),
    pytest.param(rezip(GOOD, {"archive/version": b"x" * 5000}), "has 5000 bytes", id="B22 a long version"),
    pytest.param(with_record("archive/q_q").replace(b"q_q", b"q\xffq"), "a name that is not UTF-8", id="B29 not UTF-8"),
]


@pytest.mark.parametrize(("data", "reason"), VARIANTS)
def test_a_variant_is_refused_when_everything_is_read(tmp_path: Path, data: bytes, reason: str) -> None:
    error = refused(tmp_path, data)
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
