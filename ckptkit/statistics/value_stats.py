"""Statistics of many numbers: counts, moments, norms and a histogram; statistics of several tensors can be merged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Moments", "ValueStats", "exact_sum", "merge_moments", "merge_stats"]


class Moments(NamedTuple):
    """Moments of ``finite`` numbers; ``squares`` is the sum of their squared distances from ``mean``."""

    finite: int
    mean: float
    squares: float
    l1: float


_NO_MOMENTS = Moments(0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ValueStats:
    """Statistics of the values of one tensor, or of several together.

    An element of a complex tensor counts as two numbers: its real and its imaginary part. ``min``, ``max``, ``mean``,
    ``std`` (with ``correction=0``) and the norms ``l1``, ``l2`` and ``abs_max`` use only the finite numbers. They are
    None without finite numbers.

    Attributes:
        count: The number of values.
        nan: The number of NaN.
        posinf: The number of positive infinities.
        neginf: The number of negative infinities.
        zeros: The number of zeros of either sign.
        subnormal: The number of values that are not zero and smaller than the smallest normal number of the dtype.
        min: The smallest finite number; exact for integers.
        max: The largest finite number; exact for integers.
        moments: The count, mean, sum of squared distances and l1 norm of the finite numbers.
        histogram: The number of values with ``2**e <= abs(x) < 2**(e + 1)``, by ``e``. Zeros are in no bin. Bin -127
            holds all subnormal numbers of F32 and BF16, bin -1023 all subnormal numbers of F64. Integers beyond 2**53
            are rounded to float64 first.
    """

    count: int = 0
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0
    subnormal: int = 0
    min: float | None = None
    max: float | None = None
    moments: Moments = _NO_MOMENTS
    histogram: Mapping[int, int] = field(default_factory=dict)

    @property
    def finite(self) -> int:
        """The number of values that are neither NaN nor infinite."""
        return self.count - self.nan - self.posinf - self.neginf

    @property
    def mean(self) -> float | None:
        """The mean of the finite numbers."""
        return self.moments.mean if self.finite else None

    @property
    def std(self) -> float | None:
        """The standard deviation of the finite numbers; infinite if its square overflows float64, as in torch."""
        return math.sqrt(self.moments.squares / self.finite) if self.finite else None

    @property
    def l1(self) -> float | None:
        """The sum of the magnitudes of the finite numbers."""
        return self.moments.l1 if self.finite else None

    @property
    def l2(self) -> float | None:
        """The Euclidean norm of the finite numbers; infinite if its square overflows float64, as in torch."""
        finite, mean, squares, _ = self.moments
        # Both terms are at least 0, so that no digits cancel.
        return math.sqrt(squares + finite * mean * mean) if self.finite else None

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


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together; the order of the parts does not matter."""
    parts = [part for part in parts if part.finite]
    if len(parts) < 2:
        return parts[0] if parts else _NO_MOMENTS
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


def merge_stats(parts: Iterable[ValueStats]) -> ValueStats:
    """Return the statistics of several tensors together, as if they were one tensor."""
    parts = list(parts)
    bins: Counter[int] = Counter()
    for part in parts:
        bins.update(part.histogram)
    return ValueStats(
        sum(part.count for part in parts),
        sum(part.nan for part in parts),
        sum(part.posinf for part in parts),
        sum(part.neginf for part in parts),
        sum(part.zeros for part in parts),
        sum(part.subnormal for part in parts),
        min((part.min for part in parts if part.min is not None), default=None),
        max((part.max for part in parts if part.max is not None), default=None),
        merge_moments([part.moments for part in parts]),
        dict(sorted(bins.items())),
    )
