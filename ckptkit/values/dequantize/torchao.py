"""Weights of the classes of torchao that are saved as flat parts: the decoders of their forms."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.dequantize.fp4 import mxfp4, nvfp4, nvfp4_without_global
from ckptkit.values.dequantize.fp8 import scaled
from ckptkit.values.dequantize.model import Decoder, Settings
from ckptkit.values.dequantize.packed.fp6 import float6
from ckptkit.values.dequantize.packed.nibbles import nibbles

__all__ = ["torchao"]


def torchao(parts: Mapping[str, TensorInfo], settings: Settings) -> Decoder:
    """Return the decoder of these parts.

    The settings can have ``form``, which is ``"mxfp4"``, ``"nvfp4"`` or ``"int4"`` for codes of 4 bits and ``"mxfp6"``
    for codes of 6, ``block`` and ``dtype``.
    """
    form = settings.get("form")
    if form == "int4":
        return nibbles(parts, settings)
    if form == "mxfp6":
        return float6(parts, settings)
    if form == "mxfp4":
        return mxfp4(parts, settings)
    if form == "nvfp4":
        return nvfp4(parts, settings) if "global" in parts else nvfp4_without_global(parts, settings)
    return scaled(parts, settings)
