"""Arrays of numbers are read as numpy.load reads them; other arrays are listed; nothing is evaluated."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ckptkit.checks import run_checks
from ckptkit.core.files.payloads import Extent
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import opened, refusal, refused, write, zip_of

CODES = {
    "b1": "BOOL", "i1": "I8", "u1": "U8", "i2": "I16", "u2": "U16", "i4": "I32", "u4": "U32", "i8": "I64", "u8": "U64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128",
}  # fmt: skip
Array = np.ndarray[Any, Any]


def filled(dtype: str, shape: tuple[int, ...], order: str = "C", seed: int = 0) -> Array:
    """Return random bits, with NaN among the numbers, in the given order of dimensions."""
    kind = np.dtype(dtype)
    top = 2 if kind.kind == "b" else 256
    count = int(np.prod(shape, dtype=int)) * kind.itemsize
    raw = np.random.default_rng(seed).integers(0, top, count, dtype=np.uint8)
    return raw.view(kind).reshape(shape, order="F" if order == "F" else "C")


def npy(array: Array, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def npz(arrays: Mapping[str, Array], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def by_hand(
    header: str | bytes = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n",
    data: bytes = b"12345678",
    version: bytes = b"\1\0",
    length: int | None = None,
) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(raw) if length is None else length)
    return b"\x93NUMPY" + version + size + raw + data


def fields(descr: str = "'<f4'", fortran: str = "False", shape: str = "(2,)") -> bytes:
    return by_hand(f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}")


def little(array: Array) -> bytes:
    """Return the elements in row-major order as little-endian bytes."""
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes()


def assert_as_numpy(path: str) -> None:
    """Assert that names, order, dtypes, shapes and bytes of arrays of numbers are those of numpy.load."""
    loaded = np.load(path, allow_pickle=False)
    arrays = {key: loaded[key] for key in loaded.files} if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == list(arrays)
        for key, array in arrays.items():
            info = checkpoint[key]
            assert (info.dtype, info.shape, info.kind) == (CODES[array.dtype.str[1:]], array.shape, "dense")
            assert checkpoint.read_bytes(key) == little(array)
            assert info.nbytes == checkpoint.payload(key).nbytes == array.nbytes


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("mark", ["<", ">"], ids=["little", "big"])
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, mark: str, order: str, compressed: bool) -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (2, 3, 5), (6,), (), (0, 2), (1, 1)]
    arrays = {
        f"{code}.{index}": filled(mark + code, shape, order, index)
        for code in CODES
        for index, shape in enumerate(shapes)
    }
    path = write(tmp_path, npz(arrays, compressed=compressed), "x.npz")
    assert_as_numpy(path)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, checkpoint.warnings, checkpoint.entries) == ("npz", (), ())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.sampled_from("ab.κ_ "), min_size=1, max_size=6),
        st.tuples(
            st.sampled_from([mark + code for mark in "<>" for code in CODES]),
            st.lists(st.integers(0, 5), max_size=4).map(tuple),
            st.sampled_from("CF"),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_whatever_numpy_writes_is_read(
    tmp_path: Path, layout: dict[str, tuple[str, tuple[int, ...], str]], compressed: bool
) -> None:
    arrays = {key: filled(*entry) for key, entry in layout.items()}
    assert_as_numpy(write(tmp_path, npz(arrays, compressed=compressed), "x.npz"))
    first = next(iter(arrays.values()))
    for version in ((1, 0), (2, 0), (3, 0)):
        assert_as_numpy(write(tmp_path, npy(first, version), "x.npy"))


def test_fortran_order_is_a_view(tmp_path: Path) -> None:
    """The view has the strides of torch, and a torch file keeps the stored order of the bytes."""
    array = filled("<f4", (3, 4), "F")
    with opened(tmp_path, npz({"w": array}), "x.npz") as checkpoint:
        info = checkpoint["w"]
        assert info.view is not None
        assert (info.view.stride, info.view.offset) == (torch.from_numpy(array).stride(), 0)
        span = checkpoint.span("w")
        assert span is not None
        assert b"".join(map(bytes, span.chunks())) == array.T.tobytes()


def test_a_large_fortran_array_comes_in_pieces(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(3 * 1_000_003, dtype=">f8").reshape(1_000_003, 3))
    with opened(tmp_path, npy(array), "x.npy") as checkpoint:
        pieces = [bytes(piece) for piece in checkpoint.payload("").chunks()]
    assert len(pieces) > 1
    assert b"".join(pieces) == little(array)


def test_a_stored_array_is_a_range_that_the_kernel_can_copy(tmp_path: Path) -> None:
    with opened(tmp_path, npz({"w": filled("<f4", (3, 4))}), "x.npz") as checkpoint:
        assert isinstance(checkpoint.payload("w"), Extent)


def test_one_array_is_a_checkpoint_of_one_tensor(tmp_path: Path) -> None:
    path = write(tmp_path, npy(filled("<i8", (2, 3))), "x.npy")
    with open_checkpoint(path) as checkpoint:
        assert {key: str(info) for key, info in checkpoint.items()} == {"": "I64 [2, 3]"}
        assert (checkpoint.format, checkpoint.warnings) == ("npy", ())
    error = refusal(f"{path}::a")
    assert "holds only tensors, and not a mapping 'a'" in error.reason


def test_it_becomes_safetensors_and_torch_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"a.weight": filled("<f4", (3, 4), "F"), "b": filled(">i2", (5,)), "c": filled("|b1", (2, 2))}
    path = write(tmp_path, npz(arrays, compressed=True), "x.npz")
    ran = run_ckpt(capsys, "convert", path, "-o", tmp_path / "y.safetensors")
    assert ran.code == 0, ran.err
    with safe_open(tmp_path / "y.safetensors", "np") as file:
        assert {key: little(file.get_tensor(key)) for key in file.keys()} == {  # noqa: SIM118 - no mapping
            key: little(array) for key, array in arrays.items()
        }
    assert run_ckpt(capsys, "convert", path, "-o", tmp_path / "y.pt").code == 0
    loaded = torch.load(tmp_path / "y.pt", weights_only=True)
    assert {key: little(tensor.numpy()) for key, tensor in loaded.items()} == {k: little(v) for k, v in arrays.items()}
    assert loaded["a.weight"].stride() == (1, 3)
    document = json.loads(run_ckpt(capsys, "show", path, "--json").out)
    assert [(entry["key"], entry["dtype"], entry["shape"]) for entry in document["tensors"]] == [
        ("a.weight", "F32", [3, 4]),
        ("b", "I16", [5]),
        ("c", "BOOL", [2, 2]),
    ]


OTHERS: dict[str, tuple[Array, str]] = {
    "object": (np.array([{}, os.system], dtype=object), "object array"),
    "text": (np.array(["a", "bcd"]), "text array"),
    "bytes": (np.array([b"a", b"bcd"]), "text array"),
    "date": (np.array(["2020-01-01"], dtype="datetime64[s]"), "datetime array"),
    "duration": (np.array([1], dtype="timedelta64[ns]"), "datetime array"),
    "void": (np.zeros(2, dtype="V2"), "void array"),
    "record": (np.zeros(2, dtype=[("a", "<f4"), ("b", "<i4", (2,))]), "structured array"),
    "long double": (np.zeros(2, dtype=np.longdouble), "long double array"),
}


@pytest.mark.parametrize(("array", "kind"), OTHERS.values(), ids=OTHERS.keys())
def test_arrays_of_other_elements_are_listed_and_not_read(tmp_path: Path, array: Array, kind: str) -> None:
    """In an archive such an array is an entry; a .npy file of such an array is refused."""
    with opened(tmp_path, npz({"w": filled("<f4", (2,)), "odd": array}), "x.npz") as checkpoint:
        assert list(checkpoint) == ["w"]
        assert [(entry.path, entry.type) for entry in checkpoint.entries] == [("odd", kind)]
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    error = refused(tmp_path, buffer.getvalue(), "x.npy")
    assert error.reason.startswith("an array of ")


def test_a_flipped_byte_is_found(tmp_path: Path) -> None:
    array = filled("<f4", (3, 4))
    data = bytearray(npz({"w": array, "v": filled("<f4", (3, 4), seed=1)}))
    data[data.index(array.tobytes())] ^= 1
    with opened(tmp_path, bytes(data), "x.npz") as checkpoint:
        findings = run_checks(checkpoint).findings
    assert [finding.code for finding in findings] == ["checksum", "not-scanned"]
    assert "'w'" in findings[0].message


@pytest.mark.parametrize(
    ("data", "name", "warning"),
    [
        pytest.param(fields()[:-1] + b"x", "x.npy", "", id="nothing odd"),
        pytest.param(by_hand("{'shape': (2,), 'descr': '<f4','fortran_order':False}"), "x.npy", "", id="another order"),
        pytest.param(by_hand('{"descr": "<f4", "fortran_order": False, "shape": (2,)}'), "x.npy", "", id="quotes"),
        pytest.param(fields(shape="(2L,)"), "x.npy", "", id="Python 2"),
        pytest.param(fields(shape="()"), "x.npy", "not read: 4 bytes after the array", id="more than a scalar"),
        pytest.param(
            fields() + npy(filled("<f4", (9,))),
            "x.npy",
            "not read: 164 bytes after the array (more arrays)",
            id="two arrays in one file",
        ),
        pytest.param(
            zip_of([("w.npy", fields() + b"x")]),
            "x.npz",
            "'w.npy': not read: 1 byte after the array",
            id="a longer entry",
        ),
        pytest.param(fields(), "x.npz", "the file name says npz, but the content is npy", id="another name"),
        pytest.param(
            npz({"w": filled("<f4", (2,))}),
            "x.pt",
            "the file name says torch, but the content is npz",
            id=".pt",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Reading .* created on Python 2:UserWarning")
def test_an_odd_file_is_read_with_a_warning(tmp_path: Path, data: bytes, name: str, warning: str) -> None:
    with opened(tmp_path, data, name) as checkpoint:
        assert "; ".join(checkpoint.warnings) == warning
    assert_as_numpy(str(tmp_path / name))


HOSTILE = [
    pytest.param(b"\x93NUMPY", "not a .npy file", id="the magic alone"),
    pytest.param(b"\x93NUMPY\1\0", "ends within its header|header of|no .npy", id="no length"),
    pytest.param(by_hand(version=b"\4\0"), "has version 4.0 of the .npy format", id="version 4"),
    pytest.param(by_hand(version=b"\1\1"), "has version 1.1 of the .npy format", id="version 1.1"),
    pytest.param(by_hand(length=60_000), "a header of 60,000 bytes, more than the limit", id="a header of 60,000"),
    pytest.param(by_hand(version=b"\2\0", length=2**32 - 1), "a header of 4,294,967,295 bytes", id="a header of 2^32"),
    pytest.param(by_hand(length=9000), "ends within its header: truncated", id="a header past the end"),
    pytest.param(by_hand(b"{\xff}", version=b"\3\0"), "not UTF-8 at byte 1", id="not UTF-8"),
    pytest.param(by_hand(""), "a header that numpy does not write: ''", id="no header"),
    pytest.param(by_hand("{}"), "a header that numpy does not write", id="no fields"),
    pytest.param(by_hand("[]"), "a header that numpy does not write", id="a list"),
    pytest.param(by_hand("{'descr': '<f4', 'fortran_order': False}"), "numpy does not write", id="no shape"),
    pytest.param(by_hand("{'shape': (2,), 'shape': (2,), 'descr': '<f4'}"), "numpy does not write", id="twice"),
    pytest.param(
        by_hand("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': 1}"),
        "does not write",
        id="one more field",
    ),
    pytest.param(by_hand("{'descr': '<f4' 'fortran_order': False, 'shape': (2,)}"), "does not write", id="no comma"),
    pytest.param(
        by_hand("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}\v"), "does not write", id="a vertical tab"
    ),
    pytest.param(
        by_hand("{'descr': '<f4',\xa0'fortran_order': False, 'shape': (2,)}"), "does not write", id="a wide blank"
    ),
    pytest.param(by_hand("__import__('os').system('x')"), "does not write", id="a call"),
    pytest.param(fields(shape="__import__('os')"), "does not write", id="a call for a shape"),
    pytest.param(fields(shape="(1+1,)"), "does not write", id="a sum"),
    pytest.param(by_hand("{" + "(" * 5000 + "}"), "does not write", id="5,000 brackets"),
    pytest.param(
        by_hand("{'descr': " + "[" * 9000 + "}"), "an array of records of several fields", id="9,000 brackets"
    ),
    pytest.param(by_hand("{" + " " * 9000 + "'}"), "does not write", id="blanks"),
    pytest.param(by_hand("{'\x1b[2J': 1}"), r"does not write: '\{\\'\\x1b|\\x1b\[2J", id="an escape"),
    pytest.param(fields(descr="'f4'"), "the unknown dtype 'f4'", id="no byte order"),
    pytest.param(fields(descr="'<f3'"), "the unknown dtype '<f3'", id="f3"),
    pytest.param(fields(descr="'|f4'"), "the unknown dtype '|f4'", id="no order of four bytes"),
    pytest.param(fields(descr="'=f4'"), "the unknown dtype '=f4'", id="the order of whoever reads"),
    pytest.param(fields(descr="''"), "the unknown dtype ''", id="empty dtype"),
    pytest.param(fields(descr="'\\x3cf4'"), "does not write", id="an escape for a dtype"),
    pytest.param(fields(descr="True"), "does not write", id="true for a dtype"),
    pytest.param(fields(descr="('<f4', (2,))"), "an array of records of several fields", id="arrays in an array"),
    pytest.param(fields(descr="'|O'"), "an array of pickles, which are not read", id="objects"),
    pytest.param(fields(fortran="1"), "does not write", id="a number for an order"),
    pytest.param(fields(fortran="'True'"), "does not write", id="text for an order"),
    pytest.param(fields(shape="(2)"), "does not write", id="no tuple"),
    pytest.param(fields(shape="[2]"), "does not write", id="a list for a shape"),
    pytest.param(fields(shape="(-2,)"), "does not write", id="negative"),
    pytest.param(fields(shape="(2.0,)"), "does not write", id="float"),
    pytest.param(fields(shape="(True,)"), "does not write", id="true for a size"),
    pytest.param(fields(shape="(1_0,)"), "does not write", id="underscores"),
    pytest.param(fields(shape="(02,)"), "does not write", id="a leading zero"),
    pytest.param(fields(shape="(" + "9" * 4000 + ",)"), "does not write", id="4,000 digits"),
    pytest.param(fields(shape="(9223372036854775808,)"), "the shape .* overflows", id="2^63"),
    pytest.param(fields(shape="(4294967296, 4294967296)"), "the shape .* overflows", id="overflow"),
    pytest.param(fields(shape="(0, 4294967296, 4294967296)"), "the shape .* overflows", id="overflow behind a zero"),
    pytest.param(fields(shape="(" + "1," * 65 + ")"), "the shape .* overflows|dimensions", id="65 dimensions"),
    pytest.param(
        fields(shape="(1000000000000,)"), "truncated: 3,999,999,999,992 of .* bytes are missing", id="10^12 elements"
    ),
    pytest.param(fields()[:-1], "truncated: 1 of", id="one byte short"),
]


@pytest.mark.parametrize(("data", "reason"), HOSTILE)
def test_a_broken_array_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    """As a file, and as an entry of an archive, where the error names the entry."""
    error = refused(tmp_path, data, "x.npy")
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
    assert len(error.reason) < 500
    if not error.reason.startswith("an array of "):
        reason = refused(tmp_path, zip_of([("w.npy", data)]), "x.npz").reason
        assert "'w" in reason


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    for data, name in ((npy(filled("<f4", (2,))), "x.npy"), (npz({"w": filled("<f4", (2,))}), "x.npz")):
        for size in range(8, len(data)):
            assert isinstance(refused(tmp_path, data[:size], name), FormatError)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        pytest.param([("w.npy", fields()), ("w.npy", fields())], "two zip entries are called 'w.npy'", id="twice"),
        pytest.param([("../w.npy", fields())], "the unsafe name '../w.npy'", id="climbs"),
        pytest.param([("w.npy", b"")], "'w.npy' is not a .npy file: it begins with nothing", id="an empty entry"),
        pytest.param([("\x1b[2J.npy", b"x")], r"'\x1b[2J.npy' is not a .npy file", id="an escape in a name"),
        pytest.param([("w.npy", fields()), ("v.txt", b"x")], "a zip archive of other files", id="another file"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_broken_archive_is_refused(tmp_path: Path, entries: list[tuple[str, bytes]], reason: str) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert reason in refused(tmp_path, zip_of(entries, method), "x.npz").reason


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    data = bytearray(npz({"w": filled("<f4", (300,))}, compressed=True))
    data[45:60] = b"\xff" * 15
    assert "damaged" in refused(tmp_path, bytes(data), "x.npz").reason


def test_opening_inflates_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty compressed arrays of 8 MB are listed without inflating one."""
    path = tmp_path / "x.npz"
    path.write_bytes(npz({f"w{index}": np.zeros(1 << 20) for index in range(20)}, compressed=True))
    monkeypatch.setattr("ckptkit.core.files.payloads.Inflated.chunks", lambda _: pytest.fail("a tensor was inflated"))
    with open_checkpoint(str(path)) as checkpoint:
        assert len(checkpoint) == 20
