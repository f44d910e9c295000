"""The families of schemes, and the function that makes the decoder of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.dequantize.model import Decoder, Settings

__all__ = ["FAMILIES", "make_decoder"]

# The module and the function of each family: a family is imported when a weight needs it.
FAMILIES: Mapping[str, tuple[str, str]] = {
    "affine": ("affine", "affine"),
    "gguf": ("gguf", "in_blocks"),
    "scaled": ("fp8", "scaled"),
    "torchao": ("torchao", "torchao"),
    "mxfp4": ("fp4", "mxfp4"),
    "mxfp4 blocks": ("fp4", "mxfp4_blocks"),
    "mxfp4 blocks transposed": ("fp4", "mxfp4_blocks_transposed"),
    "nvfp4": ("fp4", "nvfp4"),
    "nvfp4 divided": ("fp4", "nvfp4_divided"),
    "bitsandbytes 4bit": ("packed.bitsandbytes", "four_bits"),
    "bitsandbytes int8": ("packed.bitsandbytes", "int8_rows"),
    "gptq": ("packed.gptq", "gptq"),
    "awq": ("packed.awq", "awq"),
    "hqq": ("packed.hqq", "hqq"),
    "mlx": ("packed.mlx", "mlx"),
    "packed rows": ("packed.rows", "packed_rows"),
}


def make_decoder(family: str, parts: Mapping[str, TensorInfo], settings: Settings) -> Decoder:
    """Return the decoder of a weight with these parts by role.

    ``settings`` has what the headers of the parts do not say. Raises ``BrokenPartError`` where the parts do not fit,
    and ``KeyError`` for an unknown family.
    """
    module, function = FAMILIES[family]
    maker: Callable[[Mapping[str, TensorInfo], Settings], Decoder] = getattr(
        importlib.import_module(f"ckptkit.values.dequantize.{module}"), function
    )
    return maker(parts, settings)
