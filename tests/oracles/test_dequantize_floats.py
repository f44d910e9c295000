"""Weights of fp8 and 4-bit floats that libraries quantise are the numbers that the same libraries make of them."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptkit
from tests.helpers_dequantize import decoded, dequantized


def library(name: str) -> Any:
    """Return a module of a library, or skip the test if the library is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float8_e8m0fnu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_of_transformers(scale: str, dtype: torch.dtype) -> None:
    """Blocks of 128 by 128, and one scale for all, are ``Fp8Dequantize``, which computes in float32 and rounds once."""
    convert = library("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    torch.manual_seed(0)
    codes = torch.randn(256, 384).to(torch.float8_e4m3fn)
    if scale == "float8_e8m0fnu":
        scales = torch.randint(118, 130, (2, 3), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    else:
        scales = torch.rand(2, 3).to(getattr(torch, scale))
    expected = convert._dequantize_one(codes, scales, dtype)
    assert torch.equal(decoded("scaled", {"codes": codes, "scales": scales}, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_of_transformers(dtype: torch.dtype) -> None:
    """The blocks of gpt-oss are ``convert_moe_packed_tensors``: both products are exact."""
    module = library("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 8, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 5), dtype=torch.uint8)
    expected = module.convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=dtype)
    assert torch.equal(decoded("mxfp4 blocks transposed", {"codes": blocks, "scales": scales}, dtype), expected)


@pytest.mark.parametrize(("format_name", "group"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_float4_of_compressed_tensors(format_name: str, group: int) -> None:
    """Packed weights are ``dequantize`` of compressed-tensors in float32; ``decompress`` computes in its own dtype."""
    library("compressed_tensors")
    base = library("compressed_tensors.compressors.base").BaseCompressor
    scheme_of, args_of = (getattr(library("compressed_tensors.quantization"), name) for name in (
        "QuantizationScheme", "QuantizationArgs"))  # fmt: skip
    library("compressed_tensors.compressors")
    compressor = base.get_value_from_registry(format_name)
    strategy = "tensor_group" if group == 16 else "group"
    weights = args_of(num_bits=4, type="float", strategy=strategy, group_size=group, symmetric=True)
    scheme = scheme_of(targets=["Linear"], weights=weights)
    torch.manual_seed(0)
    weight = torch.randn(8, 96)
    state: dict[str, torch.Tensor] = {"weight": weight}
    largest = weight.reshape(8, -1, group).abs().amax(-1)
    if group == 16:
        state["weight_global_scale"] = torch.tensor([448 * 6 / float(weight.abs().max())])
        state["weight_scale"] = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    else:
        state["weight_scale"] = 2.0 ** torch.floor(torch.log2(largest / 4))
    packed = compressor.compress(state, scheme)
    parts = {"codes": packed["weight_packed"], "scales": packed["weight_scale"]}
    family = "mxfp4"
    if group == 16:
        family, parts["global"] = "nvfp4 divided", packed["weight_global_scale"]
    unpack = library("compressed_tensors.compressors.nvfp4.helpers").unpack_fp4_from_uint8
    numbers = unpack(packed["weight_packed"], 8, 96, dtype=torch.float32)
    scale = packed["weight_scale"].float() if group == 16 else library(
        "compressed_tensors.compressors.mx_utils").decompress_mx_scale(packed["weight_scale"]).float()  # fmt: skip
    forward = library("compressed_tensors.quantization.lifecycle.forward")
    expected = forward.dequantize(
        x_q=numbers, scale=scale, args=weights, global_scale=packed.get("weight_global_scale"), dtype=torch.float32
    )
    assert torch.equal(decoded(family, parts), expected)


def test_nvfp4_and_mx_of_torchao() -> None:
    """MX tensors of 4-bit floats, and nvfp4 with a scale for the tensor, are ``dequantize`` of torchao."""
    mx = library("torchao.prototype.mx_formats.mx_tensor").MXTensor
    torch.manual_seed(0)
    weight = torch.randn(16, 64, dtype=torch.bfloat16)
    made = mx.to_mx(weight, torch.float4_e2m1fn_x2, block_size=32)
    scales = made.scale.view(torch.uint8)
    found = decoded("mxfp4", {"codes": made.qdata.view(torch.uint8), "scales": scales})
    assert torch.equal(found, made.dequantize(torch.float32))
    module = library("torchao.prototype.mx_formats.nvfp4_tensor")
    common = module.per_tensor_amax_to_scale(weight.float().abs().max())
    nvfp4 = module.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=common)
    parts = {"codes": nvfp4.qdata.view(torch.uint8), "scales": nvfp4.scale, "global": common.float()}
    assert torch.equal(decoded("nvfp4", parts), nvfp4.dequantize(torch.float32))


FLAT = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8, E5M2": torch.float8_e5m2,
    "mxfp6, E2M3": "fp6_e2m3",
    "mxfp6, E3M2": "fp6_e3m2",
}


@pytest.mark.parametrize("name", [*FLAT, "nvfp4", "nvfp4 without a scale for the tensor"])
def test_flat_tensors_of_torchao(name: str, tmp_path: Path) -> None:
    """A file of the parts that torchao flattens has the numbers of its ``dequantize``, and the dtype of the weight."""
    torch.manual_seed(0)
    weight = torch.randn(16, 64, dtype=torch.bfloat16)
    if name in FLAT:
        mx = library("torchao.prototype.mx_formats.mx_tensor").MXTensor
        made = mx.to_mx(weight, FLAT[name], block_size=32)
    else:
        module = library("torchao.prototype.mx_formats.nvfp4_tensor")
        common = module.per_tensor_amax_to_scale(weight.float().abs().max()) if name == "nvfp4" else None
        made = module.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=common)
    flatten = library("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    tensors, metadata = flatten({"l.weight": made})
    save_file(tensors, tmp_path / "m.safetensors", metadata=metadata)
    assert torch.equal(dequantized(tmp_path / "m.safetensors")["l.weight"], made.dequantize(torch.float32))
    assert ckptkit.plan_remap(tmp_path / "m.safetensors", dequantize=True).steps[0].out.dtype == "BF16"


def test_flat_int4_of_torchao(tmp_path: Path) -> None:
    """The class has no ``dequantize`` on a CPU: the numbers are codes times scales plus zero points."""
    int4 = library("torchao.quantization").Int4Tensor
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scales, zeros = torch.rand(2, 6).bfloat16(), torch.randn(2, 6).bfloat16()
    packed = codes[:, ::2] & 15 | codes[:, 1::2] << 4
    made = int4(packed, scales, zeros, [1, 32], torch.Size((6, 64)))
    flatten = library("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
    tensors, metadata = flatten({"l.weight": made})
    save_file(tensors, tmp_path / "m.safetensors", metadata=metadata)
    spread = [part.float().T.repeat_interleave(32, 1) for part in (scales, zeros)]
    assert torch.equal(dequantized(tmp_path / "m.safetensors")["l.weight"], codes.float() * spread[0] + spread[1])
