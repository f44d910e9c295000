"""What many numbers are together: counts, moments, norms and a histogram; and several of these as one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Moments", "ValueStats", "exact_sum", "merge_moments", "merge_stats"]


class Moments(NamedTuple):
    """Sums over finite numbers, as many as ``finite``; ``squares`` are those of their distances from ``mean``."""

    finite: int
    mean: float
    squares: float
    l1: float


_NONE = Moments(0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ValueStats:
    """What the numbers of one tensor are, or of several together.

    ``count`` is how many there are: of a complex tensor two an element, its real and its imaginary part. ``min``,
    ``max``, ``mean``, ``std`` (of exactly these numbers, ``correction=0``) and the norms ``l1``, ``l2`` and ``abs_max``
    are those of the finite ones, and None where there are none; ``min`` and ``max`` of integers are exact.
    ``subnormal`` counts what is not zero and smaller than the smallest normal number of its dtype.

    ``histogram`` has the count of those with ``2**e <= abs(x) < 2**(e + 1)`` by ``e``: exact, whatever the range,
    and known in one pass. Zeros are in none of the bins; that below the smallest normal number of F32 and BF16 (-127),
    and of F64 (-1023), holds all that is smaller. Integers beyond 2**53 are binned as the nearest float64.
    """

    count: int = 0
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0
    subnormal: int = 0
    min: float | None = None
    max: float | None = None
    moments: Moments = _NONE
    histogram: Mapping[int, int] = field(default_factory=dict)

    @property
    def finite(self) -> int:
        """How many are neither NaN nor infinite."""
        return self.count - self.nan - self.posinf - self.neginf

    @property
    def mean(self) -> float | None:
        """The mean of the finite numbers."""
        return self.moments.mean if self.finite else None

    @property
    def std(self) -> float | None:
        """The standard deviation of the finite numbers; infinite where its square is beyond float64, as in torch."""
        return math.sqrt(self.moments.squares / self.finite) if self.finite else None

    @property
    def l1(self) -> float | None:
        """The sum of the magnitudes of the finite numbers."""
        return self.moments.l1 if self.finite else None

    @property
    def l2(self) -> float | None:
        """The Euclidean norm of the finite numbers; infinite where its square is beyond float64, as in torch."""
        finite, mean, squares, _ = self.moments
        return math.sqrt(squares + finite * mean * mean) if self.finite else None  # no term is negative: none cancels

    @property
    def abs_max(self) -> float | None:
        """The largest magnitude of the finite numbers."""
        return None if self.min is None or self.max is None else max(abs(self.min), abs(self.max))

    @property
    def constant(self) -> float | None:
        """The number that all of them are; None where two differ, or one is not finite."""
        return self.min if self.finite == self.count and self.min == self.max else None

    @property
    def zero_share(self) -> float:
        """Share of the numbers that are zero, between 0 and 1; 0 where there are none."""
        return self.zeros / self.count if self.count else 0.0


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together, in whatever order they come."""
    parts = [part for part in parts if part.finite]
    if len(parts) < 2:
        return parts[0] if parts else _NONE
    finite = sum(part.finite for part in parts)
    mean = exact_sum(part.finite * part.mean for part in parts) / finite
    if not math.isfinite(mean):  # the sum is beyond float64, the mean is not
        mean = exact_sum(part.finite / finite * part.mean for part in parts)
    apart = [(part.finite, part.mean - mean) for part in parts]
    squares = exact_sum([*(part.squares for part in parts), *(times * far * far for times, far in apart)])
    return Moments(finite, mean, squares, exact_sum(part.l1 for part in parts))


def exact_sum(numbers: Iterable[float]) -> float:
    """Return the sum, rounded once; infinite where it is beyond float64."""
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # the second where infinities of both signs are among them
        return math.inf


def merge_stats(several: Iterable[ValueStats]) -> ValueStats:
    """Return what the numbers of several tensors are together, as if they were one tensor."""
    parts = list(several)
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
