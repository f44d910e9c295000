"""Statistics of numbers from their bytes: counts, extremes, moments and exponents of each piece, put together exactly.

Each piece gets its own mean and sum of squares in float64, and an exact sum combines the pieces in order. So a large
mean costs no accuracy, and the number of threads does not change the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.statistics.columns import Columns
from ckptkit.statistics.value_stats import ValueStats, counts_and_extremes
from ckptkit.values.arrays import array_of
from ckptkit.values.byte_codes import (
    BYTE_CODES,
    extremes_of_codes,
    histogram_of_codes,
    moments_of_codes,
    pairs_of_codes,
)
from ckptkit.values.casting import cast_bytes
from ckptkit.values.exponents import count_bytes, count_exponents, present
from ckptkit.values.extremes import INTEGERS, ExtremeColumns, Extremes, extremes_of, merge_extremes
from ckptkit.values.kernels import SHORT
from ckptkit.values.moments import NO_MOMENTS, MomentColumns, Moments, merge_moments, moments_of, moments_of_runs
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = ["StatsKernel", "StatsPart"]

_BLOCK: Final = 1 << 16  # numbers that are converted at once, to be counted by their exponents
# The exponent field of the smallest normal number of F16, as F32 counts it; in F32 itself it is 1.
_FIRST_NORMAL: Final = {"F16": 127 - 14}
_LIKE_F32: Final = frozenset({"F16", "BF16", "F32"})  # numbers that F32 holds exactly, with their exponents there
_NOTHING: Final = Extremes()


class StatsPart(NamedTuple):
    """What is known of some numbers of a tensor; ``counts`` are by byte for dtypes of one byte, else by exponent."""

    extremes: Extremes
    moments: Moments
    counts: Mapping[int, int]


class StatsKernel:
    """All numbers of ``ValueStats``."""

    def parts(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> list[StatsPart]:
        """Return the statistics of each run."""
        if code in BYTE_CODES:
            import numpy as np

            codes: _Array = np.frombuffer(data, np.uint8)
            counts = (count_bytes(codes[start:end], workers) for start, end in _runs(starts, len(codes)))
            return [StatsPart(_NOTHING, NO_MOMENTS, present(found)) for found in counts]
        numbers = _numbers(data, code, workers)
        runs = _runs(starts, len(numbers))
        # How a run is computed depends on its length alone: its neighbours do not change its sums.
        if max(end - start for start, end in runs) <= SHORT:
            return _of_short_runs(numbers, extremes_of(data, code, workers, starts), starts, workers).rows()
        width = len(data) // len(numbers)
        found = []
        for start, end in runs:
            part = data[start * width : end * width]
            if end - start <= SHORT:
                found += _of_short_runs(numbers[start:end], extremes_of(part, code, workers), (0,), workers).rows()
            else:
                found.append(_of_long_run(part, numbers[start:end], code, workers))
        return found

    def columns(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> Columns:
        """Return the statistics of whole tensors of at most ``SHORT`` numbers, as ``together`` has them."""
        import numpy as np

        if code in BYTE_CODES:
            return Columns.of([self.together([part], code) for part in self.parts(data, code, workers, starts)])
        extremes, moments, bounds, exponents, times = _of_short_runs(
            _numbers(data, code, workers), extremes_of(data, code, workers, starts), starts, workers
        )
        whole = {}
        if code in INTEGERS:
            whole = dict(enumerate(zip(extremes.low.tolist(), extremes.high.tolist(), strict=True)))
        bias = _bias(code)
        times = times.copy()
        row_of = np.repeat(np.arange(len(starts)), np.diff(bounds))
        is_small = exponents == 0
        times[is_small] -= extremes.zeros[row_of[is_small]]
        is_bin = (times > 0) & (exponents <= 2 * bias)
        bounds = np.concatenate(([0], np.cumsum(is_bin)))[bounds]
        ends = extremes.low.astype(np.float64), extremes.high.astype(np.float64)
        bins = (exponents[is_bin] - bias).astype(np.int16), times[is_bin]
        return Columns(extremes._replace(low=ends[0], high=ends[1]), moments, bounds, *bins, whole)

    def together(self, parts: list[StatsPart], code: str) -> ValueStats:
        """Return the statistics of a tensor."""
        counts: Mapping[int, int] = parts[0].counts if len(parts) == 1 else _sum_of_counts(parts)
        if code in BYTE_CODES:
            pairs = pairs_of_codes(counts, code)
            extremes = counts_and_extremes(extremes_of_codes(pairs, code))
            return ValueStats(*extremes, moments_of_codes(pairs), histogram_of_codes(pairs))
        found = parts[0].extremes if len(parts) == 1 else merge_extremes(part.extremes for part in parts)
        moments = parts[0].moments if len(parts) == 1 else merge_moments([part.moments for part in parts])
        bias = _bias(code)
        small = counts.get(0, 0) - found.zeros
        bins = {-bias: small} if small else {}
        bins.update([(index - bias, times) for index, times in counts.items() if 0 < index <= 2 * bias])
        return ValueStats(*counts_and_extremes(found), moments, bins)


def _numbers(data: memoryview, code: str, workers: Workers) -> _Array:
    """Return the numbers; those of F16 as F32, which has the same values, because numpy is slow with F16."""
    return array_of(cast_bytes(data, code, "F32", workers), "F32") if code == "F16" else array_of(data, code)


def _bias(code: str) -> int:
    return 127 if code in _LIKE_F32 else 1023


def _runs(starts: Sequence[int], count: int) -> list[tuple[int, int]]:
    return list(zip(starts, [*starts[1:], count], strict=True))


def _sum_of_counts(parts: Sequence[StatsPart]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part.counts)
    return dict(sorted(total.items()))


def _of_long_run(data: memoryview, numbers: _Array, code: str, workers: Workers) -> StatsPart:
    """Return the statistics of ``numbers``, which have the values of ``data``."""
    counts = _exponents(numbers, workers)
    has_small = bool(counts[: _FIRST_NORMAL.get(code, 1)].any())
    (extremes,) = extremes_of(data, code, workers, has_small=has_small).rows()
    low, high = extremes.min or 0, extremes.max or 0
    return StatsPart(extremes, moments_of(numbers, extremes.finite, low, high, workers), present(counts))


class _ShortRuns(NamedTuple):
    """The statistics of many runs; the exponents of a run are from its ``bounds`` to the next."""

    extremes: ExtremeColumns
    moments: MomentColumns
    bounds: _Array
    exponents: _Array
    times: _Array

    def rows(self) -> list[StatsPart]:
        """Return the statistics of each run."""
        exponents, times, bounds = self.exponents.tolist(), self.times.tolist(), self.bounds.tolist()
        return [
            StatsPart(extremes, moments, dict(zip(exponents[first:last], times[first:last], strict=True)))
            for extremes, moments, (first, last) in zip(
                self.extremes.rows(), self.moments.rows(), pairwise(bounds), strict=True
            )
        ]


def _of_short_runs(numbers: _Array, extremes: ExtremeColumns, starts: Sequence[int], workers: Workers) -> _ShortRuns:
    """Return the statistics of all runs at once, since a call of numpy for each would cost more than the arithmetic."""
    import numpy as np

    runs = len(starts)
    run_of = np.repeat(np.arange(runs), extremes.numbers)
    as_integers = numbers.dtype.kind in "iu"
    exact = numbers.astype(np.float64) if as_integers else numbers
    mantissa, fields = (7, 256) if numbers.itemsize == 2 and not as_integers else (23, 256)
    if exact.itemsize == 8:
        mantissa, fields = 52, 2048
    exponents = exact.view(f"u{exact.itemsize}") >> mantissa
    index = run_of * fields + (exponents & (fields - 1)).astype(np.int64)
    counts = np.bincount(index, minlength=runs * fields)
    found = counts.nonzero()[0]
    bounds = np.searchsorted(found, np.arange(runs + 1) * fields)
    moments = moments_of_runs(numbers, extremes, starts, run_of, workers)
    return _ShortRuns(extremes, moments, bounds, found & (fields - 1), counts[found])


def _exponents(numbers: _Array, workers: Workers) -> _Array:
    """Return how many numbers have each exponent; integers are rounded to F64."""
    import numpy as np

    if numbers.dtype.kind not in "iu":
        return count_exponents(numbers.view(f"u{numbers.itemsize}"), workers)
    total = np.zeros(2048, np.int64)
    for start, stop in pieces(len(numbers), _BLOCK):
        block = workers.buffer("exponents", np.float64, stop - start)
        np.copyto(block, numbers[start:stop], casting="unsafe")
        total += count_exponents(block.view(np.uint64), workers)
    return total
