"""Bounds of the numbers of a weight, which often show before a number is decoded that rounding them loses none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.losses import largest_finite, smallest_positive

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Magnitudes"]


class Magnitudes(NamedTuple):
    """Before they are rounded, no number but 0 is closer to 0 than ``smallest``, and none farther than ``largest``."""

    smallest: float
    largest: float

    @classmethod
    def of(cls, numbers: npt.NDArray[Any]) -> Magnitudes:
        """Return those of an array."""
        import numpy as np

        sizes = np.abs(numbers)
        smallest = sizes.min(initial=np.inf, where=sizes > 0)
        return cls(float(smallest), float(sizes.max(initial=0)))

    def times(self, other: Magnitudes) -> Magnitudes:
        """Return those of the products of a number of each kind: exactly, if both numbers are float32."""
        return Magnitudes(self.smallest * other.smallest, self.largest * other.largest)

    def fit(self, code: str) -> bool:
        """Return whether rounding to the floating-point dtype ``code`` makes no number 0, infinite or saturated.

        That holds however often they are rounded on the way, because rounding keeps the order of numbers.
        """
        if code not in FLOAT_FORMATS:  # powers of two, without a sign and without 0
            return False
        return self.largest <= largest_finite(code) and self.smallest >= smallest_positive(code)
