"""Weights of 4-bit floats are the numbers of their codes times the scales of their groups."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import plan_remap
from ckptkit.core.checkpoint.payload import Part, Payload
from ckptkit.errors import PlanError
from ckptkit.values.dequantize.model import BrokenPartError
from tests.helpers_dequantize import decoded, decoded_by_rows, dequantized, payload

BOOK = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """Return two numbers for each byte: that of its lower half first."""
    halves = torch.stack([codes & 15, codes >> 4], -1)
    return BOOK[halves.long()].flatten(-2)


class Recorded:
    """The bytes of codes, and which ranges of them were read."""

    def __init__(self, codes: torch.Tensor) -> None:
        self.data = codes.numpy().tobytes()
        self.nbytes = len(self.data)
        self.reads: list[tuple[int, int]] = []

    def chunks(self) -> Iterator[bytes]:
        yield self.data

    def slice(self, start: int, nbytes: int) -> Payload:
        self.reads.append((start, nbytes))
        return Part(self, start, nbytes)


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_powers_of_two_for_32_numbers() -> None:
    """The scales of MX formats are exponents, in bytes or with a dtype of their own."""
    codes, exponents = random_codes(5, 64), torch.randint(100, 140, (5, 4), dtype=torch.uint8)
    expected = numbers(codes) * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    assert torch.equal(decoded("mxfp4", {"codes": codes, "scales": exponents}), expected)
    assert torch.equal(decoded("mxfp4", {"codes": codes.view(torch.int8), "scales": exponents}), expected)


@pytest.mark.parametrize("family", ["nvfp4", "nvfp4 divided"])
def test_two_levels_of_scales(family: str) -> None:
    """The scale of a group of 16 is multiplied by the global scale, or divided; experts can have one each."""
    codes, scales = random_codes(3, 5, 32), (torch.rand(3, 5, 4) + 0.5).to(torch.float8_e4m3fn)
    for common in (torch.tensor(0.3), torch.rand(3) + 0.1):
        shared = common.reshape(-1, 1, 1)
        scale = scales.float() / shared if family == "nvfp4 divided" else scales.float() * shared
        expected = numbers(codes) * scale.repeat_interleave(16, -1)
        parts = {"codes": codes, "scales": scales, "global": common}
        assert torch.equal(decoded(family, parts), expected)
        assert torch.equal(decoded_by_rows(family, parts), expected)


def test_blocks_of_gpt_oss() -> None:
    """The blocks of the files of transformers are those of the transpose, and are decoded a matrix at a time."""
    codes, exponents = random_codes(3, 6, 2, 16), torch.randint(100, 140, (3, 6, 2), dtype=torch.uint8)
    parts = {"codes": codes, "scales": exponents}
    expected = numbers(codes).flatten(-2) * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, -1)
    assert torch.equal(decoded("mxfp4 blocks", parts), expected)
    assert torch.equal(decoded("mxfp4 blocks transposed", parts), expected.mT)
    assert torch.equal(decoded_by_rows("mxfp4 blocks transposed", parts, rows=5), expected.mT)


def test_a_matrix_of_gpt_oss_is_decoded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a transposed matrix can end anywhere in it, and its codes are read once for all of them."""
    monkeypatch.setattr("ckptkit.values.dequantize.payload.PIECE", 64 * 6)
    codes, exponents = random_codes(2, 6, 3, 16), torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    expected = (numbers(codes) * (2.0 ** (exponents.float() - 127))[..., None]).flatten(-2).mT
    parts = {"codes": codes, "scales": exponents}
    assert torch.equal(decoded("mxfp4 blocks transposed", parts), expected)
    assert torch.equal(decoded_by_rows("mxfp4 blocks transposed", parts, rows=7), expected)
    made, source = payload("mxfp4 blocks transposed", parts), Recorded(codes)
    made = replace(made, sources={**made.sources, "codes": source})
    assert torch.equal(
        torch.frombuffer(bytearray(b"".join(map(bytes, made.chunks()))), dtype=torch.float32), expected.flatten()
    )
    assert source.reads == [(0, 288), (288, 288)]


def test_parts_that_do_not_fit_are_refused() -> None:
    """The number of scales and of global scales is checked from the headers."""
    codes, exponents = random_codes(5, 64), torch.zeros(5, 3, dtype=torch.uint8)
    with pytest.raises(BrokenPartError, match=r"scales is U8 \[5, 3\], and must be \[5, 4\] for groups of 32"):
        decoded("mxfp4", {"codes": codes, "scales": exponents})
    scales = torch.ones(5, 8).to(torch.float8_e4m3fn)
    with pytest.raises(BrokenPartError, match=r"global is F32 \[2\], and not one scale"):
        decoded("nvfp4", {"codes": codes, "scales": scales, "global": torch.ones(2)})


def flat(folder: Path, name: str, **fields: object) -> Path:
    """Write a weight of 4-bit floats as torchao flattens a tensor of a class."""
    described = json.dumps({"_type": name, "_data": {"block_size": 16, **fields}})
    parts = {"l._weight_qdata": random_codes(4, 16), "l._weight_scale": torch.ones(4, 2).to(torch.float8_e4m3fn)}
    save_file(parts, folder / "m.safetensors", metadata={"l.weight": described})
    return folder / "m.safetensors"


def test_flat_parts_of_torchao(tmp_path: Path) -> None:
    """The metadata says what the parts are: without a scale for the tensor, numbers are only times those of groups."""
    path = flat(tmp_path, "NVFP4Tensor", orig_dtype={"_type": "torch.dtype", "_data": "bfloat16"})
    codes = load_file(path)["l._weight_qdata"]
    assert torch.equal(dequantized(path)["l.weight"], numbers(codes))
    assert plan_remap(path, dequantize=True).steps[0].out.dtype == "BF16"


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("NVFP4Tensor", {"is_swizzled_scales": True}, "as NVFP4Tensor with scales in the layout of a GPU"),
        ("NVFP4Tensor", {"block_size": 32}, "as NVFP4Tensor in groups of 32"),
        ("MXTensor", {"elem_dtype": "int8"}, "as MXTensor of int8"),
        ("Int4TilePackedTo4dTensor", {}, "as Int4TilePackedTo4dTensor"),
        ("Int4Tensor", {"block_size": [2, 16]}, "as Int4Tensor in blocks of [2, 16]"),
    ],
)
def test_other_forms_of_torchao_are_refused_by_name(
    name: str, fields: dict[str, object], reason: str, tmp_path: Path
) -> None:
    """Nothing is guessed."""
    with pytest.raises(PlanError) as caught:
        dequantized(flat(tmp_path, name, **fields))
    assert reason in str(caught.value)
