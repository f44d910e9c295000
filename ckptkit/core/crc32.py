"""Join the CRC-32 of adjacent ranges of bytes, which threads computed side by side."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

__all__ = ["joined_crc32"]

# The polynomial of zlib and zip, with the coefficient of x**0 in the highest bit, as in all numbers of this file.
_POLYNOMIAL: Final = 0xEDB88320
_ONE: Final = 1 << 31


def joined_crc32(first: int, second: int, nbytes: int) -> int:
    """Return the CRC-32 of two ranges of bytes, one after the other, given that of each and the size of the second.

    A CRC is the remainder of a polynomial. The bytes that follow multiply the first remainder by a power of x.
    """
    return _product(first, _power_of_x(8 * nbytes)) ^ second if first else second


@lru_cache(maxsize=64)
def _power_of_x(exponent: int) -> int:
    """Return ``x ** exponent`` modulo the polynomial."""
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result


def _product(left: int, right: int) -> int:
    """Return the product of two polynomials modulo the polynomial."""
    result = 0
    while left:
        if left & _ONE:
            result ^= right
        left = left << 1 & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return result
