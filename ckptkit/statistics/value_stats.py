"""Statistics of many numbers: counts, moments, norms and a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptkit.values.extremes import Extremes
from ckptkit.values.moments import NO_MOMENTS, Moments

__all__ = ["ValueStats", "counts_and_extremes"]


@dataclass(frozen=True, slots=True)
class ValueStats(Extremes):
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

    moments: Moments = NO_MOMENTS
    histogram: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """The mean of the finite numbers."""
        return self.moments.mean if self.moments.finite else None

    @property
    def std(self) -> float | None:
        """The standard deviation of the finite numbers; infinite if its square overflows float64, as in torch."""
        finite, _, squares, _ = self.moments
        return math.sqrt(squares / finite) if finite else None

    @property
    def l1(self) -> float | None:
        """The sum of the magnitudes of the finite numbers."""
        return self.moments.l1 if self.moments.finite else None

    @property
    def l2(self) -> float | None:
        """The Euclidean norm of the finite numbers; infinite if its square overflows float64, as in torch."""
        finite, mean, squares, _ = self.moments
        # Both terms are at least 0, so that no digits cancel.
        return math.sqrt(squares + finite * mean * mean) if finite else None


def counts_and_extremes(found: Extremes) -> tuple[int, int, int, int, int, int, float | None, float | None]:
    """Return the fields of ``Extremes`` in order, as the first arguments of ``ValueStats``."""
    return found.count, found.nan, found.posinf, found.neginf, found.zeros, found.subnormal, found.min, found.max
