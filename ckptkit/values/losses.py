"""Exact numbers of the values that a cast changes to inf, to 0 or to another integer: bits before and after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.dtypes import DTYPES, is_float
from ckptkit.values.arrays import bits_dtype, real_code
from ckptkit.values.casting import cast_bytes, dtype_of
from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Losses", "can_lose", "can_overflow", "count_losses", "largest_finite", "smallest_positive"]

Array: TypeAlias = "npt.NDArray[Any]"


class Losses(NamedTuple):
    """The losses of some values of a tensor; see ``CastLoss`` for the fields."""

    overflowed: int = 0
    underflowed: int = 0
    truncated: int = 0
    largest: float = 0.0
    is_mask: bool = True
    infinite: int = 0
    saturated: bool = False
    infinite_codes: int = 0

    def __bool__(self) -> bool:
        """Return whether any value was lost."""
        return bool(self.overflowed or self.underflowed or self.truncated or self.infinite_codes)

    def plus(self, other: Losses) -> Losses:
        """Return the losses of the values of both."""
        return Losses(
            self.overflowed + other.overflowed,
            self.underflowed + other.underflowed,
            self.truncated + other.truncated,
            max(self.largest, other.largest),
            self.is_mask and other.is_mask,
            self.infinite + other.infinite,
            self.saturated or other.saturated,
            self.infinite_codes + other.infinite_codes,
        )

    def of(self, key: str, found: str, out: str, values: int) -> CastLoss:
        """Return the description of the losses of a tensor with so many values."""
        return CastLoss(
            key, found, out, values, *self[:3],
            largest=self.largest, is_mask=bool(self.overflowed) and self.is_mask,
            infinite=self.infinite, saturated=self.saturated, infinite_codes=self.infinite_codes,
        )  # fmt: skip


_E4M3_LIMIT = 464.0  # numbers up to here are rounded to 448, the largest


@functools.cache
def largest_finite(code: str) -> float:
    """Return the largest finite value of the dtype with this code; of a complex dtype, that of its parts."""
    import numpy as np

    real = real_code(code)
    if code == "BOOL":
        return 1.0
    return float(_limits(real).max) if is_float(real) else float(np.iinfo(dtype_of(real)).max)


@functools.cache
def smallest_positive(code: str) -> float:
    """Return the smallest number above 0 of the floating-point dtype with this code."""
    return float(_limits(real_code(code)).smallest_subnormal)


@functools.cache
def can_overflow(found: str, out: str) -> bool:
    """Return whether a cast between the dtypes of these codes can change a finite value to inf or to another number."""
    import numpy as np

    old, new = real_code(found), real_code(out)
    if old == new or "BOOL" in (old, new):
        return False
    if new == "F8_E8M0":  # powers of two, without a sign and without 0
        return True
    if is_float(new):
        return largest_finite(old) > largest_finite(new)
    if is_float(old):
        return True
    before, after = np.iinfo(dtype_of(old)), np.iinfo(dtype_of(new))
    return bool(before.min < after.min or before.max > after.max)


@functools.cache
def can_lose(found: str, out: str) -> bool:
    """Return whether a cast between the dtypes of these codes can change a value in one of the counted ways."""
    old, new = real_code(found), real_code(out)
    if old == new:
        return False
    if is_float(old) and is_float(new):
        return can_overflow(found, out) or smallest_positive(old) < smallest_positive(new)
    return can_overflow(found, out) or is_float(old) or new == "BOOL"


def _limits(code: str) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(dtype_of(code))  # type: ignore[no-untyped-call]


def count_losses(data: memoryview, made: memoryview, found: str, out: str, workers: Workers) -> Losses:
    """Return the losses of a cast from the dtype ``found`` to ``out``; ``made`` are the bytes ``data`` after the cast.

    Complex values count once, though both of their parts are lost.
    """
    import numpy as np

    if not len(data) or not can_lose(found, out):
        return Losses()
    old, new = real_code(found), real_code(out)
    before, after = np.frombuffer(data, bits_dtype(old)), np.frombuffer(made, bits_dtype(new))
    if len(after) > len(before):  # a real number becomes a complex one
        after = np.ascontiguousarray(after[::2])
    if len(before) > len(after):
        before = np.ascontiguousarray(before[::2])
    parts = len(after) * DTYPES[found].bits // 8 // len(data)
    if parts == 1 and old in FLOAT_FORMATS and new in FLOAT_FORMATS:
        return _count_floats(before, after, old, new, workers)
    with np.errstate(all="ignore"):
        return _count_others(before, after, (old, new, parts), workers)


def _count_floats(before: Array, after: Array, old: str, new: str, workers: Workers) -> Losses:
    """Count without a look at single values where the bits after the cast show that none was lost."""
    import numpy as np

    layout = FLOAT_FORMATS[new]
    sizes = workers.buffer("sizes", after.dtype, len(after))
    np.bitwise_and(after, layout.size_bits, out=sizes)
    limit = layout.largest + (new != "F8_E4M3")  # newer versions of torch give 448 in place of inf
    only = None if layout.has_negative_zero else layout.sign
    zeros = len(sizes) - int(np.count_nonzero(sizes))
    suspects = np.empty(0, np.intp)
    if _has(sizes, limit, only):
        suspects = np.flatnonzero(_from(sizes, limit, only, workers.buffer("marks", np.bool_, len(after))))
    lost = _values(before[suspects], old, workers) if len(suspects) else np.empty(0)
    saturated = False
    if len(lost):
        is_largest = sizes[suspects] == layout.largest if new == "F8_E4M3" else False
        saturated = bool((is_largest & (np.abs(lost) > _E4M3_LIMIT)).any())
        lost = lost[np.where(is_largest, np.abs(lost) > _E4M3_LIMIT, np.isfinite(lost))]
    if zeros:
        old_sizes = workers.buffer("old sizes", before.dtype, len(before))
        np.bitwise_and(before, FLOAT_FORMATS[old].size_bits, out=old_sizes)
        zeros -= len(old_sizes) - int(np.count_nonzero(old_sizes))
    if not zeros and not len(lost):
        return Losses()
    return _with_overflow(lost, (len(lost), zeros, 0), saturated=saturated)


def _has(sizes: Array, limit: int, only: int | None) -> bool:
    return bool((sizes == only).any() if only is not None else sizes.max() >= limit)


def _from(sizes: Array, limit: int, only: int | None, marks: Array) -> Array:
    import numpy as np

    return np.equal(sizes, only, out=marks) if only is not None else np.greater_equal(sizes, limit, out=marks)


def _values(bits: Array, code: str, workers: Workers) -> Array:
    """Return numbers as float64, in an array of their own."""
    import numpy as np

    return np.frombuffer(bytes(cast_bytes(bits.view(np.uint8).data, code, "F64", workers, "values")), np.float64)


def _count_others(before: Array, after: Array, kinds: tuple[str, str, int], workers: Workers) -> Losses:
    import numpy as np

    old, new, parts = kinds
    was, now = _values(before, old, workers), _values(after, new, workers)
    over = truncated = clipped = np.zeros(len(was), np.bool_)
    if new == "BOOL":
        truncated = was != now
    elif is_float(new):
        over = np.isfinite(was) & ~np.isfinite(now)
        if new == "F8_E4M3":
            clipped = (np.abs(now) == largest_finite(new)) & (np.abs(was) > _E4M3_LIMIT)
            over |= clipped
        if new == "F8_E8M0":
            over |= (was < 0) & np.isfinite(now)
    else:
        over = now != np.trunc(was)
        truncated = ~over & (was != now) & (now != 0)
    under = (was != 0) & (now == 0) & ~over
    counts: Callable[[Array], int] = lambda marks: int(marks.reshape(-1, parts).any(1).sum())  # noqa: E731
    return _with_overflow(was[over], (counts(over), counts(under), counts(truncated)), saturated=bool(clipped.any()))


def _with_overflow(lost: Array, counts: tuple[int, int, int], *, saturated: bool) -> Losses:
    """Return the counts of overflowed, underflowed and truncated values, with what the overflowed values say."""
    import numpy as np

    finite = np.abs(lost[np.isfinite(lost)])
    largest = float(finite.max()) if len(finite) else 0.0
    is_mask = all(value in _lowest() for value in np.unique(lost).tolist())
    return Losses(*counts, largest, is_mask, int(np.isinf(lost).sum()), saturated)


@functools.cache
def _lowest() -> frozenset[float]:
    return frozenset(-largest_finite(code) for code in ("F32", "BF16", "F64"))
