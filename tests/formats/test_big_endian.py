"""Files of big-endian machines are read as torch reads them; tensors that torch misreads are refused by name."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit.core.dtypes import DTYPES
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.features import saves
from tests.helpers_formats import (
    CODE_OF,
    assert_same,
    bits,
    legacy_file,
    mapping,
    opened,
    random_tensor,
    rezip,
    saved,
    storage,
    tensor,
    torch_zip,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
# Written through an untyped storage, for which torch does not know the width of the numbers.
UNTYPED = {code for code in DTYPES if code.startswith(("U16", "U32", "U64", "C32", "BITS16"))}
IN_TORCH = [dtype for code, dtype in DTYPES.items() if saves(code) and not code.startswith("Q")]


def reversed_in(data: bytes, width: int) -> bytes:
    return b"".join(data[at : at + width][::-1] for at in range(0, len(data), width))


def big(data: bytes, width: int, method: int = zipfile.ZIP_STORED) -> bytes:
    """Return the archive as a big-endian machine writes it, with numbers of ``width`` bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stored = {name: archive.read(name) for name in archive.namelist() if name.startswith("archive/data/")}
    changes: dict[str, bytes | None] = {name: reversed_in(content, width) for name, content in stored.items()}
    return rezip(data, changes | {"archive/byteorder": b"big"}, method)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("dtype", [pytest.param(d, id=d.code) for d in IN_TORCH if d.code not in UNTYPED])
def test_every_element_is_swapped_as_torch_swaps_it(tmp_path: Path, dtype: Any, method: int) -> None:
    kind = getattr(torch, dtype.torch_name)
    state = {"m": random_tensor(kind, (3, 4)), "e": random_tensor(kind, (0, 2)), "v": random_tensor(kind, (6,), 1)}
    path = write(tmp_path, big(saved(state), dtype.part_bytes, method))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, state)
        assert_same(checkpoint, torch.load(path, weights_only=True))
        assert any("big-endian machine: the bytes of each number are swapped" in line for line in checkpoint.warnings)


def views(kind: torch.dtype) -> dict[str, torch.Tensor]:
    base = random_tensor(kind, (4, 6))
    return {
        "whole": base,
        "transposed": base.T,
        "row": base[2],
        "column": base[:, 3],
        "expanded": base[:1].expand(5, 6),
        **({"conj": base.conj()} if kind.is_complex else {}),
    }


@pytest.mark.parametrize("kind", [torch.int16, torch.float32, torch.complex64, torch.complex128])
def test_views_of_one_storage_are_swapped_once(tmp_path: Path, kind: torch.dtype) -> None:
    state = views(kind)
    width = DTYPES[CODE_OF[kind]].part_bytes
    path = write(tmp_path, big(saved(state), width))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, state)
        assert_same(checkpoint, torch.load(path, weights_only=True))
        for key, info in checkpoint.items():
            span = checkpoint.span(key)
            assert (span is None) == (key == "conj")
            if span is not None and key == "row":
                assert b"".join(bytes(chunk) for chunk in span.chunks()) == checkpoint.read_bytes(key)
                assert span.nbytes == info.nbytes


def test_the_parts_of_complex_numbers_are_swapped_separately(tmp_path: Path) -> None:
    values = random_tensor(torch.complex64, (4,))
    state = {"real": values.real, "imag": values.conj().imag}
    path = write(tmp_path, big(saved(state), 4))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, state)
        assert_same(checkpoint, torch.load(path, weights_only=True))


def test_a_large_deflated_storage_is_swapped_across_its_pieces(tmp_path: Path) -> None:
    state = {"w": torch.arange(700_000, dtype=torch.int64) * 0x0102030405}
    state["tail"] = state["w"][600_001:]
    with opened(tmp_path, big(saved(state), 8, zipfile.ZIP_DEFLATED)) as checkpoint:
        assert_same(checkpoint, state)


@pytest.mark.parametrize("code", sorted(filter(saves, UNTYPED)))
def test_a_storage_without_a_type_is_listed_and_not_read(tmp_path: Path, code: str) -> None:
    """torch swaps a storage by its type, and here reads other values than were written."""
    state = {
        "x": random_tensor(getattr(torch, DTYPES[code].torch_name), (3, 2)),
        "w": torch.arange(3, dtype=torch.int8),
    }
    width = DTYPES[code].part_bytes
    path = write(tmp_path, big(saved({"x": state["x"]}), width))
    assert bits(torch.load(path, weights_only=True)["x"]) == reversed_in(bits(state["x"]), width)
    with opened(tmp_path, big(saved(state), 1)) as checkpoint:
        assert (checkpoint["x"].kind, checkpoint["x"].dtype, checkpoint["x"].shape) == ("big-endian", code, (3, 2))
        assert checkpoint.read_bytes("w") == b"\0\1\2"
        with pytest.raises(FormatError, match="'x' is a big-endian tensor"):
            checkpoint.payload("x")


def test_a_storage_of_two_types_is_not_read(tmp_path: Path) -> None:
    """torch swaps the bytes by the first type, and gives this type to all tensors."""
    first, other = tensor(storage("0", 4)), tensor(storage("0", 8, "torch.HalfStorage"), size=(4,), stride=(1,))
    data = rezip(torch_zip(mapping({"first": first, "other": other})), {"archive/byteorder": b"big"})
    with opened(tmp_path, data) as checkpoint:
        assert [(info.kind, info.dtype) for info in checkpoint.values()] == [("two-type", "F32")] * 2


def test_legacy_storages_are_little_endian_everywhere(tmp_path: Path) -> None:
    """torch writes little-endian there and reads no flag; it mixed up the parts of complex numbers."""
    body = mapping(
        {
            "w": tensor(storage("0", 4, "torch.FloatStorage", "cpu", b"N")),
            "c": tensor(storage("1", 2, "torch.ComplexFloatStorage", "cpu", b"N"), size=(2,), stride=(1,)),
        }
    )
    record = (4).to_bytes(8, "little") + bytes(range(16))
    data = legacy_file(body, ("0", "1"), record + (2).to_bytes(8, "little") + bytes(16))
    assert data.count(b"\x88") == 1
    path = write(tmp_path, data.replace(b"\x88", b"\x89"))
    with open_checkpoint(path) as checkpoint:
        theirs = torch.load(path, weights_only=True)
        assert checkpoint.read_bytes("w") == bits(theirs["w"]) == bytes(range(16))
        assert checkpoint["c"].kind == "big-endian"
        assert any("written on a big-endian machine" in line for line in checkpoint.warnings)


def test_a_little_endian_file_gets_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"), opened(tmp_path, saved({"w": torch.ones(2)})) as checkpoint:
        assert checkpoint.warnings == ()
