"""Counts and extremes of numbers: NaN, infinities, zeros, subnormal numbers, the smallest and the largest.

The largest of the bits, as signed and as unsigned integers, are the largest positive and the most negative value of
every IEEE dtype, and show NaN and infinities. So nothing is converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.core.frozen import slot_setters
from ckptkit.values.arrays import array_of, bits_of
from ckptkit.values.float_formats import FLOAT_FORMATS, FloatFormat
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = ["INTEGERS", "ExtremeColumns", "Extremes", "extremes_of", "lengths_of", "merge_extremes"]


@dataclass(frozen=True, slots=True, init=False)
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

    def __init__(  # noqa: PLR0917 - the fields of the dataclass, in its order
        self,
        count: int = 0,
        nan: int = 0,
        posinf: int = 0,
        neginf: int = 0,
        zeros: int = 0,
        subnormal: int = 0,
        min: float | None = None,  # noqa: A002 - the name of the field
        max: float | None = None,  # noqa: A002
    ) -> None:
        """Set all fields through their slots, since a check has one object for each of many small tensors."""
        _set_count(self, count)
        _set_nan(self, nan)
        _set_posinf(self, posinf)
        _set_neginf(self, neginf)
        _set_zeros(self, zeros)
        _set_subnormal(self, subnormal)
        _set_min(self, min)
        _set_max(self, max)

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
        return self.min if self.min == self.max and self.finite == self.count else None

    @property
    def zero_share(self) -> float:
        """The share of zeros among the values, between 0 and 1; 0 if there are no values."""
        return self.zeros / self.count if self.count else 0.0


_set_count, _set_nan, _set_posinf, _set_neginf, _set_zeros, _set_subnormal, _set_min, _set_max = slot_setters(Extremes)


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


class ExtremeColumns(NamedTuple):
    """The counts and extremes of many runs of numbers: arrays with a number for each run.

    ``numbers`` counts all of them. ``low`` and ``high`` are float64, with NaN for a run without finite numbers, or have
    the integer dtype of the runs.
    """

    numbers: _Array
    nan: _Array
    posinf: _Array
    neginf: _Array
    zeros: _Array
    subnormal: _Array
    low: _Array
    high: _Array

    @classmethod
    def of(cls, rows: Sequence[Extremes]) -> ExtremeColumns:
        """Return the columns of counts and extremes, which are float64."""
        import numpy as np

        counts = [[one.count, one.nan, one.posinf, one.neginf, one.zeros, one.subnormal] for one in rows]
        ends = [(math.nan, math.nan) if one.min is None or one.max is None else (one.min, one.max) for one in rows]
        whole, floats = np.array(counts, np.int64).reshape(-1, 6), np.array(ends, np.float64).reshape(-1, 2)
        return cls._make([*whole.T.copy(), *floats.T.copy()])

    @property
    def finite(self) -> _Array:
        """How many numbers of each run are neither NaN nor infinite."""
        found: _Array = self.numbers - self.nan - self.posinf - self.neginf
        return found

    def rows(self) -> list[Extremes]:
        """Return the counts and extremes of each run."""
        low, high = self.low.tolist(), self.high.tolist()
        if self.low.dtype.kind == "f":
            for run in (self.low != self.low).nonzero()[0].tolist():
                low[run] = high[run] = None
        return list(map(Extremes, *(column.tolist() for column in self[:6]), low, high))


def extremes_of(
    data: bytes | bytearray | memoryview,
    code: str,
    workers: Workers,
    starts: Sequence[int] = (0,),
    *,
    has_small: bool = True,
) -> ExtremeColumns:
    """Return the counts and extremes of each run of numbers in ``data``.

    A run begins at each number of ``starts``, and ends where the next begins; none is empty. ``code`` is one of
    ``FLOAT_FORMATS`` or ``INTEGERS``. ``has_small`` says whether floats can be zeros or subnormal.
    """
    if code in INTEGERS:
        return _of_integers(array_of(data, "U8" if code == "BOOL" else code), starts, is_bool=code == "BOOL")
    return _of_floats(bits_of(data, code), code, workers, starts, has_small=has_small)


def _of_integers(numbers: _Array, starts: Sequence[int], *, is_bool: bool) -> ExtremeColumns:
    import numpy as np

    if is_bool:  # torch takes every byte but 0 for True
        numbers = (numbers != 0).view(np.uint8)
    low, high = np.minimum.reduceat(numbers, starts), np.maximum.reduceat(numbers, starts)
    counts = lengths_of(len(numbers), starts)
    nothing = np.zeros_like(counts)
    zeros = _count(numbers == 0, starts) if ((low <= 0) & (high >= 0)).any() else nothing
    return ExtremeColumns(counts, nothing, nothing, nothing, zeros, nothing, low, high)


def _of_floats(bits: _Array, code: str, workers: Workers, starts: Sequence[int], *, has_small: bool) -> ExtremeColumns:
    import numpy as np

    layout = FLOAT_FORMATS[code]
    sign = layout.sign
    signed = bits.view(f"i{bits.itemsize}")
    top = np.maximum.reduceat(signed, starts)  # negative if all numbers have the sign bit
    bottom = np.maximum.reduceat(bits, starts)  # below ``sign`` if no number has the sign bit
    low, high = bottom, top.view(bits.dtype)
    is_special = (top > layout.largest) | (bottom > sign + layout.largest)
    counts = lengths_of(len(bits), starts)
    zeros = subnormal = nothing = np.zeros_like(counts)
    if has_small or (top < 0).any() or (bottom < sign).any():
        # Of the numbers of each sign, those with the smallest magnitudes; those of the other sign if there are none.
        least = np.minimum.reduceat(bits, starts)
        most = np.minimum.reduceat(signed, starts).view(bits.dtype)
        low, high = np.where(bottom < sign, least, bottom), np.where(top < 0, least, high)
        if not layout.has_negative_zero:
            is_special |= most == sign
        if (np.minimum(least & (sign - 1), most & (sign - 1)) >> layout.mantissa == 0).any():
            zeros, subnormal = _count_small(bits, layout, workers, starts)
    has_special = bool(is_special.any())
    if has_special:
        low, high = np.where(is_special, 0, low).astype(bits.dtype), np.where(is_special, 0, high).astype(bits.dtype)
    found = ExtremeColumns(counts, nothing, nothing, nothing, zeros, subnormal, _floats(low, code), _floats(high, code))
    if not has_special:
        return found
    found = found._replace(nan=nothing.copy(), posinf=nothing.copy(), neginf=nothing.copy())
    ends = [*starts[1:], len(bits)]
    for run in is_special.nonzero()[0].tolist():
        nan, posinf, neginf, smallest, largest = _of_run(bits[starts[run] : ends[run]], code)
        found.nan[run], found.posinf[run], found.neginf[run] = nan, posinf, neginf
        found.low[run], found.high[run] = smallest, largest
    return found


def _count_small(bits: _Array, layout: FloatFormat, workers: Workers, starts: Sequence[int]) -> tuple[_Array, _Array]:
    """Return how many numbers of each run are zeros, and how many are subnormal."""
    import numpy as np

    nothing = np.zeros(len(starts), np.int64)
    twice = np.add(bits, bits, out=workers.buffer("twice", bits.dtype, len(bits)))  # without the sign
    sizes = twice if layout.has_negative_zero else bits
    zeros = np.array([len(bits) - np.count_nonzero(sizes)]) if len(starts) == 1 else _count(sizes == 0, starts)
    below = np.subtract(twice, bits.dtype.type(2), out=twice)  # the largest of all integers for a zero
    end = (2 << layout.mantissa) - 2
    return zeros, _count(below < end, starts) if below.min() < end else nothing


def _of_run(bits: _Array, code: str) -> tuple[int, int, int, float, float]:
    """Return the numbers of NaN and of infinities of a run, and its extremes; these are NaN without finite numbers."""
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
    if nan + posinf + neginf == len(bits):
        return nan, posinf, neginf, math.nan, math.nan
    is_finite = ~is_nan & (magnitude <= layout.largest)
    # The bits in the order of the numbers: those of negative numbers run backwards.
    ordered = np.where(is_negative, ~bits, bits | bits.dtype.type(sign))
    ends = np.array([
        ordered.min(where=is_finite, initial=np.iinfo(bits.dtype).max),
        ordered.max(where=is_finite, initial=0),
    ], bits.dtype)  # fmt: skip
    low, high = _floats(np.where(ends >= sign, ends ^ bits.dtype.type(sign), ~ends), code).tolist()
    return nan, posinf, neginf, low, high


def _floats(bits: _Array, code: str) -> _Array:
    """Return the numbers with these bits; a zero has no sign."""
    numbers: _Array = array_of(bits.data, code).astype("f8") + 0.0
    return numbers


def lengths_of(count: int, starts: Sequence[int]) -> _Array:
    """Return the number of numbers in each run."""
    import numpy as np

    return np.diff(np.array([*starts, count]))


def _count(mask: _Array, starts: Sequence[int]) -> _Array:
    """Return how many of the truth values of each run are true."""
    import numpy as np

    if len(starts) == 1:
        return np.array([np.count_nonzero(mask)])
    counts: _Array = np.add.reduceat(mask, starts, dtype=np.int64)
    return counts
