"""Counts and extremes of numbers: NaN, infinities, zeros, subnormal numbers, the smallest and the largest.

The largest of the bits, as signed and as unsigned integers, are the largest positive and the most negative value of
every IEEE dtype, and show NaN and infinities. So nothing is converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ckptkit.values.arrays import array_of, bits_of
from ckptkit.values.float_formats import FLOAT_FORMATS, FloatFormat
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = ["INTEGERS", "Extremes", "extremes_of", "merge_extremes"]


@dataclass(frozen=True)
class Extremes:
    """Counts and extremes of the values of one tensor, or of several together.

    An element of a complex tensor counts as two numbers: its real and its imaginary part. ``min``, ``max`` and
    ``abs_max`` use only the finite numbers. They are None without finite numbers.

    Attributes:
        count: The number of values.
        nan: The number of NaN.
        posinf: The number of positive infinities.
        neginf: The number of negative infinities.
        zeros: The number of zeros of either sign.
        subnormal: The number of values that are not zero and smaller than the smallest normal number of the dtype.
        min: The smallest finite number; exact for integers.
        max: The largest finite number; exact for integers.
    """

    count: int = 0
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0
    subnormal: int = 0
    min: float | None = None
    max: float | None = None

    @property
    def finite(self) -> int:
        """The number of values that are neither NaN nor infinite."""
        return self.count - self.nan - self.posinf - self.neginf

    @property
    def abs_max(self) -> float | None:
        """The largest magnitude of the finite numbers."""
        return None if self.min is None or self.max is None else max(abs(self.min), abs(self.max))

    @property
    def constant(self) -> float | None:
        """The value of every element if all values are finite and equal, else None."""
        return self.min if self.finite == self.count and self.min == self.max else None

    @property
    def zero_share(self) -> float:
        """The share of zeros among the values, between 0 and 1; 0 if there are no values."""
        return self.zeros / self.count if self.count else 0.0


def merge_extremes(parts: Iterable[Extremes]) -> Extremes:
    """Return the counts and extremes of all parts together."""
    parts = list(parts)
    return Extremes(
        sum(part.count for part in parts),
        sum(part.nan for part in parts),
        sum(part.posinf for part in parts),
        sum(part.neginf for part in parts),
        sum(part.zeros for part in parts),
        sum(part.subnormal for part in parts),
        min((part.min for part in parts if part.min is not None), default=None),
        max((part.max for part in parts if part.max is not None), default=None),
    )


INTEGERS: Final = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


def extremes_of(
    data: bytes | bytearray | memoryview,
    code: str,
    workers: Workers,
    starts: Sequence[int] = (0,),
    *,
    has_small: bool = True,
) -> list[Extremes]:
    """Return the counts and extremes of each run of numbers in ``data``.

    A run begins at each number of ``starts``, and ends where the next begins; none is empty. ``code`` is one of
    ``FLOAT_FORMATS`` or ``INTEGERS``. ``has_small`` says whether floats can be zeros or subnormal.
    """
    if code in INTEGERS:
        return _of_integers(array_of(data, "U8" if code == "BOOL" else code), starts, is_bool=code == "BOOL")
    return _of_floats(bits_of(data, code), code, workers, starts, has_small=has_small)


def _of_integers(numbers: _Array, starts: Sequence[int], *, is_bool: bool) -> list[Extremes]:
    import numpy as np

    if is_bool:  # torch takes every byte but 0 for True
        numbers = (numbers != 0).view(np.uint8)
    low, high = np.minimum.reduceat(numbers, starts).tolist(), np.maximum.reduceat(numbers, starts).tolist()
    counts = _lengths(len(numbers), starts)
    zeros = _count(numbers == 0, starts) if any(a <= 0 <= b for a, b in zip(low, high, strict=True)) else [0] * len(low)
    return [Extremes(n, 0, 0, 0, z, 0, a, b) for n, z, a, b in zip(counts, zeros, low, high, strict=True)]


def _of_floats(bits: _Array, code: str, workers: Workers, starts: Sequence[int], *, has_small: bool) -> list[Extremes]:
    import numpy as np

    layout = FLOAT_FORMATS[code]
    sign = layout.sign
    signed = bits.view(f"i{bits.itemsize}")
    top = np.maximum.reduceat(signed, starts)  # negative if all numbers have the sign bit
    bottom = np.maximum.reduceat(bits, starts)  # below ``sign`` if no number has the sign bit
    low, high, has_nan = bottom, top.view(bits.dtype), False
    counts = _lengths(len(bits), starts)
    zeros = subnormal = [0] * len(starts)
    if has_small or (top < 0).any() or (bottom < sign).any():
        # Of the numbers of each sign, those with the smallest magnitudes; those of the other sign if there are none.
        least = np.minimum.reduceat(bits, starts)
        most = np.minimum.reduceat(signed, starts).view(bits.dtype)
        low, high = np.where(bottom < sign, least, bottom), np.where(top < 0, least, high)
        has_nan = not layout.has_negative_zero and bool((most == sign).any())
        if (np.minimum(least & (sign - 1), most & (sign - 1)) >> layout.mantissa == 0).any():
            zeros, subnormal = _count_small(bits, layout, workers, starts)
    if has_nan or (top > layout.largest).any() or (bottom > sign + layout.largest).any():
        return [
            _of_run(bits[start : start + count], code, zero, small)
            for start, count, zero, small in zip(starts, counts, zeros, subnormal, strict=True)
        ]
    return [
        Extremes(count, 0, 0, 0, zero, small, smallest, largest)
        for count, zero, small, smallest, largest in zip(
            counts, zeros, subnormal, _floats(low, code), _floats(high, code), strict=True
        )
    ]


def _count_small(
    bits: _Array, layout: FloatFormat, workers: Workers, starts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return how many numbers of each run are zeros, and how many are subnormal."""
    import numpy as np

    nothing = [0] * len(starts)
    twice = np.add(bits, bits, out=workers.buffer("twice", bits.dtype, len(bits)))  # without the sign
    sizes = twice if layout.has_negative_zero else bits
    zeros = [len(bits) - int(np.count_nonzero(sizes))] if len(starts) == 1 else _count(sizes == 0, starts)
    below = np.subtract(twice, bits.dtype.type(2), out=twice)  # the largest of all integers for a zero
    end = (2 << layout.mantissa) - 2
    return zeros, _count(below < end, starts) if below.min() < end else nothing


def _of_run(bits: _Array, code: str, zeros: int, subnormal: int) -> Extremes:
    """Return the extremes of one run, which may have NaN and infinities."""
    import numpy as np

    layout = FLOAT_FORMATS[code]
    sign = layout.sign
    magnitude = bits & bits.dtype.type(sign - 1)
    is_negative = bits >= sign
    is_nan = magnitude > layout.nan_above if layout.has_negative_zero else bits == sign
    nan = int(np.count_nonzero(is_nan))
    posinf = neginf = 0
    if layout.has_infinity:
        posinf = int(np.count_nonzero(bits == layout.nan_above))
        neginf = int(np.count_nonzero(bits == sign + layout.nan_above))
    is_finite = ~is_nan & (magnitude <= layout.largest)
    # The bits in the order of the numbers: those of negative numbers run backwards.
    ordered = np.where(is_negative, ~bits, bits | bits.dtype.type(sign))
    low = high = None
    if nan + posinf + neginf < len(bits):
        ends = np.array([
            ordered.min(where=is_finite, initial=np.iinfo(bits.dtype).max),
            ordered.max(where=is_finite, initial=0),
        ], bits.dtype)  # fmt: skip
        low, high = _floats(np.where(ends >= sign, ends ^ bits.dtype.type(sign), ~ends), code)
    return Extremes(len(bits), nan, posinf, neginf, zeros, subnormal, low, high)


def _floats(bits: _Array, code: str) -> list[float]:
    """Return the numbers with these bits; a zero has no sign."""
    numbers: list[float] = (array_of(bits.data, code).astype("f8") + 0.0).tolist()
    return numbers


def _lengths(count: int, starts: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def _count(mask: _Array, starts: Sequence[int]) -> list[int]:
    """Return how many of the truth values of each run are true."""
    import numpy as np

    if len(starts) == 1:
        return [int(np.count_nonzero(mask))]
    counts: list[int] = np.add.reduceat(mask, starts, dtype=np.int64).tolist()
    return counts
