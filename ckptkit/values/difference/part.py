"""What was found in some elements of two tensors, and what it is of all elements together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ckptkit.values.moments import exact_sum

__all__ = ["UNCHANGED", "Part", "Sums", "Tolerance", "together"]

UNCHANGED = -1.0  # the largest difference of elements whose bits are all equal


class Tolerance(NamedTuple):
    """The tolerances of ``torch.allclose``."""

    rtol: float
    atol: float


class Sums(NamedTuple):
    """Sums over the elements that are finite on both sides, in forms that do not overflow.

    ``magnitudes`` is the sum of the absolute differences. ``distance`` is the Euclidean norm of the differences,
    ``expected`` and ``found`` are those of the sides. ``cosine`` is of the angle between them, 0 if a norm is 0.
    """

    magnitudes: float
    distance: float
    expected: float
    found: float
    cosine: float


class Part(NamedTuple):
    """The differences of some neighbouring elements.

    Attributes:
        changed: The number of elements whose bits differ.
        beyond: The number of them that are not close to each other.
        finite: The number of elements that are finite on both sides.
        nonfinite: The number of elements that differ as numbers, where one side is not finite.
        largest: The largest absolute difference: inf with ``nonfinite``, 0 if only bits differ, else ``UNCHANGED``.
        place: The first element with that difference.
        values: The bytes of this element on both sides.
        ulp: The largest number of steps from one number of the dtype to the next, between two finite numbers; None of
            integers.
        nan: The number of elements that are NaN on the expected side, and on the found side.
        inf: The number of infinite elements, likewise.
        sums: The sums over blocks of elements, in any order.
    """

    changed: int
    beyond: int
    finite: int
    nonfinite: int
    largest: float
    place: int
    values: tuple[bytes, bytes]
    ulp: int | None
    nan: tuple[int, int]
    inf: tuple[int, int]
    sums: tuple[Sums, ...]

    @property
    def total(self) -> Sums:
        """The sums over all elements; the order of the blocks does not change them."""
        if len(self.sums) == 1:
            return self.sums[0]
        magnitudes, *norms, _ = zip(*self.sums, strict=True)
        distance, expected, found = (math.hypot(*sorted(norm)) for norm in norms)
        cosine = 0.0
        if expected and found:
            cosine = exact_sum(one.cosine * (one.expected / expected) * (one.found / found) for one in self.sums)
        return Sums(exact_sum(magnitudes), distance, expected, found, cosine)


def together(parts: Sequence[tuple[int, Part]]) -> Part:
    """Return the differences of all elements of the parts; each part comes with its first element.

    The order of the parts does not matter.
    """
    if len(parts) == 1 and not parts[0][0]:
        return parts[0][1]
    first, worst = min(parts, key=lambda item: (-item[1].largest, item[0]))
    found = [part for _, part in parts]
    return Part(
        sum(part.changed for part in found),
        sum(part.beyond for part in found),
        sum(part.finite for part in found),
        sum(part.nonfinite for part in found),
        worst.largest,
        first + worst.place,
        worst.values,
        max((part.ulp for part in found if part.ulp is not None), default=None),
        (sum(part.nan[0] for part in found), sum(part.nan[1] for part in found)),
        (sum(part.inf[0] for part in found), sum(part.inf[1] for part in found)),
        tuple(sums for part in found for sums in part.sums),
    )
