"""Decode the K types of GGUF: a block of 256 codes has scales of groups, and one scale of these scales.

The functions are as those of ``gguf_blocks``. ggml-common.h describes the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.values.dequantize.gguf_blocks import half_floats, nibbles, pairs_of_bits

if TYPE_CHECKING:
    from ckptkit.values.dequantize.gguf_blocks import Blocks, Values

__all__ = ["decode_q2_k", "decode_q3_k", "decode_q4_k", "decode_q5_k", "decode_q6_k"]


def _scale_groups(out: Values, scales: Values, minima: Values | None = None) -> None:
    """Multiply each group of a block by its scale, and subtract its minimum."""
    groups = out.reshape(*scales.shape, -1)
    groups *= scales[:, :, None]
    if minima is not None:
        groups -= minima[:, :, None]


def decode_q2_k(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 84 bytes: 16 scales and minima of four bits each, codes of two bits."""
    import numpy as np

    packed = blocks[:, :16]
    out[...] = pairs_of_bits(blocks[:, 16:80])
    scales = half_floats(blocks, 80) * (packed & 15).astype(np.float32)
    _scale_groups(out, scales, half_floats(blocks, 82) * (packed >> 4).astype(np.float32))


def decode_q3_k(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 110 bytes: 16 scales of six bits; codes of three bits, the third bits first."""
    import numpy as np

    codes = pairs_of_bits(blocks[:, 32:96])
    codes |= _planes(blocks[:, :32]) << 2
    codes -= 4  # below zero, it wraps around as int8 does
    out[...] = codes.view(np.int8)
    scales = np.empty((len(blocks), 16), np.uint8)
    scales[:, :8] = blocks[:, 96:104] & 15
    scales[:, 8:] = blocks[:, 96:104] >> 4
    for number in range(4):
        scales[:, 4 * number : 4 * number + 4] |= (blocks[:, 104:108] >> (2 * number) & 3) << 4
    scales -= 32
    _scale_groups(out, half_floats(blocks, 108) * scales.view(np.int8).astype(np.float32))


def _planes(packed: Blocks) -> Blocks:
    """Return the first bits of 32 bytes, then their second bits, and so on, one bit a byte."""
    import numpy as np

    planes = np.empty((len(packed), 8, 32), np.uint8)
    for number in range(8):
        np.right_shift(packed, number, out=planes[:, number])
    planes &= 1
    return planes.reshape(len(packed), 256)


def _scales_and_minima(blocks: Blocks) -> tuple[Values, Values]:
    """Return the 8 scales and minima of Q4_K and Q5_K: six bits each in the 12 bytes from byte 4, times two scales.

    The first four of each kind are the low six bits of a byte. Of the others, those bytes have the two highest bits,
    and the last four bytes have four bits each.
    """
    import numpy as np

    packed = blocks[:, 4:16]
    codes = np.empty((2, len(blocks), 8), np.uint8)
    for kind, first in enumerate((packed[:, :4], packed[:, 4:8])):
        np.bitwise_and(first, 63, out=codes[kind, :, :4])
        codes[kind, :, 4:] = (packed[:, 8:] >> (4 * kind) & 15) | (first >> 6 << 4)
    scales, minima = codes.astype(np.float32)
    return half_floats(blocks, 0) * scales, half_floats(blocks, 2) * minima


def decode_q4_k(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 144 bytes: 8 scales and minima, codes of four bits."""
    out[...] = nibbles(blocks[:, 16:], 32)
    _scale_groups(out, *_scales_and_minima(blocks))


def decode_q5_k(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 176 bytes: as Q4_K, and the fifth bits of the codes before the others."""
    codes = nibbles(blocks[:, 48:], 32)
    codes |= _planes(blocks[:, 16:48]) << 4
    out[...] = codes
    _scale_groups(out, *_scales_and_minima(blocks))


def decode_q6_k(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 210 bytes: 16 scales of eight bits, codes of six bits: four, and then two."""
    import numpy as np

    codes = nibbles(blocks[:, :128], 64)
    codes |= pairs_of_bits(blocks[:, 128:192]) << 4
    codes -= 32
    out[...] = codes.view(np.int8)
    _scale_groups(out, half_floats(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))
