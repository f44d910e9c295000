"""The bits of each floating-point dtype with a sign: where its exponent begins, and which bits are NaN and infinite."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["FLOAT_FORMATS", "FloatFormat"]


class FloatFormat(NamedTuple):
    """The bits of a floating-point dtype: a sign, an exponent and a mantissa.

    Attributes:
        mantissa: The number of bits of the mantissa.
        largest: The bits of the largest finite number.
        has_infinity: Whether the bits of infinity follow those of the largest finite number.
        has_negative_zero: Else these bits are the only NaN. Otherwise the bits of NaN follow all others.
    """

    mantissa: int
    largest: int
    has_infinity: bool = True
    has_negative_zero: bool = True

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << self.largest.bit_length()

    @property
    def bias(self) -> int:
        """What is added to the exponent of a number of these bits; larger by one without a negative zero."""
        return (self.sign >> self.mantissa + 1) - self.has_negative_zero

    @property
    def nan_above(self) -> int:
        """The bits of every NaN, without the sign, are above these; only if there is a negative zero."""
        return self.largest + self.has_infinity

    @property
    def size_bits(self) -> int:
        """The bits that show whether a number is zero, and whether it is finite."""
        return self.sign - 1 if self.has_negative_zero else 2 * self.sign - 1


FLOAT_FORMATS: Final = {
    "F64": FloatFormat(52, 0x7FEF_FFFF_FFFF_FFFF),
    "F32": FloatFormat(23, 0x7F7F_FFFF),
    "F16": FloatFormat(10, 0x7BFF),
    "BF16": FloatFormat(7, 0x7F7F),
    "F8_E5M2": FloatFormat(2, 0x7B),
    "F8_E4M3": FloatFormat(3, 0x7E, has_infinity=False),
    "F8_E5M2FNUZ": FloatFormat(2, 0x7F, has_infinity=False, has_negative_zero=False),
    "F8_E4M3FNUZ": FloatFormat(3, 0x7F, has_infinity=False, has_negative_zero=False),
}
