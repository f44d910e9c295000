"""Tar archives of torch 0.1 give the values that torch reads; an archive that contradicts itself is refused."""

from __future__ import annotations

import gzip
import pickle
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ckptkit.cli import main
from ckptkit.core.dtypes import DTYPES
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.helpers_formats import assert_same, bits, call, opened, pickled, random_tensor, refused, text, write
from tests.helpers_tar import KINDS, parts, tar, tar_of


def by_torch(path: str) -> Any:
    return torch.load(path, weights_only=False)  # torch reads this format only so; the test made the file


@pytest.mark.parametrize("code", KINDS)
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, code: str) -> None:
    dtype = getattr(torch, DTYPES[code].torch_name)
    state = {"m": random_tensor(dtype, (3, 4)), "v": random_tensor(dtype, (6,), seed=1)}
    path = write(tmp_path, tar(parts(state, list(state.values()))))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, state)
        assert_same(checkpoint, by_torch(path))
        assert (checkpoint.format, checkpoint.warnings) == ("torch-tar", ())


def test_views_and_ties_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = torch.arange(24.0).view(4, 6)
    state = OrderedDict(whole=base, turned=base.t(), row=base[2], corner=base[1:, ::2], other=torch.arange(3))
    state["tied"] = state["row"]
    path = write(tmp_path, tar(parts({"epoch": 3, "state_dict": state}, list(state.values())[:-1])))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.envelope == "state_dict"
        assert_same(checkpoint, by_torch(path)["state_dict"])
        assert checkpoint["tied"].view == checkpoint["row"].view
        assert [(entry.path, entry.value) for entry in checkpoint.entries] == [("epoch", 3)]
    assert main(["convert", path, "-o", str(tmp_path / "made.safetensors")]) == 0
    capsys.readouterr()
    made = load_file(tmp_path / "made.safetensors")
    assert {key: bits(value) for key, value in made.items()} == {key: bits(value) for key, value in state.items()}


def test_a_storage_can_be_a_part_of_another(tmp_path: Path) -> None:
    """A storage can be a view of another storage, and of a view, as in torch."""
    base = torch.arange(10.0)
    state = {"all": base, "part": base[:3], "inner": base[:2]}
    views = [(50, 1000, 2, 6), (51, 50, 1, 4)]
    data = tar(parts(state, list(state.values()), views=views, of={1: 50, 2: 51}))
    path = write(tmp_path, data)
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, by_torch(path))
        assert checkpoint.read("inner").tolist() == [3, 4]


def test_a_pickled_module_is_its_state_dict(tmp_path: Path) -> None:
    """A pickled module gives its state_dict, and a warning names its source code."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    data = {id(parameter): parameter.detach() for parameter in model.parameters()}
    tensors = [*data.values(), *model.buffers()]
    path = write(tmp_path, tar(parts(model, tensors, data)))
    with pytest.warns(match="source code of class|SourceChangeWarning|couldn't"):
        loaded = by_torch(path)
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, loaded.state_dict())
        assert any("embeds source code of net.py" in line for line in checkpoint.warnings)


STATE = {"w": torch.arange(4.0), "v": torch.arange(6.0).view(2, 3)}
PARTS = parts(STATE, list(STATE.values()))


def changed(name: str, old: bytes, new: bytes) -> bytes:
    assert old in PARTS[name]
    return tar(PARTS | {name: PARTS[name].replace(old, new)})


def with_tensor(rank: int, *numbers: int) -> bytes:
    """Return the archive with another description of its last tensor, a matrix."""
    head = PARTS["tensors"][: -(8 + 5 * 8)]
    return tar(PARTS | {"tensors": head + struct.pack("<i4x", rank) + struct.pack(f"<{len(numbers)}q", *numbers)})


def with_views(*views: Any) -> bytes:
    tail = pickle.dumps([], 2)
    return tar(PARTS | {"storages": PARTS["storages"].removesuffix(tail) + pickle.dumps(list(views), 2)})


def linked(kind: bytes) -> bytes:
    return tar_of([("sys_info", PARTS["sys_info"])]) [:1024] + tar_of(
        [(name, b"" if name == "pickle" else content) for name, content in PARTS.items() if name != "sys_info"],
        type=kind, linkname="/etc/passwd",
    )  # fmt: skip


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """Return the archive with other bytes in its first header, and the matching checksum."""
    header = bytearray(data[:512])
    header[at : at + len(new)] = new
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


GOOD = tar(PARTS)
SHORT = {name: content[:-3] for name, content in PARTS.items()}
HOSTILE = {
    "another member": (tar({**PARTS, "readme": b"x"}), "with an unexpected member 'readme'"),
    "an absolute member": (patched(GOOD, 345, b"/etc"), "with an unexpected member 'sys_info'"),
    "directory": (linked(tarfile.DIRTYPE), "with an unexpected member 'pickle/'"),
    "device": (linked(tarfile.CHRTYPE), "of the tar archive is not a plain file"),
    "checksum": (GOOD[:100] + b"7" + GOOD[101:], "a damaged header"),
    "size beyond the file": (patched(GOOD, 124, b"77777777777\0"), "bytes after the file"),
    "size of base 256": (patched(GOOD, 124, b"\x80" + bytes(11)), "has no size"),
    "size of letters": (patched(GOOD, 124, b"-0000000001\0"), "has no size"),
    "cut": (GOOD[:2000], "truncated?"),
    "no end": (GOOD.rstrip(b"\0") + bytes(-len(GOOD.rstrip(b"\0")) % 512), "without an end: truncated?"),
    "junk behind": (GOOD + b"junk", "follow the end of the tar archive"),
    "sys_info": (tar({**PARTS, "sys_info": b"K\1."}), "not written on a little-endian machine"),
    "big-endian": (changed("sys_info", b"\x88", b"\x89"), "not written on a little-endian machine"),
    "no pickle": (tar({**PARTS, "pickle": b"x"}), "pickle"),
    "two pickles": (tar({**PARTS, "pickle": PARTS["pickle"] + b"N."}), "2 bytes follow the pickle"),
    "short tensors": (tar({**PARTS, "tensors": SHORT["tensors"]}), "ends too early"),
    "short storages": (tar({**PARTS, "storages": SHORT["storages"]}), "truncated?"),
    "more tensors than named": (tar({**PARTS, "tensors": PARTS["tensors"] + b"x"}), "1 bytes follow the tensors"),
    "more storages than named": (tar({**PARTS, "storages": PARTS["storages"] + b"x"}), "1 bytes follow the storages"),
    "many storages": (changed("storages", b"\x80\x02K\x02.", pickle.dumps(2**40, 2)), "the number of its storages"),
    "a storage too many": (changed("storages", b"\x80\x02K\x02.", pickle.dumps(3, 2)), "storage of unknown type"),
    "storage of 2^60": (changed("storages", struct.pack("<q", 4), struct.pack("<q", 2**60)), "more than the tar"),
    "storage of -4": (changed("storages", struct.pack("<q", 4), struct.pack("<q", -4)), "-4 elements"),
    "storage of code": (changed("storages", b"ctorch\nFloatStorage", b"cos\nsystem"), "storage of unknown type"),
    "tensor of code": (changed("tensors", b"ctorch\nFloatTensor", b"cos\nsystem"), "tensor of unknown type"),
    "tensor of another type": (changed("tensors", b"FloatTensor", b"HalfTensor"), "no storage of its type"),
    "rank": (with_tensor(-1, 2, 3, 3, 1, 0), "has -1 dimensions"),
    "rank of many": (with_tensor(2**31 - 1, 2, 3, 3, 1, 0), "dimensions"),
    "beyond the storage": (with_tensor(2, 2, 4, 4, 1, 0), "'v': the view ends at byte 32"),
    "negative stride": (with_tensor(2, 2, 3, 3, -1, 0), "below 0"),
    "negative offset": (with_tensor(2, 2, 3, 3, 1, -1), "below 0"),
    "2^40": (with_tensor(2, 2**40, 2**40, 1, 1, 0), "overflows"),
    "view of nothing": (with_views((5, 77, 0, 1)), "which is not in the file"),
    "view too far": (with_views((5, 1000, 2, 3)), "exceeds the storage"),
    "view before": (with_views((5, 1000, -1, 1)), "a view of a storage is not valid"),
    "view of an enormous root": (with_views((5, 10**6000, 0, 1)), "a view of a storage is not valid"),
    "view of an enormous number": (with_views((5, 1000, 0, 10**6000)), "a view of a storage is not valid"),
    "view twice": (with_views((1001, 1000, 0, 1)), "have the key '1001'"),
    "view of three": (with_views((5, 1000, 0)), "a view of a storage is not valid"),
    "unknown tensor": (changed("pickle", b"7000000", b"7000009"), "does not name a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_that_contradicts_itself_is_refused(tmp_path: Path, name: str) -> None:
    data, reason = HOSTILE[name]
    (tmp_path / "in").mkdir()
    error = refused(tmp_path / "in", data)
    assert isinstance(error, FormatError)
    assert reason in error.reason
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "file.pt"]


def test_code_that_the_pickle_names_is_listed_and_not_run(tmp_path: Path) -> None:
    body = pickled(b"}(" + text("w") + text("7000000") + b"Q" + text("x") + call("os.system", text("true")) + b"u")
    with opened(tmp_path, tar(PARTS | {"pickle": body})) as checkpoint:
        assert checkpoint.references == ("os.system",)
        assert checkpoint.read_bytes("w") == bits(STATE["w"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(tar_of([("model/pickle", b"x")]), "a tar archive (torch before 0.4", id="any other tar"),
        pytest.param(gzip.compress(GOOD), "a gzip-compressed file", id="compressed"),
        pytest.param(bytes(4096), "only zero bytes", id="zeros, which torch takes for an empty archive"),
    ],
)
def test_another_tar_archive_is_named_by_its_kind(tmp_path: Path, data: bytes, reason: str) -> None:
    assert reason in refused(tmp_path, data).reason
