"""Statistics of numbers from their bytes: counts, extremes, moments and exponents of each piece, put together exactly.

Each piece gets its own mean and sum of squares in float64, and an exact sum combines the pieces in order. So a large
mean costs no accuracy, and the number of threads does not change the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

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
from ckptkit.values.exponents import count_bytes, count_exponents
from ckptkit.values.extremes import Extremes, extremes_of, merge_extremes
from ckptkit.values.moments import NO_MOMENTS, Moments, merge_moments, moments_of
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = ["StatsKernel", "StatsPart"]

_BLOCK: Final = 1 << 16  # numbers that are converted at once, to be counted by their exponents
# The exponent field of the smallest normal number of F16, as F32 counts it; in F32 itself it is 1.
_FIRST_NORMAL: Final = {"F16": 127 - 14}
_NOTHING: Final = Extremes()


class StatsPart(NamedTuple):
    """What is known of some numbers of a tensor; ``counts`` are by byte for dtypes of one byte, else by exponent."""

    extremes: Extremes
    moments: Moments
    counts: npt.NDArray[np.int64]


class StatsKernel:
    """All numbers of ``ValueStats``."""

    def parts(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> list[StatsPart]:
        """Return the statistics of each run."""
        import numpy as np

        if code in BYTE_CODES:
            numbers: _Array = np.frombuffer(data, np.uint8)
            ends = [*starts[1:], len(numbers)]
            counts = [count_bytes(numbers[start:end]) for start, end in zip(starts, ends, strict=True)]
            return [StatsPart(_NOTHING, NO_MOMENTS, found) for found in counts]
        # numpy is slow with F16. F32 has the same values.
        is_half = code == "F16"
        numbers = array_of(cast_bytes(data, code, "F32", workers), "F32") if is_half else array_of(data, code)
        if len(starts) == 1:
            counts = [_exponents(numbers, workers)]
            has_small = bool(counts[0][: _FIRST_NORMAL.get(code, 1)].any())
            extremes = extremes_of(data, code, workers, has_small=has_small)
        else:
            ends = [*starts[1:], len(numbers)]
            counts = [_exponents(numbers[start:end], workers) for start, end in zip(starts, ends, strict=True)]
            extremes = extremes_of(data, code, workers, starts)
        return [
            StatsPart(found, moments_of(numbers[start : start + found.count], found, workers), count)
            for start, found, count in zip(starts, extremes, counts, strict=True)
        ]

    def together(self, parts: list[StatsPart], code: str) -> ValueStats:
        """Return the statistics of a tensor."""
        if not parts:
            return ValueStats()
        counts = sum((part.counts for part in parts[1:]), parts[0].counts)
        if code in BYTE_CODES:
            pairs = pairs_of_codes(counts, code)
            extremes = counts_and_extremes(extremes_of_codes(pairs, code))
            return ValueStats(*extremes, moments_of_codes(pairs), histogram_of_codes(pairs))
        found = merge_extremes(part.extremes for part in parts)
        moments = merge_moments([part.moments for part in parts])
        bias = len(counts) // 2 - 1
        small = int(counts[0]) - found.zeros
        bins = {-bias: small} if small else {}
        present = (counts[1:-1].nonzero()[0] + 1).tolist()
        bins |= {index - bias: times for index, times in zip(present, counts[present].tolist(), strict=True)}
        return ValueStats(*counts_and_extremes(found), moments, bins)


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
