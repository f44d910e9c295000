"""Mean, deviation and norms of numbers, in float64; those of several parts are put together exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.values.extremes import Extremes
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = ["NO_MOMENTS", "Moments", "exact_sum", "merge_moments", "moments_of", "moments_of_runs"]

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


def moments_of(numbers: _Array, extremes: Extremes, workers: Workers) -> Moments:
    """Return the moments of the finite numbers among ``numbers``, whose extremes are known."""
    import numpy as np

    finite, low, high = extremes.finite, extremes.min, extremes.max
    if low is None or high is None:
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
            powers.append(_power(wide))
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
                apart.append(_power(wide))
            squares = exact_sum(apart)
    return Moments(finite, mean, squares, abs(total) if has_one_sign else exact_sum(magnitudes))


def moments_of_runs(
    numbers: _Array, extremes: Sequence[Extremes], starts: Sequence[int], run_of: _Array, workers: Workers
) -> list[Moments]:
    """Return the moments of each of many short runs; ``run_of`` has the position of the run of each number.

    They differ from those of ``moments_of`` in the last digits: the distances from the mean are always summed.
    """
    import numpy as np

    finite = np.array([found.finite for found in extremes])
    is_special = None
    with np.errstate(all="ignore"):
        wide = numbers.astype(np.float64)
        if int(finite.sum()) < len(numbers):
            is_special = ~np.isfinite(wide)
            wide[is_special] = 0.0
        means = np.add.reduceat(wide, starts) / np.maximum(finite, 1)
        apart = wide - means[run_of]
        if is_special is not None:
            apart[is_special] = 0.0
        squares = np.add.reduceat(apart * apart, starts).tolist()
        norms = np.add.reduceat(np.abs(wide), starts).tolist()
    found = []
    ends = [*starts[1:], len(numbers)]
    for run, (one, mean) in enumerate(zip(extremes, means.tolist(), strict=True)):
        if one.min == one.max or not math.isfinite(mean):
            found.append(moments_of(numbers[starts[run] : ends[run]], one, workers))
        else:
            found.append(Moments(one.finite, mean, squares[run], norms[run]))
    return found


def _wide(numbers: _Array, workers: Workers, *, has_special: bool) -> _Array:
    """Return the numbers in float64, with zeros in place of NaN and infinities, which change no sum."""
    import numpy as np

    wide: _Array = workers.buffer("wide", np.float64, len(numbers))
    np.copyto(wide, numbers, casting="unsafe")
    if has_special:
        np.nan_to_num(wide, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    return wide


def _power(wide: _Array) -> float:
    """Return the sum of squares."""
    import numpy as np

    whole = len(wide) // _ROW * _ROW
    rows = wide[:whole].reshape(-1, _ROW)
    sums = np.matmul(rows[:, None, :], rows[:, :, None]).sum()
    rest = wide[whole:]
    return float(sums + np.dot(rest, rest))


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
