"""safetensors files: what the library writes is read bit by bit, and nothing is accepted that it refuses."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ckptkit.errors import ChangedError, FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.tensors import DTYPES
from tests.helpers_formats import assert_same, bits, f32, opened, random_tensor, refused, safetensors_file, write

STORABLE = [dtype for dtype in DTYPES.values() if dtype.storable]
IN_TORCH = [dtype for dtype in STORABLE if dtype.torch_name]
GOOD = safetensors_file({"w": f32()}, b"1234")


def library_accepts(path: str) -> bool:
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except Exception:  # noqa: BLE001 - whatever it raises, it refuses
        return False
    return True


def test_the_table_of_dtypes_is_that_of_the_format() -> None:
    assert len(STORABLE) == 22
    assert {dtype.code for dtype in STORABLE if not dtype.torch_name} == {"F6_E2M3", "F6_E3M2"}


@pytest.mark.parametrize("dtype", [pytest.param(dtype, id=dtype.code) for dtype in IN_TORCH])
def test_every_dtype_is_read_bit_by_bit(tmp_path: Path, dtype: Any) -> None:
    kind = getattr(torch, dtype.torch_name)
    state = {"m": random_tensor(kind, (3, 4)), "v": random_tensor(kind, (6,), seed=1), "e": random_tensor(kind, (0, 2))}
    if dtype.code != "F4":
        state["s"] = random_tensor(kind, ())
    path = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file(state, path)
    loaded = safetensors.torch.load_file(path)
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, {key: loaded[key] for key in checkpoint})
        assert set(checkpoint) == set(state)
        assert checkpoint.format == "safetensors"
        assert checkpoint.warnings == ()
    assert all(bits(loaded[key]) == bits(state[key]) for key in state)


@pytest.mark.parametrize("code", ["F6_E2M3", "F6_E3M2"])
def test_dtypes_that_torch_lacks_are_listed_and_their_bytes_read(tmp_path: Path, code: str) -> None:
    with opened(tmp_path, safetensors_file({"w": f32(0, 3, [2, 2], code)}, b"abc"), "x.safetensors") as checkpoint:
        assert str(checkpoint["w"]) == f"{code} [2, 2]"
        assert checkpoint.read_bytes("w") == b"abc"
        with pytest.raises(TypeError, match=f"no dtype for {code}"):
            checkpoint.read("w")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "κ": "\x1b[2J", "": ""}])
def test_metadata_is_kept_exactly(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata)
    with open_checkpoint(path) as checkpoint:
        assert dict(checkpoint.metadata) == (metadata or {})


def test_a_file_without_tensors_is_a_checkpoint(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file({}, path)
    with open_checkpoint(path) as checkpoint:
        assert (len(checkpoint), list(checkpoint.entries)) == (0, [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=6,
    )
)
def test_whatever_the_library_writes_is_read(tmp_path: Path, layout: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    path = str(tmp_path / "x.safetensors")
    safetensors.torch.save_file({key: random_tensor(*entry) for key, entry in layout.items()}, path)
    loaded = safetensors.torch.load_file(path)
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, {key: loaded[key] for key in checkpoint})
        assert set(checkpoint) == set(layout)


W = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def header(text: str, data: bytes = b"1234") -> bytes:
    return safetensors_file('{"w":' + W[:-1] + text + "}}", data)


def twice(first: str, second: str) -> bytes:
    return safetensors_file(f'{{"{first}":{W},"{second}":{W}}}', b"1234")


def entry(**fields: Any) -> bytes:
    made = f32() | fields
    return safetensors_file({"w": {name: value for name, value in made.items() if value is not None}}, b"1234")


def two(first: tuple[int, int], second: tuple[int, int], size: int = 8) -> bytes:
    return safetensors_file({"w": f32(*first), "v": f32(*second)}, bytes(size))


HOSTILE = [
    # G1: the length of the header
    pytest.param(b"\0\0\0\0\0\0\0", "too short|zero bytes", id="G1 seven bytes"),
    pytest.param(b"\0" * 8 + b"{}", "unknown format|no dtype|JSON|header", id="G1 length 0"),
    pytest.param(GOOD[:4] + b"\1" + GOOD[5:], "4,294,967,357 bytes, more than the limit", id="G1 length 2^32"),
    pytest.param(
        (100_000_001).to_bytes(8, "little") + GOOD[8:], "100,000,001, more than|100,000,001 bytes", id="G1 limit"
    ),
    pytest.param((1000).to_bytes(8, "little") + GOOD[8:], "1,000 bytes and the file has", id="G1 past the end"),
    pytest.param(b"\xff" * 8 + GOOD[8:], "begins with ff ff|limit", id="G1 length 2^64-1"),
    # G2, G3, G14: not JSON
    pytest.param(safetensors_file("{w}"), "not JSON", id="G2 not JSON"),
    pytest.param(safetensors_file("{} x"), "not JSON", id="G2 junk behind"),
    pytest.param(safetensors_file("{}\0\0"), "not JSON", id="G2 NUL padding"),
    pytest.param(safetensors_file(" {}"), "does not begin with '{'", id="G2 leading space"),
    pytest.param(safetensors_file("[]"), "does not begin with|unknown format", id="G2 array"),
    pytest.param(safetensors_file("\ufeff{}"), "does not begin with|unknown format", id="G2 BOM"),
    pytest.param(header(',"x":NaN'), "NaN, which is not JSON", id="G2 NaN"),
    pytest.param(header(',"x":-Infinity'), "-Infinity, which is not JSON", id="G2 Infinity"),
    pytest.param(header(',"x":1e999'), "1e999, which is no finite number", id="G2 a number too large"),
    pytest.param(header(',"x":' + "9" * 400), "an integer of 13\\d\\d bits", id="G2 an integer too large"),
    pytest.param(header(',"x":' + "9" * 5000), "not JSON", id="G2 an integer of 5,000 digits"),
    pytest.param(safetensors_file(b'{"\xff":1}'), "not UTF-8 at byte 2", id="G3 not UTF-8"),
    pytest.param(safetensors_file('{"\\ud800":1}'), "half of a surrogate pair", id="G3 lone surrogate"),
    pytest.param(header(',"x":' + "[" * 100_000 + "]" * 100_000), "nested too deeply", id="G14 100,000 levels"),
    pytest.param(header(',"x":' + "[" * 126 + "]" * 126), "'w': .*nested too deeply", id="G14 127 levels"),
    # G4, G5, G6: twice, and metadata
    pytest.param(twice("w", "w"), "names 'w' twice", id="G4 a tensor twice"),
    pytest.param(twice("w", "\\u0077"), "names 'w' twice", id="G4 written in another way"),
    pytest.param(header(',"x":1,"x":2'), "names 'x' twice", id="G5 an unknown field twice"),
    pytest.param(header(',"dtype":"F32"'), "names 'dtype' twice", id="G5 a field twice"),
    pytest.param(safetensors_file('{"__metadata__":{},"__metadata__":{}}'), "twice", id="G5 metadata twice"),
    pytest.param(safetensors_file('{"__metadata__":{"a":1}}'), "strings to strings", id="G6 metadata int"),
    pytest.param(safetensors_file('{"__metadata__":{"a":{}}}'), "strings to strings", id="G6 metadata nested"),
    pytest.param(safetensors_file('{"__metadata__":[]}'), "strings to strings", id="G6 metadata list"),
    # G7, G8, G16: one entry
    pytest.param(entry(dtype="F33"), "'w': unknown dtype 'F33'", id="G7 unknown dtype"),
    pytest.param(entry(dtype="f32"), "'w': unknown dtype 'f32'", id="G7 lower case"),
    pytest.param(entry(dtype="C128"), "'w': unknown dtype 'C128'", id="G7 a dtype of torch only"),
    pytest.param(entry(dtype=[1]), "'w': unknown dtype", id="G7 no string"),
    pytest.param(entry(shape=[1.0]), "'w': the shape \\[1.0\\]", id="G8 float"),
    pytest.param(entry(shape=[-1]), "'w': the shape \\[-1\\]", id="G8 negative"),
    pytest.param(entry(shape=["1"]), "'w': the shape", id="G8 text"),
    pytest.param(entry(shape=[True]), "'w': the shape", id="G8 bool"),
    pytest.param(entry(shape=1), "'w': the shape 1", id="G8 no list"),
    pytest.param(entry(shape=[2**63]), "'w': the shape", id="G8 2^63"),
    pytest.param(entry(shape=[2**62, 2**62]), "'w': the shape overflows, with 130 binary", id="G8 overflow"),
    pytest.param(entry(shape=[2**62] * 9), "'w': the shape overflows", id="G8 more overflow"),
    pytest.param(
        entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "'w': the shape .* overflows", id="G8 zero first"
    ),
    pytest.param(entry(shape=[10**4000] * 1000), "'w': the shape", id="G8 huge factors"),
    pytest.param(entry(shape=[1] * 2000), "'w': a shape of 2000 dimensions", id="G8 2,000 dimensions"),
    pytest.param(
        safetensors_file('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "'w': the shape",
        id="G8 minus zero",
    ),
    pytest.param(entry(shape=None), "'w': the header entry has no shape", id="G16 no shape"),
    pytest.param(entry(dtype=None), "'w': the header entry has no dtype", id="G16 no dtype"),
    pytest.param(entry(data_offsets=None), "'w': the header entry has no data_offsets", id="G16 no offsets"),
    pytest.param(safetensors_file('{"w":[]}'), "'w': the header entry is no object", id="G16 no object"),
    pytest.param(safetensors_file('{"w":null}'), "'w': the header entry is no object", id="G16 null"),
    # G9 to G11: where the bytes lie
    pytest.param(entry(data_offsets=[0]), "'w': the offsets \\[0\\]", id="G9 one offset"),
    pytest.param(entry(data_offsets=[0, 2, 4]), "'w': the offsets", id="G9 three offsets"),
    pytest.param(entry(data_offsets=[0, 4.0]), "'w': the offsets", id="G9 float"),
    pytest.param(entry(data_offsets=[-4, 0]), "'w' .*begins at byte -4|'w': the offsets", id="G9 negative"),
    pytest.param(entry(data_offsets=[4, 0]), "'w': F32 \\[1\\] needs 4 bytes, offsets give -4", id="G9 reversed"),
    pytest.param(entry(shape=[3, 2]), "'w': F32 \\[3, 2\\] needs 24 bytes, offsets give 4", id="G9 too few"),
    pytest.param(entry(data_offsets=[10**30, 10**30 + 4]), "'w': ", id="G9 offsets of 30 digits"),
    pytest.param(two((4, 8), (8, 12), 12), "'w' leaves a gap before it: it begins at byte 4, and 0", id="G9 start gap"),
    pytest.param(two((0, 4), (8, 12), 12), "'v' leaves a gap before it: it begins at byte 8, and 4", id="G9 gap"),
    pytest.param(two((0, 4), (2, 6)), "'v' overlaps .*begins at byte 2, and 4", id="G9 overlap"),
    pytest.param(two((0, 4), (0, 4), 4), "'v' overlaps|'w' overlaps", id="G9 same range"),
    pytest.param(header("", b"12345"), "1 bytes follow the last tensor", id="G10 one byte more"),
    pytest.param(header("", b"123"), "truncated: 1 of 4 bytes are missing", id="G10 one byte less"),
    pytest.param(header("", b""), "truncated: 4 of 4 bytes are missing", id="G17 cut at the end of the header"),
    pytest.param(
        safetensors_file({"w": f32(0, 2, [3], "F4")}, b"12"), "'w': F4 \\[3\\] needs 1.5 bytes", id="G11 odd F4"
    ),
]
# Refused by choice, since readers disagree about them: everything else the library refuses as well.
STRICTER = {"G2 leading space", "G4 a tensor twice", "G4 written in another way", "G5 an unknown field twice",
            "G8 2,000 dimensions"}  # fmt: skip


@pytest.mark.parametrize(("data", "reason"), HOSTILE)
def test_a_broken_file_is_refused_with_the_tensor_and_the_numbers(
    tmp_path: Path, data: bytes, reason: str, request: pytest.FixtureRequest
) -> None:
    error = refused(tmp_path, data, "x.safetensors")
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
    assert len(error.reason) < 500
    assert library_accepts(str(tmp_path / "x.safetensors")) == (request.node.callspec.id in STRICTER)


@pytest.mark.parametrize(
    ("data", "key", "value"),
    [
        pytest.param(header(',"extra":{"a":[1]}'), "w", b"1234", id="G15 unknown field"),
        pytest.param(
            safetensors_file({"b": f32(0, 1, [1], "U8"), "w": f32(1, 5)}, b"x1234"), "w", b"1234", id="G12 unaligned"
        ),
        pytest.param(safetensors_file({"w": f32(4, 8), "v": f32(0, 4)}, b"56781234"), "w", b"1234", id="any order"),
        pytest.param(
            safetensors_file('{"__metadata__":null,"w":{"dtype":"U8","shape":[],"data_offsets":[0,1]}} \n', b"1"),
            "w",
            b"1",
            id="metadata null, padding",
        ),
        pytest.param(safetensors_file({"": f32()}, b"1234"), "", b"1234", id="no name"),
        pytest.param(safetensors_file({"n" * 1_000_000: f32()}, b"1234"), "n" * 1_000_000, b"1234", id="a long name"),
        pytest.param(
            safetensors_file({"\x1b[2J\0\u202e../x": f32()}, b"1234"), "\x1b[2J\0\u202e../x", b"1234", id="hostile name"
        ),
        pytest.param(
            safetensors_file('{"\\ud83d\\ude00":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
            "\U0001f600",
            b"1234",
            id="a whole surrogate pair",
        ),
        pytest.param(safetensors_file({"w-0": f32()}, b"1234"), "w-0", b"1234", id="minus zero in a name"),
    ],
)
def test_what_is_odd_and_allowed_is_read(tmp_path: Path, data: bytes, key: str, value: bytes) -> None:
    path = write(tmp_path, data, "x.safetensors")
    assert library_accepts(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read_bytes(key) == value


def test_unknown_fields_are_warned_of(tmp_path: Path) -> None:
    with opened(tmp_path, header(',"extra":1'), "x.safetensors") as checkpoint:
        assert checkpoint.warnings == ("1 entry with fields that are not known",)


def test_many_empty_tensors_are_listed(tmp_path: Path) -> None:
    """G13: the library takes seconds for these, and no byte of data is behind them."""
    names = {f"t{index}": f32(0, 0, [0]) for index in range(20_000)}
    with opened(tmp_path, safetensors_file(names), "x.safetensors") as checkpoint:
        assert list(checkpoint) == list(names)


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    data = two((0, 4), (4, 8))
    reasons = {refused(tmp_path, data[:size], "x.safetensors").reason for size in range(len(data))}
    assert len(reasons) > 5


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """G18: a memory map would die of SIGBUS here."""
    path = write(tmp_path, safetensors_file({"w": f32(0, 1 << 20, [1 << 18])}, bytes(1 << 20)), "x.safetensors")
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_unchanged()
        os.truncate(path, 5000)
        with pytest.raises(ChangedError, match="became shorter"):
            checkpoint.read_bytes("w")
        with pytest.raises(ChangedError, match="changed while it was read"):
            checkpoint.check_unchanged()
