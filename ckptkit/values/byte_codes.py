"""Numbers of at most 8 bits: how often each code occurs, and the value of each code, say everything about them."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Final

from ckptkit.values.arrays import array_of, float4_values
from ckptkit.values.extremes import Extremes
from ckptkit.values.moments import Moments, exact_sum

__all__ = ["BYTE_CODES", "extremes_of_codes", "histogram_of_codes", "moments_of_codes", "pairs_of_codes"]

BYTE_CODES: Final = frozenset({
    "BOOL", "U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"
})  # fmt: skip
# The exponent of the smallest normal number of each dtype that has subnormal numbers.
_MIN_EXPONENT: Final = {"F4": 0, "F8_E4M3": -6, "F8_E5M2": -14, "F8_E4M3FNUZ": -7, "F8_E5M2FNUZ": -15}


def pairs_of_codes(counts: Mapping[int, int], code: str) -> list[tuple[float, int]]:
    """Return each value that occurs, and how often, given how often each byte occurs. F4 has two codes in a byte."""
    values = _values(code)
    if code == "F4":
        halves: Counter[int] = Counter()
        for byte, times in counts.items():
            halves[byte & 15] += times
            halves[byte >> 4] += times
        counts = halves
    return [(values[byte], counts[byte]) for byte in sorted(counts)]


@functools.cache
def _values(code: str) -> list[float]:
    import numpy as np

    if code == "BOOL":  # torch takes every byte but 0 for True
        return [0.0] + [1.0] * 255
    codes = np.arange(256, dtype=np.uint8)
    if code == "F4":
        of_codes: list[float] = float4_values().tolist()
        return of_codes
    values = array_of(codes.data, code)
    numbers: list[float] = (values if code in ("U8", "I8") else values.astype(np.float64)).tolist()
    return numbers


def extremes_of_codes(pairs: list[tuple[float, int]], code: str) -> Extremes:
    """Return the counts and extremes, given each value and how often it occurs."""
    smallest = 2.0 ** _MIN_EXPONENT[code] if code in _MIN_EXPONENT else 0.0
    finite = [value for value, _ in pairs if math.isfinite(value)]
    return Extremes(
        sum(times for _, times in pairs),
        sum(times for value, times in pairs if math.isnan(value)),
        sum(times for value, times in pairs if value == math.inf),
        sum(times for value, times in pairs if value == -math.inf),
        sum(times for value, times in pairs if value == 0),
        sum(times for value, times in pairs if 0 < abs(value) < smallest),
        min(finite, default=None),
        max(finite, default=None),
    )


def moments_of_codes(pairs: list[tuple[float, int]]) -> Moments:
    """Return the moments, given each value and how often it occurs."""
    finite = [(value, times) for value, times in pairs if math.isfinite(value)]
    count = sum(times for _, times in finite)
    mean = exact_sum(value * times for value, times in finite) / max(count, 1)
    squares = exact_sum(times * (value - mean) ** 2 for value, times in finite)
    return Moments(count, mean, squares, exact_sum(abs(value) * times for value, times in finite))


def histogram_of_codes(pairs: list[tuple[float, int]]) -> dict[int, int]:
    """Return how many values lie between two powers of two, by the exponent of the lower one."""
    bins: dict[int, int] = {}
    for value, times in pairs:
        if value and math.isfinite(value):
            exponent = math.frexp(value)[1] - 1
            bins[exponent] = bins.get(exponent, 0) + times
    return dict(sorted(bins.items()))
