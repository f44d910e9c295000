"""Strided, conjugate and negative views give the bytes of torch's contiguous copy, in bounded memory."""

from __future__ import annotations

import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit.core.checkpoint import TensorInfo, View
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.local import LocalFile
from ckptkit.core.files.payloads import CHUNK, Extent, Inflated, Region
from ckptkit.errors import FormatError
from ckptkit.formats import layout as strided
from ckptkit.formats.layout import InMemory, Strided
from tests.features import saves
from tests.helpers_formats import CODE_OF, bits, random_tensor

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
CODES = sorted(code for code in DTYPES if saves(code) and not code.startswith(("F4", "Q")))


def info_of(view: torch.Tensor) -> TensorInfo:
    return TensorInfo("w", CODE_OF[view.dtype], tuple(view.shape), View(0, int(view.storage_offset()), view.stride()))


def stored(view: torch.Tensor) -> bytes:
    """Return the bytes of the whole storage, as a file holds them."""
    return bytes(torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage()).tolist())


def gathered(view: torch.Tensor, storage: Region | None = None, *, conj: bool = False, neg: bool = False) -> bytes:
    payload = Strided(storage or InMemory(memoryview(stored(view))), info_of(view), conj, neg)
    assert payload.nbytes == view.numel() * view.element_size()
    return b"".join(bytes(chunk) for chunk in payload.chunks())


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Return a view with any strides and offset into a storage of any dtype."""
    dtype = getattr(torch, DTYPES[draw(st.sampled_from(CODES))].torch_name)
    shape = draw(st.lists(st.integers(1, 6), max_size=5))
    stride = [draw(st.integers(0, 7)) for _ in shape]
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    offset = draw(st.integers(0, 3))
    return random_tensor(dtype, (offset + reach,), reach).as_strided(shape, stride, offset)


@settings(deadline=None, max_examples=300)
@given(view=views())
def test_any_view_is_its_elements_in_order(view: torch.Tensor) -> None:
    """For every dtype and stride, the bytes are those of torch's contiguous copy."""
    assert gathered(view) == bits(view)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every other"])
@pytest.mark.parametrize("code", ["F16", "BF16", "F32", "F64", "C32", "C64", "C128"])
def test_conjugate_and_negative_are_as_torch_resolves_them(code: str, layout: str) -> None:
    """Only sign bits are flipped, also of zeros, infinities and NaN."""
    kind = DTYPES[code]
    real = {2: torch.bfloat16 if code == "BF16" else torch.float16, 4: torch.float32, 8: torch.float64}
    part = real[kind.bits // 8 // kind.parts]
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 3.5, -7.25], dtype=part)
    values = torch.cat([special, random_tensor(part, (54,))]).view(getattr(torch, kind.torch_name)).reshape(4, -1)
    view = {"contiguous": values, "transposed": values.T, "every other": values[:, ::2]}[layout]
    width = kind.bits // 8 // kind.parts
    for conj in (False, True)[: kind.parts]:
        for neg in (False, True):
            expected = bytearray(bits(view))
            for index in range(kind.parts):
                if neg != (conj and index == 1):
                    top = slice((index + 1) * width - 1, None, kind.bits // 8)
                    expected[top] = bytes(byte ^ 0x80 for byte in expected[top])
            assert gathered(view, conj=conj, neg=neg) == expected
            if code != "C32" or not neg:  # torch has no negation of these
                marked = view.conj() if conj else view
                resolved = (torch._neg_view(marked) if neg else marked).resolve_conj().resolve_neg()
                theirs = torch.view_as_real(resolved) if kind.parts == 2 else resolved
                ours = torch.frombuffer(expected, dtype=part).reshape(theirs.shape)
                # Whether torch keeps the sign of a complex zero, or of a NaN, depends on the layout: ours always does.
                unsigned = theirs.isnan() | (theirs == 0 if neg and kind.parts == 2 else False)
                assert bits(ours[~unsigned]) == bits(theirs[~unsigned])
                assert torch.equal(ours[unsigned].nan_to_num(1), theirs[unsigned].nan_to_num(1))


SHAPES = {
    "long rows": ((3, 700_001), (1, 3)),
    "many rows": ((700_001, 3), (1, 700_001)),
    "channels last": ((64, 300, 9, 9), (300 * 81, 1, 2700, 300)),
    "deep": ((2, 2, 600_000), (1_200_000, 1, 2)),
    "flat": ((2_500_000,), (2,)),
    "long run": ((2, 1_200_000), (1_500_000, 1)),
    "expanded rows": ((3, 1_000_000), (0, 1)),
    "expanded elements": ((2, 1_000_000), (1, 0)),
    "many twos": ((2,) * 21, tuple(2**index for index in range(21))),
}


@pytest.mark.parametrize(("shape", "stride"), SHAPES.values(), ids=SHAPES.keys())
def test_a_large_view_comes_in_pieces_of_bounded_size(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """No element is missing or repeated."""
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    view = torch.arange(last + 1, dtype=torch.int32).as_strided(shape, stride)
    whole = torch.arange(last + 1, dtype=torch.int32).numpy().tobytes()
    pieces = [bytes(piece) for piece in Strided(InMemory(memoryview(whole)), info_of(view)).chunks()]
    assert b"".join(pieces) == view.contiguous().numpy().tobytes()
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= CHUNK


HOLES = {
    "a column": ((4000,), (5000,)),
    "columns, transposed": ((3, 4000), (1, 5000)),
    "far apart": ((5, 40), (100, 500_000)),
    "expanded": ((2, 40, 2), (0, 500_000, 1)),
    "runs": ((30, 9000), (600_000, 1)),
    "overlapping": ((200, 200), (90_000, 1000)),
}


@pytest.mark.parametrize(("shape", "stride"), HOLES.values(), ids=HOLES.keys())
def test_bytes_between_the_elements_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    """A few elements of a large storage need memory for the elements and one window."""
    monkeypatch.setattr(strided, "_WINDOW", 1 << 20)
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    whole = torch.arange(7 + last + 1, dtype=torch.int32)
    view = whole.as_strided(shape, stride, 7)
    path = tmp_path / "storage"
    path.write_bytes(whole.numpy().tobytes())
    file = LocalFile(str(path))
    payload = Strided(Extent(file, 0, file.size), info_of(view))
    tracemalloc.start()
    content = b"".join(bytes(chunk) for chunk in payload.chunks())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    file.close()
    assert content == view.contiguous().numpy().tobytes()
    assert peak < 4 * payload.nbytes + 3 * CHUNK < file.size


def test_a_conjugate_without_elements_is_empty() -> None:
    assert gathered(torch.empty(0, 2, dtype=torch.complex64), conj=True) == b""


def test_elements_far_apart_in_compressed_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a megabyte can inflate to half a gigabyte, which would have to be kept in memory."""
    view = torch.arange(2**21, dtype=torch.int32)[:: 2**21 - 1]
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    (tmp_path / "packed").write_bytes(packer.compress(stored(view)) + packer.flush())
    file = LocalFile(str(tmp_path / "packed"))
    whole = Inflated(Extent(file, 0, file.size), 2**23, 0, 2**23)
    assert gathered(view, whole) == bits(view)
    monkeypatch.setattr(strided, "_WINDOW", 1 << 20)
    with pytest.raises(FormatError, match=r"8 B spread over 8\.4 MB") as caught:
        gathered(view, whole)
    file.close()
    assert caught.value.path == file.path
