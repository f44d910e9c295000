"""Weights of 8-bit floats with scales are the numbers that torch computes of them, with every form of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckptkit.errors import FormatError
from ckptkit.values.dequantize.model import BrokenPartError, Settings
from tests.helpers_dequantize import decoded, payload

ROWS, COLUMNS = 300, 270  # of blocks of 128, the last ones are smaller
FP8 = [getattr(torch, f"float8_{name}") for name in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")]


def spread(scales: torch.Tensor) -> torch.Tensor:
    """Return scales of blocks of 128 for each number."""
    return scales.repeat_interleave(128, -2)[..., :ROWS, :].repeat_interleave(128, -1)[..., :COLUMNS]


SCALES = {  # a scale, and the same for each number
    "per tensor": ((), ()),
    "per tensor, in a vector": ((1,), (1,)),
    "per row": ((ROWS, 1), (ROWS, 1)),
    "per row, in a vector": ((ROWS,), (ROWS, 1)),
    "per column": ((1, COLUMNS), (1, COLUMNS)),
    "per column, in a vector": ((COLUMNS,), (1, COLUMNS)),
    "per group of columns": ((ROWS, 3), None),
    "per block": ((3, 3), None),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", FP8)
def test_each_number_is_its_code_times_its_scale(name: str, dtype: torch.dtype) -> None:
    """Equal bit for bit to the product in float32, and after one rounding to bfloat16."""
    torch.manual_seed(0)
    shape, wide = SCALES[name]
    codes, scales = torch.randn(ROWS, COLUMNS).to(dtype), torch.rand(shape)
    if wide is not None:
        expected = codes.float() * scales.reshape(wide)
    elif name == "per block":
        expected = codes.float() * spread(scales)
    else:
        expected = codes.float() * scales.repeat_interleave(128, 1)[:, :COLUMNS]
    settings: Settings = {"block": (1, 128)} if name == "per group of columns" else {}
    assert torch.equal(decoded("scaled", {"codes": codes, "scales": scales}, settings=settings), expected)
    narrow = decoded("scaled", {"codes": codes, "scales": scales}, torch.bfloat16, settings)
    assert torch.equal(narrow, expected.bfloat16())


def test_scales_of_experts_and_powers_of_two() -> None:
    """Several matrices in one tensor have scales of their own, which can be exponents."""
    codes = torch.randn(2, ROWS, COLUMNS).to(torch.float8_e4m3fn)
    for shape in ((2,), (2, 1, 1), (2, ROWS, 1), (2, 1, COLUMNS)):
        scales = torch.rand(shape)
        expected = codes.float() * (scales.reshape(2, 1, 1) if len(shape) == 1 else scales)
        assert torch.equal(decoded("scaled", {"codes": codes, "scales": scales}), expected)
    exponents = torch.randint(110, 140, (2, 3, 3), dtype=torch.uint8)
    expected = codes.float() * spread(2.0 ** (exponents.float() - 127))
    assert torch.equal(decoded("scaled", {"codes": codes, "scales": exponents}), expected)


def test_any_range_has_the_bytes_of_the_whole() -> None:
    """Chunks, ranges and threads give the same bytes; the losses of the rounding are counted."""
    parts = {"codes": torch.full((3, 5000), 448.0).to(torch.float8_e4m3fn), "scales": torch.full((3,), 1e3)}
    made = payload("scaled", parts, "F16")
    whole = b"".join(map(bytes, made.chunks()))
    assert np.frombuffer(whole, np.float16).max() == np.inf
    assert made.losses is not None
    assert made.losses["w"].overflowed == 15_000
    for start, count in ((0, 30_000), (9_998, 4), (1, 12_345)):
        buffer = bytearray(count)
        made.slice(start, count).readinto(memoryview(buffer))  # type: ignore[attr-defined]
        assert bytes(buffer) == whole[start : start + count]


@pytest.mark.parametrize("scales", [(1, 1), (1, 79), (1, 10_001)], ids=["whole", "blocks", "columns"])
@pytest.mark.parametrize("is_flat", [False, True])
def test_a_long_row_is_decoded_in_parts(
    scales: tuple[int, ...], is_flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with the length of a row, and the numbers are the same."""
    monkeypatch.setattr("ckptkit.values.dequantize.payload.PIECE", 4096)
    codes = torch.randn(1, 10_001).to(torch.float8_e4m3fn)
    values = torch.rand(scales) + 0.5
    expected = codes.float() * values.repeat_interleave(128 if scales[1] == 79 else 1, 1)[:, :10_001]
    if is_flat:
        codes, values, expected = codes[0], values[0], expected[0]
    made = payload("scaled", {"codes": codes, "scales": values})
    pieces = [bytes(piece) for piece in made.chunks()]
    assert [len(piece) // 4 for piece in pieces] == [4096, 4096, 1809]
    assert torch.equal(torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float32), expected.flatten())
    assert torch.equal(decoded("scaled", {"codes": codes, "scales": values}), expected)
    part = bytearray(4 * 3000)
    made.read_range(4 * 5000, memoryview(part))
    assert torch.equal(torch.frombuffer(part, dtype=torch.float32), expected.flatten()[5000:8000])


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])
def test_losses_of_rounding_are_those_of_each_number(scale: float) -> None:
    """Also where scales tell before a number is decoded that none is lost."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    numbers = codes.float() * scale
    made = payload("scaled", {"codes": codes, "scales": torch.tensor([scale])}, "F16")
    made.find_losses()
    assert made.losses is not None
    found = made.losses["w"]
    assert found.overflowed == int((numbers.isfinite() & numbers.half().isinf()).sum())
    assert found.underflowed == int(((numbers != 0) & (numbers.half() == 0)).sum())


@pytest.mark.parametrize(("dtype", "overflowed"), [("F32", 1), ("BF16", 1), ("F8_E4M3", 3)])
def test_products_that_float32_cannot_hold_are_losses(dtype: str, overflowed: int) -> None:
    """A code for inf or NaN stays so, and is counted. Of F8_E4M3, which has no inf, each number counts once."""
    codes = torch.tensor([[2.0, torch.inf, torch.nan, 1.0]]).to(torch.float8_e5m2)
    made = payload("scaled", {"codes": codes, "scales": torch.tensor([[3e38]])}, dtype)
    made.find_losses()
    assert made.losses is not None
    assert (made.losses["w"].overflowed, made.losses["w"].infinite_codes) == (overflowed, 2)


def test_broken_scales_are_refused_with_the_name_of_the_part() -> None:
    """A shape that fits in no way is found from the header, NaN when the scales are read."""
    codes = torch.ones(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(BrokenPartError, match=r"scales is F32 \[3, 3\], which does not fit a weight of \[4, 4\]"):
        decoded("scaled", {"codes": codes, "scales": torch.ones(3, 3)})
    with pytest.raises(FormatError, match=r"'w' cannot be dequantised: 'scales' has 1 of 4 values that are NaN"):
        decoded("scaled", {"codes": codes, "scales": torch.tensor([1, 1, float("nan"), 1])})
