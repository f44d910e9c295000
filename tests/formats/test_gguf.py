"""GGUF files are listed as gguf-py reads them, and every number of a header is checked against the file."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import opened, refused, write
from tests.helpers_gguf import ARRAY, STRING, U8, U32, array, gguf_file, info, numbers, pair, string, written

PLAIN = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
    "I64": np.int64,
}  # fmt: skip
GOOD = gguf_file([info("w"), info("v", (2, 1), offset=32)], data=bytes(range(16)) + bytes(16) + b"12345678")


def assert_as_gguf(path: str) -> None:
    """Assert that names, order, types, shapes, stored sizes and bytes of plain numbers are those of gguf-py."""
    expected = gguf.GGUFReader(path).tensors
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "gguf"
        assert list(checkpoint) == [tensor.name for tensor in expected]
        for tensor in expected:
            found = checkpoint[tensor.name]
            assert found.dtype == tensor.tensor_type.name
            assert found.shape == tuple(int(size) for size in tensor.shape)[::-1]
            assert found.nbytes == tensor.n_bytes
            if GGML_QUANT_SIZES[tensor.tensor_type][0] == 1:
                assert checkpoint.read_bytes(tensor.name) == tensor.data.tobytes()
            else:
                assert found.kind == "quantized"


def raw(kind: Kind, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Return random bytes for a tensor of this type; for gguf-py the last dimension counts bytes."""
    elements, nbytes = GGML_QUANT_SIZES[kind]
    made = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // elements * nbytes), dtype=np.uint8)
    code = next((PLAIN[name] for name in PLAIN if name == kind.name), None)
    return made if code is None else made.view(code)


def test_every_type_has_the_size_that_gguf_gives_it(tmp_path: Path) -> None:
    """The table has every type of gguf-py and no other type."""

    def fill(writer: gguf.GGUFWriter) -> None:
        for kind, (elements, _) in GGML_QUANT_SIZES.items():
            writer.add_tensor(f"t.{kind.name}", raw(kind, (3, 2 * elements), int(kind)), raw_dtype=kind)

    path = write(tmp_path, written(fill), "x.gguf")
    assert_as_gguf(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.warnings == ()
        assert {found.kind for found in checkpoint.values()} == {"dense", "quantized"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([Kind[name] for name in (*PLAIN, "BF16", "Q8_0")]), st.lists(st.integers(1, 3), max_size=3)
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([8, 32, 64]),
)
def test_whatever_the_library_writes_is_read(
    tmp_path: Path, layout: dict[str, tuple[Kind, list[int]]], alignment: int
) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)
        for key, (kind, shape) in layout.items():
            writer.add_tensor(key, raw(kind, (*shape, 32)), raw_dtype=kind)

    assert_as_gguf(write(tmp_path, written(fill), "x.gguf"))


def metadata(writer: gguf.GGUFWriter) -> None:
    for name, value in (("uint8", 255), ("int8", -1), ("uint16", 65535), ("int16", -2), ("uint32", 7), ("int32", -3),
                        ("uint64", 2**63), ("int64", -(2**40)), ("float32", 0.5), ("float64", 1e300), ("bool", True),
                        ("string", "κ\x1b[2J")):  # fmt: skip
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_float32("a.nan", float("nan"))
    writer.add_string("long", "x" * 2001)
    writer.add_array("few", [1, 2, 3])
    writer.add_array("tags", ["a", "b"])
    writer.add_token_list([f"token {index}" for index in range(32_000)])
    writer.add_token_scores([0.0] * 32_000)


def test_metadata_is_listed_and_long_arrays_are_counted(tmp_path: Path) -> None:
    with opened(tmp_path, written(metadata), "x.gguf") as checkpoint:
        entries = {entry.path: (entry.type, entry.value) for entry in checkpoint.entries}
        assert all(entry.is_outside for entry in checkpoint.entries)
    assert entries == {
        "general.architecture": ("string", "llama"),
        "a.uint8": ("uint8", 255),
        "a.int8": ("int8", -1),
        "a.uint16": ("uint16", 65535),
        "a.int16": ("int16", -2),
        "a.uint32": ("uint32", 7),
        "a.int32": ("int32", -3),
        "a.uint64": ("uint64", 2**63),
        "a.int64": ("int64", -(2**40)),
        "a.float32": ("float32", 0.5),
        "a.float64": ("float64", 1e300),
        "a.bool": ("bool", True),
        "a.string": ("string", "κ\x1b[2J"),
        "a.nan": ("float32", "nan"),
        "long": ("string", "a string of 2,001 bytes"),
        "few": ("array", [1, 2, 3]),
        "tags": ("array", ["a", "b"]),
        "tokenizer.ggml.tokens": ("array", "array of 32,000 strings"),
        "tokenizer.ggml.scores": ("array", "array of 32,000 float32s"),
    }


def test_a_vocabulary_is_skipped(tmp_path: Path) -> None:
    """Strings cross the edges of the read window, and one string is longer than the window."""
    tokens = [string("x" * (index % 300)) for index in range(20_000)] + [string(b"y" * 3_000_000), string("z")]
    data = gguf_file(
        [info("w")], [pair("tokens", ARRAY, array(STRING, tokens)), pair("after", STRING, string("here"))], bytes(16)
    )
    with opened(tmp_path, data, "x.gguf") as checkpoint:
        assert [entry.value for entry in checkpoint.entries] == ["array of 20,002 strings", "here"]
        assert checkpoint.read_bytes("w") == bytes(16)


def test_quantised_tensors_are_listed_with_their_stored_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("norm.weight", np.ones(4, dtype=np.float32))
        writer.add_tensor("blk.0.weight", raw(Kind.Q4_K, (4, 512)), raw_dtype=Kind.Q4_K)

    path = write(tmp_path, written(fill), "x.gguf")
    document = json.loads(run_ckpt(capsys, "show", path, "--json").out)
    assert [(entry["dtype"], entry["shape"], entry["bytes"]) for entry in document["tensors"]] == [
        ("F32", [4], 16),
        ("Q4_K", [4, 512], 4 * 2 * 144),
    ]
    assert document["summary"] == {"tensors": 2, "elements": 4 + 2048, "bytes": 16 + 1152}
    assert "Q4_K (quantized)" in run_ckpt(capsys, "show", path).out
    refusal = run_ckpt(capsys, "convert", path, "-o", tmp_path / "y.safetensors")
    assert (refusal.code, "'blk.0.weight' cannot be copied: it is quantised (GGUF Q4_K)" in refusal.err) == (2, True)
    assert "gguf.quants.dequantize" in refusal.err
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.span("blk.0.weight") is None
        with pytest.raises(FormatError, match="is a quantized tensor, which is listed but cannot be read"):
            checkpoint.payload("blk.0.weight")


def test_plain_tensors_become_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {name: raw(Kind[name], (2, 3), index) for index, name in enumerate(PLAIN)}

    def fill(writer: gguf.GGUFWriter) -> None:
        for name, values in arrays.items():
            writer.add_tensor(name, values)

    path, out = write(tmp_path, written(fill), "x.gguf"), str(tmp_path / "y.safetensors")
    ran = run_ckpt(capsys, "convert", path, "-o", out)
    assert (ran.code, "general.architecture" in ran.out + ran.err) == (0, True), "the left-out metadata is named"
    with safe_open(out, "np") as file:
        assert {key: file.get_tensor(key).tobytes() for key in file.keys()} == {  # noqa: SIM118 - no mapping
            key: values.tobytes() for key, values in arrays.items()
        }


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        pytest.param(GOOD, "", id="nothing odd"),
        pytest.param(gguf_file(), "", id="nothing in it"),
        pytest.param(gguf_file([info("w")], data=bytes(32)), "", id="padding at the end"),
        pytest.param(
            gguf_file([info("w")], data=bytes(40)), "not part of a tensor: 8 bytes after the last tensor", id="more"
        ),
        pytest.param(gguf_file([info("w", (0, 7))]), "", id="no elements"),
        pytest.param(gguf_file([info("w", ())], data=bytes(4)), "", id="a scalar"),
        pytest.param(gguf_file([info("v", offset=64), info("w")], data=bytes(80)), "", id="a gap, and out of order"),
        pytest.param(gguf_file([info("w")], data=bytes(16), version=2), "", id="version 2"),
        pytest.param(
            gguf_file([info("w", kind=99), info("v", kind=4, offset=32)], data=bytes(64)),
            "2 tensors of an unknown type, and so of unknown size: 'w'",
            id="unknown types",
        ),
        pytest.param(
            gguf_file(pairs=[pair("split.no", 2, b"\1\0"), pair("split.count", 2, b"\3\0")]),
            "this is part 2 of 3: the tensors of the other parts are not listed",
            id="one part of several",
        ),
        pytest.param(
            gguf_file(pairs=[pair("a", ARRAY, array(ARRAY, [array(U32, [numbers(1)]), array(STRING, [string("x")])]))]),
            "",
            id="arrays in an array",
        ),
        pytest.param(gguf_file(pairs=[pair("a", STRING, string(b"\xff"))]), "", id="a value that is not UTF-8"),
    ],
)
def test_an_odd_file_is_read_with_a_warning(tmp_path: Path, data: bytes, warning: str) -> None:
    with opened(tmp_path, data, "x.gguf") as checkpoint:
        assert "; ".join(checkpoint.warnings) == warning
        for key, found in checkpoint.items():
            assert found.kind == "unknown" or len(checkpoint.read_bytes(key)) == found.nbytes


def nested(depth: int) -> bytes:
    return array(ARRAY, [nested(depth - 1)]) if depth else array(U8, [b"x"])


HOSTILE = [
    pytest.param(GOOD[:4] + b"\1" + GOOD[5:], "of version 1; versions 2 and 3", id="version 1"),
    pytest.param(GOOD[:4] + b"\4" + GOOD[5:], "of version 4; versions 2 and 3", id="version 4"),
    pytest.param(GOOD[:4] + b"\0\0\0\3" + GOOD[8:], "for big-endian machines", id="big-endian"),
    pytest.param(gguf_file(counts=(2**64 - 1, 0)), "the header counts .* tensors, more than", id="2^64 tensors"),
    pytest.param(
        gguf_file([info("w")], counts=(2, 0)),
        "counts 2 tensors, more than fit into the file|1 byte",
        id="2 of 1",
    ),
    pytest.param(gguf_file(counts=(0, 2**64 - 1)), "the header counts .* metadata keys, more than", id="2^64 keys"),
    pytest.param(gguf_file(data=bytes(2_000_000), counts=(0, 100_001)), "counts 100,001 metadata", id="many keys"),
    pytest.param(gguf_file(pairs=[pair("a", 13, b"x" * 8)]), "'a' has a value of the unknown type 13", id="a type"),
    pytest.param(gguf_file(pairs=[pair("a", 2**32 - 1, b"x")]), "'a' has a value of the unknown", id="type 2^32-1"),
    pytest.param(gguf_file(pairs=[pair("a", U32, numbers(1))] * 2), "two metadata keys are called 'a'", id="key twice"),
    pytest.param(gguf_file(pairs=[pair(b"\xff", U8, b"x")]), "key 1 is not UTF-8 at its byte 0", id="key not UTF-8"),
    pytest.param(
        gguf_file(pairs=[pair("\x1b[2J", 99, b"x")]), r"'\\x1b\[2J' has a value of the unknown", id="an escape in a key"
    ),
    pytest.param(
        gguf_file(pairs=[struct.pack("<Q", 2**63) + bytes(20)]),
        "key 1 has a length of .* bytes",
        id="a key of 2^63 bytes",
    ),
    pytest.param(
        gguf_file(pairs=[string("x" * 70_000) + numbers(U8) + b"x"]), "key 1 has a length of 70,000", id="a long key"
    ),
    pytest.param(
        gguf_file(pairs=[pair("a", STRING, struct.pack("<Q", 2**60))]),
        "header continues after the end",
        id="a long value",
    ),
    pytest.param(
        gguf_file(pairs=[pair("a", ARRAY, array(U32, [], 2**62))]), "header continues after the end", id="2^62 numbers"
    ),
    pytest.param(
        gguf_file(pairs=[pair("a", ARRAY, array(STRING, [], 2**61))]), "'a' counts .* strings, more", id="2^61 strings"
    ),
    pytest.param(
        gguf_file(pairs=[pair("a", ARRAY, array(STRING, [string("")] * 20 + [struct.pack("<Q", 2**64 - 1)] * 20))]),
        "header continues after the end",
        id="a string of 2^64 bytes in an array",
    ),
    pytest.param(
        gguf_file(pairs=[pair("a", ARRAY, array(ARRAY, [], 2**61))]), "'a' counts .* arrays, more", id="2^61 arrays"
    ),
    pytest.param(
        gguf_file(pairs=[pair("a", ARRAY, array(77, [], 0))]),
        "'a' has a value of the unknown type 77",
        id="no items of no type",
    ),
    pytest.param(gguf_file(pairs=[pair("a", ARRAY, nested(9))]), "'a' is nested too deeply", id="nine arrays"),
    pytest.param(gguf_file(pairs=[pair("a", ARRAY, nested(400))]), "'a' is nested too deeply", id="400 arrays"),
    pytest.param(
        gguf_file(pairs=[pair("general.alignment", U32, numbers(0))]),
        "alignment' is 0, not a uint32 power of two",
        id="alignment 0",
    ),
    pytest.param(
        gguf_file(pairs=[pair("general.alignment", U32, numbers(24))]),
        "is 24, not a uint32 power of two",
        id="alignment 24",
    ),
    pytest.param(
        gguf_file(pairs=[pair("general.alignment", U8, b"\x20")]),
        "is 32, not a uint32 power of two",
        id="alignment of another type",
    ),
    pytest.param(
        gguf_file([info("w")], [pair("general.alignment", U32, numbers(2**31))], bytes(64)),
        "truncated: .* bytes are missing at the end, in 'w'",
        id="alignment 2^31",
    ),
    pytest.param(
        gguf_file([info("w"), info("w", offset=32)], data=bytes(48)), "two tensors are called 'w'", id="twice"
    ),
    pytest.param(gguf_file([info("w", (1,) * 65)], data=bytes(4)), "'w': a shape of 65 dimensions", id="65 dimensions"),
    pytest.param(gguf_file([info("w", (2**63,))]), "'w': the shape .* overflows", id="2^63 elements"),
    pytest.param(gguf_file([info("w", (2**32, 2**32))]), "'w': the shape .* overflows", id="overflow"),
    pytest.param(gguf_file([info("w", (0, 2**32, 2**32))]), "'w': the shape .* overflows", id="overflow behind a zero"),
    pytest.param(
        gguf_file([info("w", (2**60,))]), "truncated: 4,6.* bytes are missing at the end, in 'w'", id="2^60 elements"
    ),
    pytest.param(
        gguf_file([info("w", offset=2**63)], data=bytes(16)), "truncated: .* are missing", id="an offset of 2^63"
    ),
    pytest.param(
        gguf_file([info("w", offset=8)], data=bytes(32)), "'w' begins at byte 8 of the data, which", id="unaligned"
    ),
    pytest.param(
        gguf_file([info("w", (9,)), info("v", offset=32)], data=bytes(48)),
        "'v' overlaps 'w': it begins at byte 32 of the data, and 'w' ends at byte 36",
        id="overlap",
    ),
    pytest.param(gguf_file([info("w"), info("v")], data=bytes(48)), "'v' overlaps 'w'", id="one place for two"),
    pytest.param(
        gguf_file([info("w", (100, 3), 12)], data=bytes(999)), "rows of 100 elements .* Q4_K blocks of 256", id="a row"
    ),
    pytest.param(gguf_file([info("w", (), 8)], data=bytes(34)), "rows of 1 elements", id="a quantised scalar"),
    pytest.param(gguf_file([info(b"\xff")], data=bytes(16)), "tensor 1 is not UTF-8", id="a name that is not UTF-8"),
    pytest.param(gguf_file([info("\x1b[2J", (2**63,))]), r"'\\x1b\[2J': the shape", id="an escape in a name"),
    pytest.param(gguf_file([info("w")], data=bytes(15)), "truncated: 1 of 80 bytes are missing", id="one byte short"),
]


@pytest.mark.parametrize(("data", "reason"), HOSTILE)
def test_a_broken_file_is_refused_with_the_name_and_the_numbers(tmp_path: Path, data: bytes, reason: str) -> None:
    error = refused(tmp_path, data, "x.gguf")
    assert isinstance(error, FormatError)
    assert re.search(reason, error.reason), error.reason
    assert len(error.reason) < 500


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    data = gguf_file(
        [info("w"), info("v", (2, 1), offset=32)],
        [pair("a", STRING, string("text")), pair("b", ARRAY, array(STRING, [string("x")] * 20))],
        bytes(40),
    )
    opened(tmp_path, data, "x.gguf").close()
    reasons = {refused(tmp_path, data[:size], "x.gguf").reason for size in range(len(data))}
    assert len(reasons) > 20


def test_a_mapping_inside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds only tensors, and not a mapping 'a'"):
        open_checkpoint(f"{write(tmp_path, GOOD, 'x.gguf')}::a")


def test_too_many_strings_are_refused(tmp_path: Path) -> None:
    """Six million empty strings, 48 MB of zeros, are refused before the first is read."""
    data = gguf_file(pairs=[pair("a", ARRAY, array(STRING, [], 6_000_000) + bytes(48_000_000))])
    assert "more than 5,000,000 strings" in refused(tmp_path, data, "x.gguf").reason


def test_a_vocabulary_alone_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tests of llama.cpp have such files: metadata without tensors."""
    path = write(tmp_path, written(lambda writer: writer.add_array("tokenizer.ggml.tokens", ["a", "b"])), "x.gguf")
    assert_as_gguf(path)
    assert run_ckpt(capsys, "check", path).code == 0
