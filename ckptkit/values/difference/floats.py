"""The arithmetic of long runs of floats: few passes over blocks that stay in the cache.

Numbers of at most 32 bits are subtracted, multiplied and added in float32, in rows of 4096 numbers whose sums are added
in float64. Where float32 overflows or underflows, the block is computed in float64. The largest difference is exact.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ckptkit.values.arrays import float4_values
from ckptkit.values.casting import cast_bytes
from ckptkit.values.difference.part import UNCHANGED, Part, Sums
from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["LEAST_SQUARE", "MOST_SQUARE", "has_floats", "measure_equal_floats", "measure_floats", "scaled_sums"]

Array: TypeAlias = "npt.NDArray[Any]"
_ROW: Final = 1 << 12  # numbers; BLAS shares longer products among threads of its own, whose number changes the result
# By the bytes of a number, the sums of squares that are exact enough: smaller ones may lack squares that have
# underflown.
LEAST_SQUARE, MOST_SQUARE = 1e-280, 1e300
_LIMITS: Final = {4: (1e-25, 1e30), 8: (LEAST_SQUARE, MOST_SQUARE)}
_NEAR: Final = 2.0**-20  # of float32 differences that are as near to the largest, any can be the largest
_MANY: Final = 8  # single elements of a block are gathered if they are fewer than one in so many


def has_floats(real: str) -> bool:
    """Return whether numbers of this dtype are floats with a sign."""
    return real in FLOAT_FORMATS or real == "F4"


def measure_floats(bits: tuple[Array, Array], real: str, workers: Workers, best: float) -> Part | Array | None:
    """Return the differences of a block.

    ``largest`` of the part is ``UNCHANGED`` unless it is above ``best``. Nothing is said about tolerances. If a number
    or a difference is not finite, return which are not; or None if these are many.
    """
    import numpy as np

    expected, found = (_values(side, real, workers, name) for side, name in zip(bits, ("e", "f"), strict=True))
    distance = _distance(expected, found, workers)
    top = float(distance.max())
    if not math.isfinite(top):
        odd = np.flatnonzero(~np.isfinite(distance))
        return None if len(odd) * _MANY > len(distance) else odd
    sums = _sums(expected, found, distance)
    if sums is None and expected.itemsize < 8:
        expected, found = _widened(expected, workers, "wide e"), _widened(found, workers, "wide f")
        distance = _distance(expected, found, workers)
        sums = _sums(expected, found, distance)
    sums = sums or scaled_sums(expected, found, distance)
    changed, ulp = _steps(bits, workers)
    largest, place = UNCHANGED, 0
    if changed and top * (1 + _NEAR) > best:
        largest, place = _largest(bits, (expected, found), distance, top)
    if largest <= best:
        largest, place = UNCHANGED, 0
    values = bits[0][place : place + 1].tobytes(), bits[1][place : place + 1].tobytes()
    steps = ulp >> 4 if real == "F4" else ulp
    return Part(changed, 0, len(distance), 0, largest, place, values, steps, (0, 0), (0, 0), (sums,))


def measure_equal_floats(bits: Array, real: str, workers: Workers) -> Part | None:
    """Return the part of a block with these bits on both sides, or None if it needs another way."""
    values = _values(bits, real, workers, "e")
    square = _dot(values, values)
    if not _is_exact(square, values.itemsize):
        return None
    sums = Sums(0.0, 0.0, math.sqrt(square), math.sqrt(square), 1.0)
    return Part(0, 0, len(values), 0, UNCHANGED, 0, (b"", b""), 0, (0, 0), (0, 0), (sums,))


def scaled_sums(expected: Array, found: Array, distance: Array) -> Sums:
    """Return the sums of finite float64 numbers, whose squares may be beyond float64."""
    import numpy as np

    def scaled(numbers: Array) -> tuple[Array, int]:
        exponent = math.frexp(float(np.abs(numbers).max()))[1]
        return np.ldexp(numbers, -exponent), exponent

    def norm(numbers: Array) -> tuple[Array, float, float]:
        small, exponent = scaled(numbers)
        root = math.sqrt(_dot(small, small))
        return small, root, float(np.ldexp(root, exponent))

    one, other = norm(expected), norm(found)
    cosine = _dot(one[0], other[0]) / (one[1] * other[1]) if one[1] and other[1] else 0.0
    return Sums(_dot(distance, None), norm(distance)[2], one[2], other[2], cosine)


def _values(bits: Array, real: str, workers: Workers, name: str) -> Array:
    """Return the numbers with these bits, those of F64 in float64 and all others in float32."""
    import numpy as np

    if real in ("F32", "F64"):
        return bits.view(f"f{bits.itemsize}")
    if real == "F4":
        numbers: Array = _float4_table()[bits]
        return numbers
    return np.frombuffer(cast_bytes(bits.view(np.uint8).data, real, "F32", workers, name), np.float32)


@functools.cache
def _float4_table() -> Array:
    """Return the number of each byte that has the bits of F4 in its upper half."""
    import numpy as np

    table: Array = np.repeat(float4_values().astype(np.float32), 16)
    return table


def _widened(values: Array, workers: Workers, name: str) -> Array:
    import numpy as np

    wide = workers.buffer(name, np.float64, len(values))
    np.copyto(wide, values)
    return wide


def _distance(expected: Array, found: Array, workers: Workers) -> Array:
    import numpy as np

    name = "distance" if expected.itemsize < 8 else "wide distance"
    distance = workers.buffer(name, expected.dtype, len(expected))
    np.subtract(found, expected, out=distance)
    np.abs(distance, out=distance)
    return distance


def _sums(expected: Array, found: Array, distance: Array) -> Sums | None:
    """Return the sums, or None where squares are too large or too small for the dtype of the numbers."""
    squares = _dot(distance, distance), _dot(expected, expected), _dot(found, found)
    if not all(_is_exact(square, distance.itemsize) for square in squares):
        return None
    far, one, other = (math.sqrt(square) for square in squares)
    return Sums(_dot(distance, None), far, one, other, _dot(expected, found) / (one * other))


def _is_exact(square: float, width: int) -> bool:
    """Return whether no square in a sum has overflown, and those that have underflown do not count."""
    least, most = _LIMITS[width]
    return least <= square <= most


def _dot(one: Array, other: Array | None) -> float:
    """Return the sum of products, or of ``one`` alone."""
    import numpy as np

    whole = len(one) // _ROW * _ROW
    rows = one[:whole].reshape(-1, 1, _ROW)
    ones = _ones(one.itemsize)
    columns = ones if other is None else other[:whole].reshape(-1, _ROW, 1)
    rest = one[whole:]
    sums = np.matmul(rows, columns).sum(dtype=np.float64)
    return float(sums) + float(np.dot(rest, ones[0, : len(rest), 0] if other is None else other[whole:]))


@functools.cache
def _ones(width: int) -> Array:
    import numpy as np

    return np.ones((1, _ROW, 1), f"f{width}")


def _steps(bits: tuple[Array, Array], workers: Workers) -> tuple[int, int]:
    """Return how many bits differ, and the largest number of steps between two numbers of the dtype."""
    import numpy as np

    width, count = bits[0].itemsize, len(bits[0])
    expected, found = (side.view(f"i{width}") for side in bits)
    steps = workers.buffer("steps", expected.dtype, count)
    np.subtract(found, expected, out=steps)
    changed = int(np.count_nonzero(steps))
    # Between numbers of two signs, the steps are the sum of both magnitudes; there the subtraction wraps around.
    signs = workers.buffer("signs", expected.dtype, count)
    np.bitwise_xor(expected, found, out=signs)
    marks = np.less(signs, 0, out=workers.buffer("marks", np.bool_, count))
    size = bits[0].dtype.type((1 << (8 * width - 1)) - 1)
    crossing, across = int(np.count_nonzero(marks)), 0
    if crossing * _MANY > count:
        np.right_shift(signs, 8 * width - 1, out=signs)  # all bits where the signs differ, else none
        sums, rest = (workers.buffer(name, bits[0].dtype, count) for name in ("magnitudes", "others"))
        np.bitwise_and(bits[0], size, out=sums)
        np.bitwise_and(bits[1], size, out=rest)
        np.add(sums, rest, out=sums)
        across = int(np.bitwise_and(sums, signs.view(sums.dtype), out=sums).max())
        np.bitwise_and(steps, np.invert(signs, out=signs), out=steps)
    elif crossing:
        at = np.flatnonzero(marks)
        across = int(((bits[0][at] & size) + (bits[1][at] & size)).max())
        steps[at] = 0
    return changed, max(across, int(steps.max()), -int(steps.min()))


def _largest(bits: tuple[Array, Array], values: tuple[Array, Array], distance: Array, top: float) -> tuple[float, int]:
    """Return the largest difference and the first place of it; the first place with other bits if it is 0."""
    import numpy as np

    if not top:
        return 0.0, int(np.flatnonzero(bits[0] != bits[1])[0])
    if distance.itemsize == 8:
        return top, int(distance.argmax())
    at = np.flatnonzero(distance >= np.float32(top * (1 - _NEAR)))
    exact = np.abs(values[1][at].astype(np.float64) - values[0][at].astype(np.float64))
    first = int(exact.argmax())
    return float(exact[first]), int(at[first])
