"""safetensors files of the library are read bit by bit, and files that the library refuses are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptkit.core.dtypes import DTYPES
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.safetensors_header import SafetensorsHeader, read_header
from tests.features import safetensors_has
from tests.helpers_formats import (
    assert_same,
    bits,
    f32,
    library_accepts,
    opened,
    random_tensor,
    refused,
    safetensors_file,
    write,
)

STORABLE = [dtype for dtype in DTYPES.values() if dtype.storable]
IN_TORCH = [dtype for dtype in STORABLE if safetensors_has(dtype.code)]
GOOD = safetensors_file({"w": f32()}, b"1234")


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
            st.sampled_from([getattr(torch, one.torch_name) for one in IN_TORCH if one.code != "F4"]),
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


@pytest.mark.parametrize(
    ("data", "key", "value"),
    [
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
def test_an_odd_file_is_read(tmp_path: Path, data: bytes, key: str, value: bytes) -> None:
    path = write(tmp_path, data, "x.safetensors")
    assert library_accepts(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read_bytes(key) == value


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    data = safetensors_file({"w": f32(0, 4), "v": f32(4, 8)}, bytes(8))
    reasons = {refused(tmp_path, data[:size], "x.safetensors").reason for size in range(len(data))}
    assert len(reasons) > 5


def test_offsets_of_a_thousand_digits_are_not_repeated(tmp_path: Path) -> None:
    entry = f'{{"dtype":"F32","shape":[1],"data_offsets":[0,{"9" * 4200}]}}'
    assert len(refused(tmp_path, safetensors_file(f'{{"w":{entry}}}', b"1234"), "x.safetensors").reason) < 200


def test_a_header_without_spaces_is_read_exactly_as_with_a_line_break_in_it() -> None:
    """Text of the library's form is not parsed as JSON; whatever is damaged in it must not get through."""
    draw = random.Random(0)  # noqa: S311 - the same texts in every run
    table = {"a": f32(0, 4, [1]), 'b":{"dtype"': f32(4, 12, [2, 1]), "é": f32(12, 16, []), "0": f32(16, 16, [0, 3])}
    texts = [{"__metadata__": {"k": '},"a":{'}, **table}, {"__metadata__": {}, **table}, table]
    compact = [json.dumps(text, separators=(",", ":"), ensure_ascii=False).encode() for text in texts]
    accepted = 0
    for _ in range(4000):
        data = bytearray(draw.choice(compact))
        for _ in range(draw.randrange(3)):
            at, length = draw.randrange(1, len(data)), draw.randrange(2)
            data[at : at + length] = draw.choice([b"", b'"', b",", b"{", b"}", b"1", b"-0", b"]", b" ", b"\\", b"\0"])
        plain, broken = (_read(bytes(text)) for text in (data, data[:1] + b"\n" + data[1:]))
        assert plain == broken, bytes(data)
        accepted += plain is not None
    assert 1000 < accepted < 3500


def _read(data: bytes) -> SafetensorsHeader | None:
    try:
        return read_header(data, 16)
    except FormatError:
        return None
