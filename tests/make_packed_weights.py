"""Write ``fixtures/packed_weights.safetensors``: weights that libraries pack, and make again.

Run ``python -m tests.make_packed_weights`` where ``gptqmodel`` and ``mlx`` can be imported. GPTQModel 7.7 and MLX 0.32
made the file, with torch 2.13 and without a GPU. A weight of GPTQ has its qzeros twice: ``v2`` as GPTQModel keeps them,
and ``v1`` as it saves them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

PATH = Path(__file__).parents[1] / "fixtures/packed_weights.safetensors"
SIZE, GROUP = 32, 16


def gptq(bits: int) -> dict[str, torch.Tensor]:
    """Return the parts of a weight whose columns are in the order of activations, and the weight of GPTQModel."""
    layers: Any = import_module("gptqmodel.nn_modules.qlinear")
    kernel: Any = import_module("gptqmodel.nn_modules.qlinear.torch")
    conversion: Any = import_module("gptqmodel.utils.model")
    groups = SIZE // GROUP
    scales = (torch.rand(SIZE, groups) * 0.1 + 0.01).half().float()
    zeros = torch.randint(0, 1 << bits, (SIZE, groups)).float()
    linear = torch.nn.Linear(SIZE, SIZE, bias=False)
    module: Any = kernel.TorchLinear(
        bits=bits, group_size=GROUP, sym=False, desc_act=True, in_features=SIZE, out_features=SIZE, bias=False
    )
    index = (torch.arange(SIZE, dtype=torch.int32) // GROUP)[torch.randperm(SIZE)]
    module.pack_original(linear, scales, zeros, index)
    weight = layers.PackableQuantLinear.dequantize_weight(module).T.contiguous()
    newer = module.qzeros.clone()
    conversion.convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    parts = {"qweight": module.qweight, "scales": module.scales, "g_idx": module.g_idx, "weight": weight}
    return {f"gptq{bits}.{name}": part for name, part in {**parts, "v1": module.qzeros, "v2": newer}.items()}


def awq() -> dict[str, torch.Tensor]:
    """Return the parts of a weight of AWQ, and the weight that GPTQModel makes of them."""
    packing: Any = import_module("gptqmodel.quantization.awq.utils.packing_utils")
    codes = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32)
    zeros = torch.randint(0, 16, (SIZE // GROUP, SIZE), dtype=torch.int32)
    qweight, qzeros = packing.pack_awq(codes, zeros, 4)
    scales = (torch.rand(SIZE // GROUP, SIZE) * 0.1).half()
    weight = packing.dequantize_gemm(qweight, qzeros, scales, 4, GROUP).T.contiguous()
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "weight": weight}
    return {f"awq.{name}": part for name, part in parts.items()}


def mlx(bits: int) -> dict[str, torch.Tensor]:
    """Return the parts of a weight of MLX, and the weight that MLX makes of them."""
    core: Any = import_module("mlx.core")
    numpy: Any = import_module("numpy")
    parts = core.quantize(core.array(torch.randn(2, 64).numpy()), group_size=32, bits=bits)
    named = dict(
        zip(("weight", "scales", "biases", "expected"), (*parts, core.dequantize(*parts, 32, bits)), strict=True)
    )
    arrays = {name: numpy.array(part) for name, part in named.items()}
    arrays["weight"] = arrays["weight"].view(numpy.int32)  # older versions of torch have no tensors of uint32
    return {f"mlx{bits}.{name}": torch.from_numpy(array) for name, array in arrays.items()}


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    tensors = awq()
    for bits in (2, 3, 4, 5, 6, 8):
        tensors |= mlx(bits)
    for bits in (2, 3, 4, 8):
        tensors |= gptq(bits)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, PATH)


if __name__ == "__main__":
    main()
