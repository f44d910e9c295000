"""``ckpt check`` finds damage wherever a checksum is recorded, and lists what it did not check."""

from __future__ import annotations

import io
import json
import os
import pty
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptkit import Finding, Report, open_checkpoint, run_checks
from ckptkit.core.checkpoint import Access, Checkpoint, Description
from ckptkit.core.files.local import LocalFile
from ckptkit.errors import RuleError
from ckptkit.formats.zip_archive import read_zip_directory
from tests.features import require
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_dcp import save, write_cut
from tests.helpers_formats import bits, rezip, saved, write
from tests.helpers_gguf import gguf_file, info
from tests.hostile.contract import run_limited

WEIGHT = torch.arange(3000, dtype=torch.float32)
TIED = {"a": WEIGHT, "n": torch.tensor(7), "b": WEIGHT}
IN_RUN = {"w": torch.arange(4.0) + 2, "b": torch.arange(2.0) + 30, "optimizer.m": torch.full((6,), 5.0)}
TRAINED = {
    "model": {"w": IN_RUN["w"], "b": IN_RUN["b"]},
    "optimizer": {"m": IN_RUN["optimizer.m"]},
    "epoch": 3,
}


def checked(path: str | Path, **settings: Any) -> Report:
    with open_checkpoint(path) as checkpoint:
        return run_checks(checkpoint, **settings)


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def only(report: Report, code: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.code == code]
    return finding


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def middle_of(data: bytes, name: str) -> int:
    """Return the offset of the middle byte of an entry's content, as ``zipfile`` finds it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.getinfo(name)
    name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
    return info.header_offset + 30 + int(name_length) + int(extra_length) + info.compress_size // 2


def bad_entry(data: bytes) -> str | None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.testzip()


def _torch(thing: object, **settings: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        torch.save(thing, directory / "file.pt", **settings)
        return directory / "file.pt"

    return make


def _safetensors(directory: Path) -> Path:
    save_file({"w": torch.eye(3), "e": torch.ones(0), "h": torch.ones(2, dtype=torch.float16)}, directory / "f.st")
    return directory / "f.st"


def _shards(suffix: str, store: Callable[[dict[str, torch.Tensor], Path], object]) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        names = {key: f"model-0000{number}-of-00002.{suffix}" for number, key in enumerate(("one", "two"), 1)}
        for key, name in names.items():
            store({key: torch.ones(500)}, directory / name)
        index = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
        (directory / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return directory

    return make


def _dcp(directory: Path) -> Path:
    return Path(save(directory / "run", TRAINED))


def _dcp_safetensors(directory: Path) -> Path:
    for rank in (1, 2):
        info = json.dumps({"w": {"saved_offsets": [3 * rank - 3, 0]}})
        name = f"shard-0000{rank}-model-00001-of-00001.safetensors"
        save_file(
            {"w": torch.eye(3)[:, :2].clone()}, directory / name, {"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0"}
        )
    return directory


def _deflated(directory: Path) -> Path:
    return Path(write(directory, rezip(saved(TIED), method=zipfile.ZIP_DEFLATED)))


def _trainer(directory: Path) -> Path:
    save_file({"w": torch.ones(10)}, directory / "model.safetensors")
    torch.save({"state": {}, "param_groups": []}, directory / "optimizer.pt")
    return directory


def _gguf(directory: Path) -> Path:
    infos = [info("v", offset=32), info("q", (32,), kind=8, offset=64), info("w")]
    return Path(write(directory, gguf_file(infos, data=bytes(range(98))), "f.gguf"))


CLEAN: dict[str, tuple[Callable[[Path], Path], list[str], int]] = {
    # id: (maker, codes, bytes of the tensors in the files)
    "torch zip": (_torch(TIED), ["not-scanned"], 12008),
    "torch zip of a run": (_torch(TRAINED), ["not-scanned"], 48),
    "torch legacy": (_torch(TIED, _use_new_zipfile_serialization=False), ["no-checksum", "not-scanned"], 12008),
    "safetensors": (_safetensors, ["dtype-mix", "no-checksum", "not-scanned"], 40),
    "sharded safetensors": (_shards("safetensors", save_file), ["no-checksum", "not-scanned"], 4000),
    "sharded torch": (_shards("bin", torch.save), ["not-scanned"], 4000),
    "dcp": (_dcp, ["not-scanned"], 48),
    "dcp safetensors": (_dcp_safetensors, ["uncounted", "no-checksum", "not-scanned"], 48),
    "trainer's directory": (_trainer, ["no-checksum", "not-scanned"], 40),
    "gguf": (_gguf, ["not-dense", "no-checksum", "not-scanned"], 66),
    "deflated": (_deflated, ["compressed", "not-scanned"], 12008),
}


@pytest.mark.parametrize(("make", "expected", "nbytes"), CLEAN.values(), ids=CLEAN.keys())
def test_clean_files_have_only_notes(
    make: Callable[[Path], Path], expected: list[str], nbytes: int, tmp_path: Path
) -> None:
    """An undamaged file of any format has no errors or warnings, and each stored tensor is read exactly once."""
    with open_checkpoint(make(tmp_path)) as checkpoint:
        report = run_checks(checkpoint)
        records = [record for record in checkpoint.records() if record.keys]
    assert (codes(report), report.ok) == (expected, True)
    assert {finding.severity for finding in report.findings} == {"note"}
    assert sum(record.payload.nbytes for record in records) == nbytes
    assert set(checkpoint) <= {key for record in records for key in record.keys}


def test_all_entries_of_an_archive_are_read_in_its_order(tmp_path: Path) -> None:
    """Entries with and without tensors are read, and the number of bytes equals that of zipfile."""
    path = write(tmp_path, rezip(saved(TIED), {"archive/extra": b"x" * 70}))
    seen: list[int] = []
    with zipfile.ZipFile(path) as archive, open_checkpoint(path) as checkpoint:
        entries = sorted(archive.infolist(), key=lambda info: info.header_offset)
        records = list(checkpoint.records())
        run_checks(checkpoint, progress=seen.append)
    assert [(record.name, record.crc) for record in records] == [(info.filename, info.CRC) for info in entries]
    assert sum(seen) == sum(info.file_size for info in entries)


def test_tensors_of_an_unknown_size_are_read_up_to_the_next(tmp_path: Path) -> None:
    """Tensors of an unknown type do not leave bytes of the file unread."""
    infos = [info("v", kind=99, offset=32), info("w", kind=99), info("far", (0,), kind=99, offset=1 << 40)]
    path = write(tmp_path, gguf_file(infos, data=bytes(70)), "f.gguf")
    with open_checkpoint(path) as checkpoint:
        sizes = {record.name: record.payload.nbytes for record in checkpoint.records()}
        report = run_checks(checkpoint)
    assert (sizes, report.ok) == ({"w": 32, "v": 38, "far": 0}, True)


def test_files_beside_the_weights_are_listed_as_unread(tmp_path: Path) -> None:
    """Files that trainers write next to the weights are listed, but their bytes are not read."""
    assert checked(_trainer(tmp_path)).findings[-1].message.endswith("other files were not read ('optimizer.pt')")


def test_the_bytes_of_big_endian_files_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    """Checksums are compared with the stored bytes, not with the byte-swapped values."""
    data = rezip(GOOD, {"archive/byteorder": b"big"})
    assert codes(checked(write(tmp_path, data))) == ["reader-warning", "subnormal", "not-scanned"]
    damaged = flipped(data, middle_of(data, "archive/data/0"))
    assert only(checked(write(tmp_path, damaged)), "checksum").key == "a"


def test_safetensors_are_read_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """Tensors are read in the order of their bytes, whatever the order of the header."""
    header = {key: {"dtype": "U8", "shape": [4], "data_offsets": [at, at + 4]} for key, at in (("z", 4), ("a", 0))}
    text = json.dumps(header).encode()
    path = write(tmp_path, struct.pack("<Q", len(text)) + text + b"01234567", "f.safetensors")
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["z", "a"]
        assert [record.keys for record in checkpoint.records()] == [("a",), ("z",)]


GOOD = saved(TIED)


@pytest.mark.parametrize("name", ["archive/data/0", "archive/data/1", "archive/.data/serialization_id"])
def test_a_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    """The finding names the record that zipfile finds damaged, and every tensor in that record, also tied tensors."""
    data = flipped(GOOD, middle_of(GOOD, name))
    assert bad_entry(data) == name
    report = checked(write(tmp_path, data))
    finding = only(report, "checksum")
    assert (finding.severity, report.ok, codes(report)) == ("error", False, ["checksum", "not-scanned"])
    assert finding.message.startswith(f"'{name}' does not match its checksum: CRC-32 ")
    held = {"archive/data/0": "; it holds 'a', 'b'", "archive/data/1": "; it holds 'n'"}.get(name, "")
    assert finding.message.endswith(f"{zlib.crc32(_content(data, name)):08x} read{held}")
    assert finding.key == {"archive/data/0": "a", "archive/data/1": "n"}.get(name, "")


def _content(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = archive.getinfo(name).file_size
    at = middle_of(data, name) - size // 2
    return data[at : at + size]


@pytest.mark.parametrize("level", [0, 9], ids=["stored blocks", "compressed"])
def test_damage_in_a_deflated_record_is_found(level: int, tmp_path: Path) -> None:
    """If the damaged stream still inflates, its checksum differs; if not, the record is unreadable."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED, level)
    good = buffer.getvalue()
    assert checked(write(tmp_path, good)).ok
    data = flipped(good, middle_of(good, "archive/data/0"))
    try:
        expected = {"archive/data/0": "checksum"}[str(bad_entry(data))]
    except zlib.error:
        expected = "unreadable"
    assert expected == "checksum" or level
    finding = only(checked(write(tmp_path, data)), expected)
    assert (finding.severity, finding.key) == ("error", "a")


def test_damage_in_a_distributed_checkpoint_is_found(tmp_path: Path) -> None:
    """The finding names the file and the tensor; an optimizer tensor is named by its path."""
    path = save(tmp_path / "run", TRAINED)
    file = tmp_path / "run" / "__0_0.distcp"
    whole = file.read_bytes()
    for key, tensor in IN_RUN.items():
        file.write_bytes(flipped(whole, whole.index(bits(tensor))))
        finding = only(checked(path), "checksum")
        assert (finding.key, f"it holds '{key}'" in finding.message) == (key, True)
        assert "' of '__0_0.distcp' does not match" in finding.message


def test_a_damaged_item_of_a_distributed_checkpoint_does_not_hide_the_next(tmp_path: Path) -> None:
    """An item with a damaged header is one finding, and the next items are still read."""
    cuts = [([0], [2]), ([2], [2]), ([4], [2])]
    path = write_cut(tmp_path / "cut", {"w": (torch.arange(6.0) + 9, cuts)}, files=1)
    file = tmp_path / "cut" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    second = data.index(b"PK\3\4", data.index(b"PK\5\6"))
    data[second : second + 2] = b"??"
    data[data.index(bits(torch.tensor([13.0, 14.0])))] ^= 1
    file.write_bytes(data)
    report = checked(path)
    assert codes(report) == ["unreadable", "checksum", "not-scanned"]
    assert f"'the item at byte {second:,}' of '__0_0.distcp' cannot be read: " in report.findings[0].message
    assert {finding.key for finding in report.findings[:2]} == {"w"}


def test_damage_in_a_shard_names_the_shard(tmp_path: Path) -> None:
    """The finding names the shard to download again, and the tensor in the damaged record."""
    path = CLEAN["sharded torch"][0](tmp_path)
    shard = path / "model-00002-of-00002.bin"
    data = shard.read_bytes()
    (root,) = {name.partition("/")[0] for name in zipfile.ZipFile(shard).namelist()}
    shard.write_bytes(flipped(data, middle_of(data, f"{root}/data/0")))
    finding = only(checked(path), "checksum")
    assert finding.key == "two"
    assert f"'{root}/data/0' of 'model-00002-of-00002.bin' does not match" in finding.message


def test_damage_of_the_optimizer_state_is_found(tmp_path: Path) -> None:
    """Records of optimizer tensors are compared too, although they are not in the state_dict."""
    data = saved(TRAINED)
    finding = only(checked(write(tmp_path, flipped(data, middle_of(data, "archive/data/2")))), "checksum")
    assert finding.key == "optimizer.m"
    assert finding.message.endswith("; it holds 'optimizer.m'")


def test_only_chosen_tensors_are_read(tmp_path: Path) -> None:
    """Records without a kept tensor are not read, which the report says; a rule that matches nothing is an error."""
    path = write(tmp_path, flipped(GOOD, middle_of(GOOD, "archive/data/0")))
    clean = checked(path, rules={"keep": ["n"]})
    assert codes(clean) == ["not-scanned"]
    assert "8 B in 1 record read, 1 compared" in clean.findings[0].message
    assert "without a chosen tensor not read" in clean.findings[0].message
    assert not checked(path, rules={"keep": ["b"]}).ok
    with pytest.raises(RuleError, match="matches none"):
        checked(path, rules={"keep": ["c"]})


def test_the_inputs_of_operations_are_read(tmp_path: Path) -> None:
    """A NaN in a tensor that a rule stacks is found, under the name that the file has for it."""
    path = tmp_path / "parts.pt"
    torch.save({"w.0": torch.ones(2), "w.1": torch.tensor([1, float("nan")]), "b": torch.rand(2)}, path)
    rules = {"keep": ["w.*"], "rule": [{"from": "w.{i:int}", "to": "w", "op": "stack"}]}
    assert [finding.key for finding in run_checks(path, rules=rules).findings if finding.code == "nan"] == ["w.1"]


def test_fast_reads_no_data(tmp_path: Path) -> None:
    """``fast`` does not see damaged data, and the report says that no data was read."""
    path = write(tmp_path, flipped(GOOD, middle_of(GOOD, "archive/data/0")))
    seen: list[int] = []
    report = checked(path, fast=True, progress=seen.append)
    assert (codes(report), seen) == (["not-scanned"], [])
    message = report.findings[0].message
    assert message.startswith("headers only: no byte of a tensor was read, no checksum compared, no values were ")


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("false",)


def _without_checksums(directory: Path) -> Path:
    require(torch.serialization, "get_crc32_options")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return _torch(TIED)(directory)
    finally:
        torch.serialization.set_crc32_options(before)


def _skipped(directory: Path) -> Path:
    require(torch.serialization, "skip_data")
    with torch.serialization.skip_data():
        return _torch(TIED)(directory)


def _unused(directory: Path) -> Path:
    return Path(write(directory, rezip(GOOD, {"archive/data/9": b"x"})))


def _misnamed(directory: Path) -> Path:
    return _torch(TIED)(directory).rename(directory / "f.safetensors")


READER_WARNINGS: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    # id: (maker, code, severity, a piece of the message)
    "B18 no checksums": (_without_checksums, "no-checksum", "note", "no checksums in the archive"),
    "B19 skipped data": (_skipped, "skipped-data", "warning", "2 records without a checksum"),
    "B30 unused": (_unused, "unused-record", "warning", "archive/data/9"),
    "E1 one name": (
        _torch({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}),
        "same-name",
        "warning",
        "both be called",
    ),
    "another suffix": (_misnamed, "reader-warning", "warning", "the file name says safetensors"),
    "code": (_torch({"w": torch.ones(2), "net": nn.ReLU()}), "code-reference", "warning", "not run: torch.nn"),
    "malicious": (_torch({"w": torch.ones(2), "x": _Evil()}), "code-suspicious", "error", "posix.system"),
    "sparse": (_torch({"w": torch.ones(2), "s": torch.eye(3).to_sparse()}), "not-dense", "note", "1 sparse tensor"),
}


@pytest.mark.parametrize(("make", "code", "severity", "text"), READER_WARNINGS.values(), ids=READER_WARNINGS.keys())
def test_warnings_of_readers_have_codes(
    make: Callable[[Path], Path], code: str, severity: str, text: str, tmp_path: Path
) -> None:
    """Each warning of a reader is one finding with a stable code, also with ``fast``; ``show`` prints the same text."""
    for fast in (False, True):
        path = make(tmp_path)
        finding = only(checked(path, fast=fast), code)
        assert (finding.severity, text in finding.message) == (severity, True)
        with open_checkpoint(path) as checkpoint:
            assert finding.message in checkpoint.warnings or code == "not-dense"


def test_skipped_records_are_counted_as_unchecked(tmp_path: Path) -> None:
    """The finding counts the records without a checksum among all records."""
    path = _skipped(tmp_path)
    with zipfile.ZipFile(path) as archive:
        records = len(archive.namelist())
    assert f"2 of {records} records (12.0 kB)" in only(checked(path), "no-checksum").message


def test_a_model_in_memory_has_no_bytes_to_read() -> None:
    """A model has no file, and the report says that no byte of a file was read."""
    report = run_checks(nn.Linear(2, 2))
    assert [(finding.code, finding.message[:14]) for finding in report.findings] == [("not-scanned", "held in memory")]


def test_a_reader_without_records_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    """Without records, each tensor is read once and reported as unchecked."""
    path = _safetensors(tmp_path)
    with open_checkpoint(path) as inner:
        bare = Checkpoint(
            inner, Access(lambda info: inner.payload(info.key)), Description(str(path), "new", files=[str(path)])
        )
        report = run_checks(bare)
    assert codes(report) == ["dtype-mix", "no-checksum", "not-scanned"]
    assert "2 of 2 records (40 B)" in report.findings[1].message


def test_a_file_that_becomes_shorter_is_a_finding(tmp_path: Path) -> None:
    """A file that becomes shorter ends the reading with a finding, and the report says that the rest was not read."""
    path = tmp_path / "f.safetensors"
    save_file({str(index): torch.ones(40_000) for index in range(20)}, path)
    report = checked(path, progress=lambda _: os.truncate(path, 5000))
    assert codes(report) == ["changed", "no-checksum", "not-scanned"]
    assert "cannot be read: the file became shorter" in report.findings[0].message
    assert report.findings[-1].message.endswith("the rest was not read")


def test_a_file_that_is_written_to_is_a_finding(tmp_path: Path) -> None:
    path = _torch(TIED)(tmp_path)
    report = checked(path, progress=lambda _: os.utime(path, (1, 1)))
    assert (codes(report), report.findings[0].severity) == (["changed", "not-scanned"], "error")


def test_a_read_that_fails_is_a_finding(tmp_path: Path) -> None:
    """The finding has the message of the operating system and the name of the record."""
    checkpoint = open_checkpoint(_safetensors(tmp_path))
    checkpoint.close()
    report = run_checks(checkpoint)
    assert "'w' cannot be read: the checkpoint was closed; it holds 'w'" in [
        finding.message for finding in report.findings
    ]
    assert not report.ok


def test_records_of_any_zip_archive(tmp_path: Path) -> None:
    """``records`` returns the entries of any zip archive in order, each with the keys that the reader gives."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", b"123")
        archive.writestr("empty", b"")
    file = LocalFile(str(path))
    records = list(read_zip_directory(file).records({"w.npy": ["w"]}))
    file.close()
    assert [(record.name, record.crc, record.keys) for record in records] == [
        ("w.npy", zlib.crc32(b"123"), ("w",)),
        ("empty", None, ()),
    ]


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    paths = {name: tmp_path / f"{name}.pt" for name in ("clean", "damaged", "broken", "odd", "unchecked")}
    paths["clean"].write_bytes(GOOD)
    paths["damaged"].write_bytes(flipped(GOOD, middle_of(GOOD, "archive/data/0")))
    paths["broken"].write_bytes(GOOD[:-10])
    paths["odd"].write_bytes(rezip(GOOD, {"archive/data/9": b"x"}))
    torch.save(TIED, paths["unchecked"], _use_new_zipfile_serialization=False)
    return paths


CODES: dict[str, tuple[list[str], int, str]] = {
    "clean": (["clean"], 0, ""),
    "clean and unchecked": (["clean", "unchecked"], 0, ""),
    "odd": (["odd"], 1, "1 warning, 1 note"),
    "damaged first": (["damaged", "clean"], 1, "1 error, 2 notes"),
    "damaged last": (["clean", "damaged"], 1, "1 error, 2 notes"),
    "broken in the middle": (["clean", "broken", "damaged"], 2, "2 errors, 2 notes"),
    "broken twice": (["broken", "broken"], 2, "2 errors"),
}


@pytest.mark.parametrize(("names", "code", "count"), CODES.values(), ids=CODES.keys())
def test_several_paths(
    names: list[str], code: int, count: str, files: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every path is checked; findings are listed below their path, and the worst one decides the exit code.

    A clean path takes one line, and a page of clean paths has no other line.
    """
    ran = run_ckpt(capsys, "check", *(files[name] for name in names))
    assert (ran.code, ran.err) == (code, "")
    told = [line for line in ran.out.splitlines() if ": no findings; " in line]
    assert len(told) == sum(name in ("clean", "unchecked") for name in names)
    assert ran.out.splitlines()[-1] == (count or told[-1])
    titles = [line for line in ran.out.splitlines() if line.startswith("/")]
    assert [title.partition(":")[0] for title in titles] == [str(files[name]) for name in names]
    as_json = run_ckpt(capsys, "check", "--json", *(files[name] for name in names))
    document = json.loads(as_json.out)
    assert (as_json.code, list(document), document["schema"]) == (
        code, ["schema", "findings", "summary"], "ckptkit.check/1",
    )  # fmt: skip
    for finding in document["findings"]:
        assert list(finding) == ["code", "severity", "key", "message", "hint"]
        assert any(finding["message"].startswith(f"{files[name]}: ") for name in names)
    broken = [finding for finding in document["findings"] if finding["code"] == "unreadable"]
    assert [finding["hint"] for finding in broken] == ["download or copy it again"] * names.count("broken")


@pytest.mark.parametrize("options", [[], ["--json"], ["--fast"]], ids=["text", "json", "fast"])
def test_a_path_that_cannot_be_opened_is_an_error(
    options: list[str], files: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in every command, stdout is empty, and stderr has one line and a hint."""
    ran = run_ckpt(capsys, "check", files["broken"], *options)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"ckpt: {files['broken']}: the zip archive has no directory at its end")


def test_names_in_findings_are_printed_harmlessly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in a name are escaped on the terminal and exact in JSON."""
    name = "\x1b[2J\u202egone"
    data = saved({name: torch.ones(9)})
    path = write(tmp_path, flipped(data, middle_of(data, "archive/data/0")))
    shown = run_ckpt(capsys, "check", path)
    assert all(char.isprintable() or char == "\n" for char in shown.out)
    assert r"it holds '\x1b[2J\u202egone'" in shown.out
    document = json.loads(run_ckpt(capsys, "check", path, "--json").out)
    assert document["findings"][0]["key"] == name


@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """Without torch, a file of 300 MB is read within 240 MB of memory, also if it is compressed."""
    path, size = tmp_path / "large", 300_000_000
    if kind == "stored":
        text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, path.stat().st_size + size)
    else:
        data = saved({"w": torch.zeros(size // 4).to_sparse().to_dense()[:1].clone()})
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, True, 1) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            with new.open("archive/extra", "w") as entry:
                for _ in range(300):
                    entry.write(bytes(1_000_000))
    ran = run_limited("check", path, "--no-values", memory=240 << 20)
    assert (ran.code, ran.err) == (0, "")
    assert "300.0 MB " in ran.out


def test_progress_is_shown_only_on_a_terminal(tmp_path: Path) -> None:
    """Progress is shown on stderr if it is a terminal and without -q; stdout has only the findings."""
    path = _torch(TIED)(tmp_path)
    for options, expected in (((), True), (("-q",), False), (("--fast",), False)):
        terminal, end = pty.openpty()
        command = [sys.executable, "-m", "ckptkit", "check", "--no-values", str(path), *options]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=end, check=True)
        os.write(end, b".")  # so that the read below never blocks
        os.close(end)
        shown = os.read(terminal, 10_000)
        os.close(terminal)
        assert (b"reading" in shown, b"reading" in done.stdout) == (expected, False)
