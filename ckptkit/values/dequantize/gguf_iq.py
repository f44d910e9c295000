"""Decode the IQ types of GGUF: a code stands for a point of several numbers. ggml-common.h describes the bytes.

The functions are as those of ``gguf_blocks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.values.dequantize.gguf_blocks import IQ4_VALUES, finite, half_floats, look_up_nibbles
from ckptkit.values.dequantize.gguf_books import code_book, signs_of_7_bits, signs_of_8_bits

if TYPE_CHECKING:
    from ckptkit.values.dequantize.gguf_blocks import Blocks, Codes, Values

__all__ = [
    "decode_iq1_m", "decode_iq1_s", "decode_iq2_s", "decode_iq2_xs", "decode_iq2_xxs", "decode_iq3_s",
    "decode_iq3_xxs", "decode_iq4_xs",
]  # fmt: skip

_DELTA = 0.125  # what IQ1 adds to each number of a point, or subtracts


def _words(blocks: Blocks, first: int, last: int, dtype: str) -> Codes:
    """Return the bytes of each block from ``first`` to ``last`` as numbers of a dtype."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, first:last]).view(dtype)


def _halves(packed: Blocks) -> Values:
    """Return the low and the high half of each byte, one after the other, as numbers."""
    import numpy as np

    return np.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), -1).astype(np.float32)


def _shifted(numbers: Codes, *shifts: int) -> Codes:
    """Return each number, shifted to the right by each of ``shifts``."""
    import numpy as np

    return (numbers[:, :, None] >> np.array(shifts, numbers.dtype)).reshape(len(numbers), -1)


def _fill(out: Values, book: str, codes: Codes, scales: Values) -> None:
    """Fill ``out`` with the points of the codes, times the scales of their groups."""
    import numpy as np

    points = code_book(book)
    np.take(points, codes, axis=0, out=out.reshape(*codes.shape, points.shape[1]), mode="clip")
    groups = out.reshape(*scales.shape, -1)
    groups *= scales[:, :, None]


def _set_signs(out: Values, table: Values, codes: Codes) -> None:
    import numpy as np

    out *= np.take(table, codes, axis=0).reshape(out.shape)


def decode_iq2_xxs(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 66 bytes: for 32 numbers four codes, four times 7 bits of signs and a scale of four bits."""
    import numpy as np

    words = _words(blocks, 2, 66, "<u4")
    codes = blocks[:, 2:66].reshape(len(blocks), 8, 8)[:, :, :4].reshape(len(blocks), 32)
    scales = half_floats(blocks, 0) * (np.float32(0.5) + (words[:, 1::2] >> 28).astype(np.float32)) * np.float32(0.25)
    _fill(out, "IQ2_XXS", codes, scales)
    _set_signs(out, signs_of_7_bits(), _shifted(words[:, 1::2], 0, 7, 14, 21) & 127)


def decode_iq2_xs(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 74 bytes: codes of nine bits with seven bits of signs, a scale of four bits for 16 numbers."""
    import numpy as np

    words = _words(blocks, 2, 66, "<u2")
    scales = half_floats(blocks, 0) * (np.float32(0.5) + _halves(blocks[:, 66:74])) * np.float32(0.25)
    _fill(out, "IQ2_XS", words & 511, scales)
    _set_signs(out, signs_of_7_bits(), words >> 9)


def decode_iq2_s(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 82 bytes: codes of 8 and 2 bits, a byte of signs a code, a scale of 4 bits for 16 numbers."""
    import numpy as np

    high = _shifted(blocks[:, 66:74].astype(np.uint32), 0, 2, 4, 6) & 3
    scales = half_floats(blocks, 0) * (np.float32(0.5) + _halves(blocks[:, 74:82])) * np.float32(0.25)
    _fill(out, "IQ2_S", blocks[:, 2:34] | high << 8, scales)
    _set_signs(out, signs_of_8_bits(), blocks[:, 34:66])


def decode_iq3_xxs(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 98 bytes: 64 codes; for 32 numbers, four times seven bits of signs and a scale of four bits."""
    import numpy as np

    words = _words(blocks, 66, 98, "<u4")
    scales = half_floats(blocks, 0) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    _fill(out, "IQ3_XXS", blocks[:, 2:66], scales)
    _set_signs(out, signs_of_7_bits(), _shifted(words, 0, 7, 14, 21) & 127)


def decode_iq3_s(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 110 bytes: codes of 8 and 1 bits, a sign for each number, a scale of 4 bits for 32 numbers."""
    import numpy as np

    high = np.unpackbits(np.ascontiguousarray(blocks[:, 66:74]), axis=1, bitorder="little").astype(np.uint32)
    scales = half_floats(blocks, 0) * (1 + 2 * _halves(blocks[:, 106:110]))
    _fill(out, "IQ3_S", blocks[:, 2:66] | high << 8, scales)
    _set_signs(out, signs_of_8_bits(), blocks[:, 74:106])


def decode_iq1_s(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 50 bytes: codes of 8 and 3 bits; for 32 numbers, a scale of three bits and a sign of delta."""
    import numpy as np

    words = _words(blocks, 34, 50, "<u2").astype(np.uint32)
    scales = half_floats(blocks, 0) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    deltas = np.where(words >> 15, np.float32(-_DELTA), np.float32(_DELTA))
    _fill_near(out, blocks[:, 2:34] | (_shifted(words, 0, 3, 6, 9) & 7) << 8, deltas, scales)


def decode_iq1_m(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 56 bytes: as IQ1_S, with a sign of delta for each code, and a scale for 16 numbers.

    The scale of the block is in the highest four bits of four numbers, which have four scales of three bits each.
    """
    import numpy as np

    high = _shifted(blocks[:, 32:48].astype(np.uint32), 0, 4)
    words = _words(blocks, 48, 56, "<u2").astype(np.uint32)
    whole = (words >> 12 << np.array([0, 4, 8, 12], np.uint32)).sum(axis=1, dtype=np.uint32).astype(np.uint16)
    whole_scales = finite(whole.view(np.float16).astype(np.float32)[:, None])
    scales = whole_scales * (2 * (_shifted(words, 0, 3, 6, 9) & 7) + 1)
    deltas = np.where(high & 8, np.float32(-_DELTA), np.float32(_DELTA))
    _fill_near(out, blocks[:, :32] | (high & 7) << 8, deltas, scales.astype(np.float32))


def _fill_near(out: Values, codes: Codes, deltas: Values, scales: Values) -> None:
    """Fill ``out`` with the points of IQ1 plus their deltas, times their scales."""
    import numpy as np

    np.take(code_book("IQ1_S"), codes, axis=0, out=out.reshape(*codes.shape, 8), mode="clip")
    near = out.reshape(*deltas.shape, -1)
    near += deltas[:, :, None]
    groups = out.reshape(*scales.shape, -1)
    groups *= scales[:, :, None]


def decode_iq4_xs(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` from 136 bytes: codes of four bits; scales of 2 and 4 bits for 32 numbers."""
    import numpy as np

    high = _shifted(_words(blocks, 2, 4, "<u2").astype(np.uint32), *range(0, 16, 2)) & 3
    codes = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=2).reshape(len(blocks), 8) | high << 4
    scales = half_floats(blocks, 0) * (codes.astype(np.float32) - np.float32(32))
    look_up_nibbles(blocks[:, 8:], 16, IQ4_VALUES, out)
    groups = out.reshape(len(blocks), 8, 32)
    groups *= scales[:, :, None]
