"""Decode the GGUF types with one scale, or a scale and a minimum, for each block of codes, as in ggml-common.h.

Each function gets blocks, one a row, as bytes, and fills an array with a row of float32 numbers for each block. It
computes in float32 in the order of llama.cpp, so that every bit is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptkit.values.dequantize.model import BrokenPartError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Blocks = npt.NDArray[np.uint8]
    Codes = npt.NDArray[np.integer[Any]]
    Values = npt.NDArray[np.float32]

__all__ = [
    "IQ4_VALUES", "decode_iq4_nl", "decode_mxfp4", "decode_nvfp4", "decode_q1_0", "decode_q4_0", "decode_q4_1",
    "decode_q5_0", "decode_q5_1", "decode_q8_0", "decode_q8_k", "decode_tq1_0", "decode_tq2_0", "finite", "half_floats",
    "look_up_nibbles", "nibbles", "pairs_of_bits",
]  # fmt: skip

# The values of 4-bit codes: of IQ4, and of E2M1 twice as large, since the scales are half as large. -0 is 0.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_POWERS_OF_3 = (1, 3, 9, 27, 81)


def half_floats(blocks: Blocks, at: int) -> Values:
    """Return the F16 number at byte ``at`` of each block as float32, with shape ``(blocks, 1)``.

    Raises ``BrokenPartError`` where one is NaN or infinite.
    """
    import numpy as np

    return finite(np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32))


def finite(scales: Values) -> Values:
    """Return the scales; raise ``BrokenPartError`` where one is NaN or infinite."""
    import numpy as np

    if not np.isfinite(scales).all():
        raise BrokenPartError("codes", "has blocks with a scale that is NaN or infinite")
    return scales


def nibbles(codes: Blocks, width: int) -> Blocks:
    """Return the low halves of each ``width`` bytes and then their high halves, one code a byte."""
    import numpy as np

    source = codes.reshape(len(codes), -1, width)
    halves = np.empty((len(codes), source.shape[1], 2, width), np.uint8)
    np.bitwise_and(source, 15, out=halves[:, :, 0])
    np.right_shift(source, 4, out=halves[:, :, 1])
    return halves.reshape(len(codes), -1)


def look_up_nibbles(codes: Blocks, width: int, values: tuple[int, ...], out: npt.NDArray[Any]) -> None:
    """Fill ``out`` with the values that ``nibbles`` of these bytes stand for."""
    import numpy as np

    np.take(np.array(values, np.float32), nibbles(codes, width), out=out, mode="clip")


def _signed(codes: Blocks, zero: int) -> npt.NDArray[np.int8]:
    """Return codes less the code that stands for zero."""
    import numpy as np

    codes -= np.uint8(zero)
    return codes.view(np.int8)


def _five_bits(low: Blocks, high: Blocks) -> Blocks:
    """Return the codes of Q5: four bits in the halves of 16 bytes, and the fifth bits of 32 codes in 4 bytes."""
    import numpy as np

    bits = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    codes = nibbles(low, 16)
    bits <<= 4
    codes |= bits
    return codes


def decode_q4_0(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times code, of 18 bytes."""
    out[...] = _signed(nibbles(blocks[:, 2:], 16), 8)
    out *= half_floats(blocks, 0)


def decode_q4_1(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times code plus minimum, of 20 bytes."""
    out[...] = nibbles(blocks[:, 4:], 16)
    out *= half_floats(blocks, 0)
    out += half_floats(blocks, 2)


def decode_q5_0(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times code, of 22 bytes."""
    out[...] = _signed(_five_bits(blocks[:, 6:], blocks[:, 2:6]), 16)
    out *= half_floats(blocks, 0)


def decode_q5_1(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times code plus minimum, of 24 bytes."""
    out[...] = _five_bits(blocks[:, 8:], blocks[:, 4:8])
    out *= half_floats(blocks, 0)
    out += half_floats(blocks, 2)


def decode_q8_0(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times code, of 34 bytes."""
    import numpy as np

    out[...] = blocks[:, 2:].view(np.int8)
    out *= half_floats(blocks, 0)


def decode_q8_k(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times code, of 292 bytes: the scale is F32, and sums of codes follow the codes."""
    import numpy as np

    out[...] = blocks[:, 4:260].view(np.int8)
    out *= finite(np.ascontiguousarray(blocks[:, :4]).view("<f4"))


def decode_q1_0(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with the scale where a bit is 1, and with its negative elsewhere, of 18 bytes."""
    import numpy as np

    bits = np.unpackbits(np.ascontiguousarray(blocks[:, 2:]), axis=1, bitorder="little")
    bits <<= 1
    out[...] = _signed(bits, 1)
    out *= half_floats(blocks, 0)


def decode_iq4_nl(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times the value of the code, of 18 bytes."""
    look_up_nibbles(blocks[:, 2:], 16, IQ4_VALUES, out)
    out *= half_floats(blocks, 0)


def decode_mxfp4(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times E2M1 code, of 17 bytes: the scale is E8M0, a power of two."""
    import numpy as np

    exponents = blocks[:, :1].astype(np.uint32)
    # Half of 2 ** (exponent - 127): its bits are those of an F32 exponent, except for two subnormal numbers.
    bits = np.where(exponents < 2, np.uint32(1 << 21) << exponents, (exponents - np.uint32(1)) << np.uint32(23))
    look_up_nibbles(blocks[:, 1:], 16, _E2M1_VALUES, out)
    out *= bits.view(np.float32)


def decode_nvfp4(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times E2M1 code, of 36 bytes: an unsigned E4M3 scale for each 16 codes."""
    import numpy as np

    scales = np.take(_halves_of_e4m3(), blocks[:, :4])
    look_up_nibbles(blocks[:, 4:], 8, _E2M1_VALUES, out)
    groups = out.reshape(len(blocks), 4, 16)
    groups *= scales[:, :, None]


def _halves_of_e4m3() -> Values:
    """Return half of the number of each code of E4M3 without its sign; the code of NaN stands for 0."""
    import numpy as np

    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    numbers = np.where(exponents == 0, mantissas / 8 * 2.0**-6, (1 + mantissas / 8) * 2.0 ** (exponents - 7))
    numbers[0x7F] = 0
    return (numbers / 2).astype(np.float32)


def decode_tq1_0(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times -1, 0 or 1, of 54 bytes: a byte has five digits of base 3, the last four have four.

    A byte is a fraction of 256. The first digit is what reaches 256 after a multiplication by 3, and the rest has the
    next digits.
    """
    import numpy as np

    digits = np.empty((len(blocks), 256), np.uint8)
    at = 0
    for first, last, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        for power in _POWERS_OF_3[:count]:
            digits[:, at : at + last - first] = blocks[:, first:last] * np.uint8(power)
            at += last - first
    wide = digits.astype(np.uint16)
    wide *= 3
    wide >>= 8
    out[...] = _signed(wide.astype(np.uint8), 1)
    out *= half_floats(blocks, 52)


def decode_tq2_0(blocks: Blocks, out: Values) -> None:
    """Fill ``out`` with scale times -1, 0 or 1, of 66 bytes: two bits a code."""
    out[...] = _signed(pairs_of_bits(blocks[:, :64]), 1)
    out *= half_floats(blocks, 64)


def pairs_of_bits(codes: Blocks) -> Blocks:
    """Return the lowest two bits of each 32 bytes, then the next two of them, and so on, one code a byte."""
    import numpy as np

    source = codes.reshape(len(codes), -1, 32)
    pairs = np.empty((len(codes), source.shape[1], 4, 32), np.uint8)
    for number in range(4):
        np.right_shift(source, 2 * number, out=pairs[:, :, number])
    pairs &= 3
    return pairs.reshape(len(codes), -1)
