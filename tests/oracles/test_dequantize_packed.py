"""Weights that libraries quantise are the numbers that the same libraries make of them, bit for bit."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.core.torch_bridge import code_of
from ckptkit.values.dequantize.model import Settings
from tests.helpers_dequantize import decoded, decoded_by_rows, dequantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library(name: str) -> Any:
    """Return a module of a library, or skip the test if the library is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings(action="ignore"):  # some warn of their own use of torch
        return importlib.import_module(name)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(64, 64), (5, 7), (33, 130), (7, 1001), (3, 4, 50), (300, 256), (64, 160)], ids=str)
def test_four_bits_of_bitsandbytes(kind: str, nested: bool, blocksize: int, shape: tuple[int, ...]) -> None:
    """The weight is ``dequantize_4bit`` in each dtype.

    The oracle is the implementation that bitsandbytes has for every device. Its own kernel for processors with AVX-512
    takes the scales of other blocks where a block of 64 ends within a row of 160 numbers, as of version 0.50.
    """
    functional, ops = library("bitsandbytes.functional"), library("bitsandbytes.backends.default.ops")

    torch.manual_seed(0)
    for dtype in DTYPES:
        weight = torch.randn(shape, dtype=dtype)
        codes, state = functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type=kind, compress_statistics=nested
        )
        absmax = state.absmax
        if nested:
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        compute = getattr(ops._dequantize_4bit_compute, "_torchdynamo_orig_callable", ops._dequantize_4bit_compute)
        expected = compute(codes.reshape(-1), absmax, state.code, blocksize, shape, dtype)
        found = state.as_dict(packed=False)
        parts = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)} | {"codes": codes}
        settings = {name: value for name, value in found.items() if not isinstance(value, torch.Tensor)}
        assert torch.equal(decoded("bitsandbytes 4bit", parts, dtype, settings), expected.reshape(shape))
        by_rows = decoded_by_rows("bitsandbytes 4bit", parts, settings, 3)
        assert torch.equal(by_rows.to(dtype), expected.reshape(shape))


def test_int8_of_bitsandbytes() -> None:
    """The weight is ``int8_vectorwise_dequant``, which rounds after each of two products."""
    functional = library("bitsandbytes.functional")

    torch.manual_seed(0)
    codes, rows, _ = functional.int8_vectorwise_quant(torch.randn(170, 333).half() * 3)
    found = decoded("bitsandbytes int8", {"codes": codes, "scales": rows})
    assert torch.equal(found, functional.int8_vectorwise_dequant(codes, rows))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_compressed_tensors(bits: int, strategy: str, symmetric: bool) -> None:
    """The weight is what its compressor decompresses, which multiplies in the dtype of the scales."""
    base, quantization = library("compressed_tensors.compressors.base"), library("compressed_tensors.quantization")

    torch.manual_seed(0)
    group = 32 if strategy == "group" else None
    arguments = quantization.QuantizationArgs(num_bits=bits, strategy=strategy, group_size=group, symmetric=symmetric)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    for dtype in DTYPES:
        for rows, columns in ((40, 64), (14, 96), (33, 160)):
            shape = {"group": (rows, columns // 32), "channel": (rows, 1), "tensor": (1,)}[strategy]
            state = {"weight": torch.randn(rows, columns).to(dtype)}
            state["weight_scale"] = (torch.rand(shape) * 0.1 + 0.01).to(dtype)
            half = 0 if symmetric else 1 << bits - 1
            state["weight_zero_point"] = torch.randint(-half, max(half, 1), shape, dtype=torch.int8)
            names = {
                "weight_scale": "scales",
                "weight_zero_point": "zeros",
                "weight_packed": "codes",
                "weight": "codes",
            }
            for form in ("pack-quantized", "int-quantized"):
                compressor = base.BaseCompressor.get_value_from_registry(form)
                stored = compressor.compress(state, scheme)
                expected = compressor.decompress(stored, scheme)["weight"]
                parts = {names[name]: part for name, part in stored.items() if name in names}
                family: str = "scaled"
                settings: Settings = {}
                if form == "pack-quantized":
                    family, settings = "packed rows", {"bits": bits, "shape": tuple(stored["weight_shape"].tolist())}
                assert torch.equal(decoded(family, parts, dtype, settings), expected)


@pytest.mark.parametrize("name", ["qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quanto(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The weight is what ``dequantize`` of optimum-quanto returns."""
    quanto = library("optimum.quanto")
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(64, 96)).to(dtype)
    quanto.quantize(model, weights=getattr(quanto, name))
    quanto.freeze(model)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    found = dequantized(tmp_path / "m.safetensors", code_of(dtype))
    assert torch.equal(found["0.weight"], model[0].weight.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("view_as_float", [False, True])
def test_hqq(bits: int, axis: int, view_as_float: bool, tmp_path: Path) -> None:
    """The weight is what ``dequantize`` of HQQ returns where it computes in F32."""
    quantize = library("hqq.core.quantize")
    torch.manual_seed(0)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis, view_as_float=view_as_float)
    linear: Any = torch.nn.Linear(64, 96)
    layer = quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    save_file({f"a.{key}": part.contiguous() for key, part in layer.state_dict().items()}, tmp_path / "m.safetensors")
    found = dequantized(tmp_path / "m.safetensors")
    assert list(found) == ["a.weight"]
    assert torch.equal(found["a.weight"], layer.dequantize())
