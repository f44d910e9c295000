"""Weights of the classes of torchao that are saved as flat parts: the decoders of their forms."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.dequantize.fp4 import mxfp4, nvfp4, nvfp4_without_global
from ckptkit.values.dequantize.fp8 import scaled
from ckptkit.values.dequantize.model import Decoder, Settings

__all__ = ["torchao"]


def torchao(parts: Mapping[str, TensorInfo], settings: Settings) -> Decoder:
    """Return the decoder of these parts.

    The settings can have ``form``, which is ``"mxfp4"`` or ``"nvfp4"`` for codes of 4 bits, ``block`` and ``dtype``.
    """
    form = settings.get("form")
    if form == "mxfp4":
        return mxfp4(parts, settings)
    if form == "nvfp4":
        return nvfp4(parts, settings) if "global" in parts else nvfp4_without_global(parts, settings)
    return scaled(parts, settings)
