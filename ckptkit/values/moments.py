"""Mean, deviation and norms of numbers, in float64; those of several parts are put together exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.values.extremes import ExtremeColumns
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = [
    "NO_MOMENTS",
    "MomentColumns",
    "Moments",
    "dot",
    "exact_sum",
    "merge_moments",
    "moments_of",
    "moments_of_runs",
]

# The sum of squared distances from the mean is the sum of squares minus count * mean ** 2. If at least this share
# remains, the subtraction loses at most 5 of 53 bits, and no second pass over the distances is needed.
_MIN_SHARE_LEFT: Final = 1 / 32
_BLOCK: Final = 1 << 16  # numbers; a float64 copy of them stays in the cache
_ROW: Final = 1 << 12  # numbers; BLAS shares longer products among threads of its own, whose number changes the result


class Moments(NamedTuple):
    """Moments of ``finite`` numbers; ``squares`` is the sum of their squared distances from ``mean``."""

    finite: int
    mean: float
    squares: float
    l1: float


NO_MOMENTS: Final = Moments(0, 0.0, 0.0, 0.0)


def moments_of(numbers: _Array, finite: int, low: float, high: float, workers: Workers) -> Moments:
    """Return the moments of the ``finite`` numbers among ``numbers``, which are between ``low`` and ``high``."""
    import numpy as np

    if not finite:
        return NO_MOMENTS
    if low == high:
        return Moments(finite, float(low), 0.0, abs(float(low)) * finite)
    has_special = finite < len(numbers)
    has_one_sign = low >= 0 or high <= 0
    totals, powers, magnitudes = [], [], []
    with np.errstate(all="ignore"):
        for start, stop in pieces(len(numbers), _BLOCK):
            wide = _wide(numbers[start:stop], workers, has_special=has_special)
            totals.append(float(wide.sum()))
            powers.append(dot(wide, wide))
            if not has_one_sign:
                magnitudes.append(float(np.abs(wide, out=wide).sum()))
        total = exact_sum(totals)
        mean = total / finite
        if not math.isfinite(mean):  # the sum overflows float64, but the mean does not
            parts = (_wide(numbers[a:b], workers, has_special=has_special) for a, b in pieces(len(numbers), _BLOCK))
            mean = exact_sum([float((wide / finite).sum()) for wide in parts])
        power = exact_sum(powers)
        squares = power - finite * mean * mean
        if not squares > _MIN_SHARE_LEFT * power:
            apart = []
            for start, stop in pieces(len(numbers), _BLOCK):
                wide = _wide(numbers[start:stop], workers, has_special=False)
                np.subtract(wide, mean, out=wide)
                if has_special:
                    wide[~np.isfinite(numbers[start:stop])] = 0.0
                apart.append(dot(wide, wide))
            squares = exact_sum(apart)
    return Moments(finite, mean, squares, abs(total) if has_one_sign else exact_sum(magnitudes))


class MomentColumns(NamedTuple):
    """The moments of many runs of numbers: arrays with a number for each run."""

    finite: _Array
    mean: _Array
    squares: _Array
    l1: _Array

    def rows(self) -> list[Moments]:
        """Return the moments of each run."""
        return list(map(Moments, *(column.tolist() for column in self)))


def moments_of_runs(
    numbers: _Array, extremes: ExtremeColumns, starts: Sequence[int], run_of: _Array, workers: Workers
) -> MomentColumns:
    """Return the moments of each of many short runs; ``run_of`` has the position of the run of each number.

    They differ from those of ``moments_of`` in the last digits: the distances from the mean are always summed.
    """
    import numpy as np

    finite = extremes.finite
    is_special = None
    with np.errstate(all="ignore"):
        wide = numbers.astype(np.float64)
        if int(finite.sum()) < len(numbers):
            is_special = ~np.isfinite(wide)
            wide[is_special] = 0.0
        mean = np.add.reduceat(wide, starts) / np.maximum(finite, 1)
        apart = wide - mean[run_of]
        if is_special is not None:
            apart[is_special] = 0.0
        squares = np.add.reduceat(apart * apart, starts)
        l1 = np.add.reduceat(np.abs(wide), starts)
        is_constant = extremes.low == extremes.high
        if is_constant.any():
            low = extremes.low.astype(np.float64)
            mean, squares = np.where(is_constant, low, mean), np.where(is_constant, 0.0, squares)
            l1 = np.where(is_constant, np.abs(low) * finite, l1)
    ends = [*starts[1:], len(numbers)]
    for run in (~np.isfinite(mean)).nonzero()[0].tolist():
        bounds = float(extremes.low[run]), float(extremes.high[run])
        found = moments_of(numbers[starts[run] : ends[run]], int(finite[run]), *bounds, workers)
        mean[run], squares[run], l1[run] = found[1:]
    return MomentColumns(finite, mean, squares, l1)


def _wide(numbers: _Array, workers: Workers, *, has_special: bool) -> _Array:
    """Return the numbers in float64, with zeros in place of NaN and infinities, which change no sum."""
    import numpy as np

    wide: _Array = workers.buffer("wide", np.float64, len(numbers))
    np.copyto(wide, numbers, casting="unsafe")
    if has_special:
        np.nan_to_num(wide, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return wide


def dot(a: _Array, b: _Array) -> float:
    """Return the dot product of two flat arrays of float64, which is the same with any number of threads."""
    import numpy as np

    whole = len(a) // _ROW * _ROW
    rows, columns = a[:whole].reshape(-1, 1, _ROW), b[:whole].reshape(-1, _ROW, 1)
    return float(np.matmul(rows, columns).sum() + np.dot(a[whole:], b[whole:]))


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together; the order of the parts does not matter."""
    parts = [part for part in parts if part.finite]
    if len(parts) < 2:
        return parts[0] if parts else NO_MOMENTS
    finite = sum(part.finite for part in parts)
    mean = exact_sum(part.finite * part.mean for part in parts) / finite
    if not math.isfinite(mean):  # the sum overflows float64, but the mean does not
        mean = exact_sum(part.finite / finite * part.mean for part in parts)
    offsets = [(part.finite, part.mean - mean) for part in parts]
    between = (count * offset * offset for count, offset in offsets)
    squares = exact_sum([*(part.squares for part in parts), *between])
    return Moments(finite, mean, squares, exact_sum(part.l1 for part in parts))


def exact_sum(numbers: Iterable[float]) -> float:
    """Return the sum with a single rounding; infinite if it overflows float64."""
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # ValueError: infinities of both signs
        return math.inf
