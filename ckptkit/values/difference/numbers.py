"""The arithmetic: what two runs of numbers of one dtype have in common, and how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ckptkit.core.dtypes import DTYPES
from ckptkit.values.arrays import array_of, bits_dtype, float4_values, real_code
from ckptkit.values.byte_codes import BYTE_CODES
from ckptkit.values.casting import cast_bytes
from ckptkit.values.difference.close import is_close
from ckptkit.values.difference.floats import (
    LEAST_SQUARE,
    MOST_SQUARE,
    has_floats,
    measure_equal_floats,
    measure_floats,
    scaled_sums,
)
from ckptkit.values.difference.part import UNCHANGED, Part, Sums, Tolerance, together
from ckptkit.values.extremes import INTEGERS
from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["BLOCK", "has_numbers", "measure", "measure_equal", "measure_runs"]

Array: TypeAlias = "npt.NDArray[Any]"
BLOCK = 1 << 18  # elements; a copy of them in float32 stays in the cache
_SIGNS = {"F4": 128, **{code: layout.sign for code, layout in FLOAT_FORMATS.items()}}


class Numbers(NamedTuple):
    """Both sides of some elements: their bits, and their values in float64 with 0 in place of NaN and infinities.

    ``finite`` says which elements are finite on both sides, or is None if all are. ``nan`` and ``inf`` say which
    elements are, on each side, and are empty if all elements are finite.
    """

    bits: tuple[Array, Array]
    wide: tuple[Array, Array]
    finite: Array | None
    nan: tuple[Array, ...]
    inf: tuple[Array, ...]


def has_numbers(code: str) -> bool:
    """Return whether numbers of this dtype can be compared, and not only their bytes."""
    real = real_code(code)
    return real in FLOAT_FORMATS or real in INTEGERS or real in BYTE_CODES


def measure(
    sides: tuple[memoryview, memoryview],
    code: str,
    workers: Workers,
    tolerance: Tolerance | None,
    best: float,
    *,
    is_cast: bool = False,
) -> Part:
    """Return the differences of a block of elements of dtype ``code``.

    ``largest`` of the part may be ``UNCHANGED`` if it is not above ``best``. After a cast, two NaNs are equal with any
    bits.
    """
    import numpy as np

    part = None
    with np.errstate(all="ignore"):
        if has_floats(code):
            bits = _bits(sides[0], code), _bits(sides[1], code)
            found = measure_floats(bits, code, workers, best)
            if isinstance(found, Part):
                part = found
            elif found is not None and tolerance is None:
                part = _apart_from(found, bits, code, workers, best, is_cast=is_cast)
            if part is not None and part.changed and tolerance is not None:
                close = is_close(bits, bits[0], code, tolerance, workers)
                part = part._replace(beyond=int(np.count_nonzero(~close & (bits[0] != bits[1]))))
    return part or measure_runs(sides, code, workers, (0,), tolerance, is_cast=is_cast)[0]


def _apart_from(
    odd: Array, bits: tuple[Array, Array], code: str, workers: Workers, best: float, *, is_cast: bool
) -> Part | None:
    """Return the differences of a block with a few ``odd`` numbers, such as NaN, which are measured alone."""
    import numpy as np

    others = bits[0].copy(), bits[1].copy()
    for side in others:
        side[odd] = 0
    part = measure_floats(others, code, workers, best)
    if not isinstance(part, Part):
        return None
    sides = bits[0][odd].view(np.uint8).data, bits[1][odd].view(np.uint8).data
    (apart,) = measure_runs(sides, code, workers, (0,), is_cast=is_cast)
    rest = part._replace(finite=part.finite - len(odd))
    return together([(0, rest), (0, apart._replace(place=int(odd[apart.place])))])


def measure_equal(data: memoryview, code: str, workers: Workers) -> Part:
    """Return the part of a block with the bytes ``data`` on both sides."""
    import numpy as np

    part = None
    with np.errstate(all="ignore"):
        if has_floats(code):
            part = measure_equal_floats(_bits(data, code), code, workers)
    return part or measure_runs((data, data), code, workers, (0,))[0]


def measure_runs(
    sides: tuple[memoryview, memoryview],
    code: str,
    workers: Workers,
    starts: Sequence[int] | Array,
    tolerance: Tolerance | None = None,
    *,
    is_cast: bool = False,
) -> list[Part]:
    """Return the differences of each run of elements; a run begins at each element of ``starts``, and none is empty."""
    import numpy as np

    with np.errstate(all="ignore"):
        numbers = _numbers(sides, code, workers)
        return _measure(numbers, code, np.asarray(starts), workers, tolerance, is_cast=is_cast)


def _measure(
    numbers: Numbers, code: str, starts: Array, workers: Workers, tolerance: Tolerance | None, *, is_cast: bool
) -> list[Part]:
    import numpy as np

    real, parts = real_code(code), DTYPES[code].parts
    expected, found = numbers.wide
    differ = numbers.bits[0] != numbers.bits[1]
    if is_cast and numbers.nan:
        differ &= ~_both_nan(numbers, parts)
    differ = _of_elements(differ, parts)
    apart = _apart(numbers, real)
    distance = apart if apart.dtype.kind == "u" else np.abs(apart)
    if parts == 2:
        distance = np.hypot(distance[::2], distance[1::2])
    score, nonfinite = distance, None
    if numbers.finite is not None:
        nonfinite = _nonfinite(numbers.finite, numbers.nan, differ)
        score = np.where(nonfinite, np.inf, distance)
    steps = _steps(numbers, real, parts)
    beyond = np.zeros(len(starts), np.int64)
    if tolerance is not None:
        close = is_close(numbers.bits, distance, code, tolerance, workers)
        beyond = np.add.reduceat(differ & ~close, starts, dtype=np.int64)
    changed = np.add.reduceat(differ, starts, dtype=np.int64)
    largest = np.maximum.reduceat(score, starts)
    width = len(numbers.bits[0]) // len(distance)
    lengths = (np.append(starts[1:], len(distance)) - starts).tolist()
    finite = lengths if numbers.finite is None else _counts(numbers.finite, starts)
    nan, inf = (
        list(zip(*(_counts(side, starts) for side in sides), strict=True)) if sides else [(0, 0)] * len(starts)
        for sides in (numbers.nan, numbers.inf)
    )
    wrong = [0] * len(starts) if nonfinite is None else _counts(nonfinite, starts)
    places = _places(score, differ, starts, largest)
    rows = zip(
        changed.tolist(), beyond.tolist(), finite, wrong, largest.tolist(), (places - starts).tolist(),
        [_bytes(numbers.bits, place, width) for place in places.tolist()], _most(steps, starts), nan, inf,
        _run_sums((expected, found), distance.astype(np.float64, copy=False), starts), strict=True,
    )  # fmt: skip
    return [
        Part(differs, outside, both, other, most if differs else UNCHANGED, place, values, ulp, nans, infs, (sums,))
        for differs, outside, both, other, most, place, values, ulp, nans, infs, sums in rows
    ]


def _run_sums(sides: tuple[Array, Array], distance: Array, starts: Array) -> list[Sums]:
    """Return the sums of each run; ``distance`` has one number for each element, the sides have one or two."""
    import numpy as np

    expected, found = sides
    firsts = starts * (len(expected) // len(distance))
    squares = np.stack([
        np.add.reduceat(distance * distance, starts),
        np.add.reduceat(expected * expected, firsts),
        np.add.reduceat(found * found, firsts),
    ])  # fmt: skip
    norms = np.sqrt(squares)
    product, both = np.add.reduceat(expected * found, firsts), norms[1] * norms[2]
    cosine = np.divide(product, both, out=np.zeros(len(starts)), where=both > 0)
    rows = zip(np.add.reduceat(distance, starts).tolist(), *norms.tolist(), cosine.tolist(), strict=True)
    sums = [Sums(*row) for row in rows]
    for run in np.flatnonzero(~((squares >= LEAST_SQUARE) & (squares <= MOST_SQUARE)).all(0)).tolist():
        runs = [np.append(begins, len(side))[run : run + 2] for begins, side in ((firsts, found), (starts, distance))]
        (first, last), (start, stop) = (run.tolist() for run in runs)
        sums[run] = scaled_sums(expected[first:last], found[first:last], distance[start:stop])
    return sums


def _counts(marks: Array, starts: Array) -> list[int]:
    import numpy as np

    counts: list[int] = np.add.reduceat(marks, starts, dtype=np.int64).tolist()
    return counts


def _most(steps: Array | None, starts: Array) -> list[int] | list[None]:
    import numpy as np

    if steps is None:
        return [None] * len(starts)
    most: list[int] = np.maximum.reduceat(steps, starts).tolist()
    return most


def _bytes(bits: tuple[Array, Array], place: int, width: int) -> tuple[bytes, bytes]:
    expected, found = (side[place * width : (place + 1) * width].tobytes() for side in bits)
    return expected, found


def _places(score: Array, differ: Array, starts: Array, largest: Array) -> Array:
    """Return the first element of each run with the largest difference, or else with other bits, or else of all."""
    import numpy as np

    ends = np.append(starts[1:], len(score))
    of_run = np.repeat(largest, ends - starts)
    at = np.flatnonzero(differ & (score == of_run))
    if not len(at):
        return starts
    first = at[np.minimum(np.searchsorted(at, starts), len(at) - 1)]
    return np.where((first >= starts) & (first < ends), first, starts)


def _numbers(sides: tuple[memoryview, memoryview], code: str, workers: Workers) -> Numbers:
    import numpy as np

    real, parts = real_code(code), DTYPES[code].parts
    bits = _bits(sides[0], real), _bits(sides[1], real)
    wide = _wide(sides[0], bits[0], real, workers, "expected"), _wide(sides[1], bits[1], real, workers, "found")
    if real in INTEGERS or real == "F4":
        return Numbers(bits, wide, None, (), ())
    finite: Array = np.logical_and(np.isfinite(wide[0]), np.isfinite(wide[1]))
    if finite.all():
        return Numbers(bits, wide, None, (), ())
    nan = tuple(_of_elements(np.isnan(side), parts) for side in wide)
    inf = tuple(_of_elements(np.isinf(side), parts) for side in wide)
    both: Array = np.logical_not(_of_elements(np.logical_not(finite), parts))
    numbers = np.repeat(both, parts)
    return Numbers(bits, (np.where(numbers, wide[0], 0.0), np.where(numbers, wide[1], 0.0)), both, nan, inf)


def _of_elements(marks: Any, parts: int) -> Array:
    """Return the elements with a marked number."""
    found: Array = marks if parts == 1 else marks.reshape(-1, parts).any(1)
    return found


def _bits(data: memoryview, real: str) -> Array:
    """Return the bits of each number; those of F4, of which the lower half of a byte is first, in the upper half."""
    import numpy as np

    bits: Array = np.frombuffer(data, bits_dtype(real))
    return np.stack((bits << 4, bits & 0xF0), 1).reshape(-1) if real == "F4" else bits


def _wide(data: memoryview, bits: Array, real: str, workers: Workers, side: str) -> Array:
    import numpy as np

    if real == "F64":
        return bits.view(np.float64)
    if real == "F4":
        numbers: Array = float4_values()[bits >> 4]
        return numbers
    return np.frombuffer(cast_bytes(data, real, "F64", workers, side), np.float64)


def _apart(numbers: Numbers, real: str) -> Array:
    """Return found - expected; of integers, the exact absolute difference."""
    import numpy as np

    if real not in INTEGERS or real == "BOOL":
        return np.subtract(numbers.wide[1], numbers.wide[0])
    expected, found = (array_of(side.view(np.uint8).data, real) for side in numbers.bits)
    distance: Array = (np.maximum(expected, found) - np.minimum(expected, found)).view(f"u{expected.itemsize}")
    return distance


def _nonfinite(finite: Array, nan: Sequence[Array], differ: Array) -> Array:
    """Return which elements differ as numbers where a side is not finite; two NaNs do not."""
    marks: Array = differ & ~finite & ~(nan[0] & nan[1])
    return marks


def _both_nan(numbers: Numbers, parts: int) -> Array:
    """Return which numbers are NaN on both sides; a complex element is two numbers."""
    import numpy as np

    one, other = numbers.nan
    if parts == 2:
        one, other = (np.isnan(bits.view(f"f{bits.itemsize}")) for bits in numbers.bits)
    both: Array = one & other
    return both


def _steps(numbers: Numbers, real: str, parts: int) -> Array | None:
    """Return how many numbers of the dtype lie from one to the other; None for integers."""
    import numpy as np

    if real in INTEGERS:
        return None
    expected, found = numbers.bits
    if real == "F8_E8M0":
        steps = np.maximum(expected, found) - np.minimum(expected, found)
    else:
        kind = expected.dtype.type
        sign, size = kind(_SIGNS[real]), kind(_SIGNS[real] - 1)
        one, other = expected & size, found & size
        same = (expected ^ found) & sign == 0
        steps = np.where(same, np.maximum(one, other) - np.minimum(one, other), one + other)
    if real == "F4":
        steps >>= 4
    if parts == 2:
        steps = steps.reshape(-1, 2).max(1)
    return steps if numbers.finite is None else np.where(numbers.finite, steps, 0)
