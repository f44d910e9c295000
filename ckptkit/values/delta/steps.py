"""How far two numbers are apart: the steps between them in the order of all numbers of their dtype, exact for all bits.

The bits of floats, read as integers, are in the order of the floats once those of negative floats are turned around. A
difference of two such integers is exact, also where one of both is NaN or a negative zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ckptkit.values.float_formats import FloatFormat
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Array", "add_steps", "by_exponent", "steps_between"]

_SORTED_TOGETHER: Final = 1 << 14  # numbers
_BYTE: Final = 1 << 8
Array: TypeAlias = "npt.NDArray[Any]"  # of unsigned integers


def steps_between(base: Array | None, new: Array, layout: FloatFormat | None, workers: Workers) -> Array:
    """Return the steps from each base number to the new one, in a buffer of this thread.

    Small steps in both directions are small numbers: 0, -1, 1, -2, 2 are 0 to 4. ``layout`` is None for integers, and
    ``base`` for zeros.
    """
    import numpy as np

    steps = _ranks(new, layout, workers.buffer("steps", new.dtype, len(new)))
    if base is not None:
        steps -= _ranks(base, layout, workers.buffer("base ranks", new.dtype, len(new)))
    signs = _signs(steps, workers.buffer("base ranks", new.dtype, len(new)))
    np.left_shift(steps, 1, out=steps)
    return np.bitwise_xor(steps, signs, out=steps)


def add_steps(base: Array | None, steps: Array, layout: FloatFormat | None, made: Array, workers: Workers) -> None:
    """Write the new numbers to ``made``: the inverse of ``steps_between``. ``steps`` are lost."""
    import numpy as np

    signs = workers.buffer("base ranks", steps.dtype, len(steps))
    np.bitwise_and(steps, 1, out=signs)
    np.negative(signs, out=signs)
    np.right_shift(steps, 1, out=steps)
    np.bitwise_xor(steps, signs, out=steps)
    if base is not None:
        steps += _ranks(base, layout, signs)
    made[:] = _ranks(steps, layout, signs) if layout is not None else steps


def by_exponent(base: Array, layout: FloatFormat, workers: Workers) -> Array:
    """Return the places of the numbers, those with the smallest exponents first, and else in their order.

    A change of one size is many steps of a small number and few of a large one. So the steps of numbers with one
    exponent are alike. The places are in a buffer of this thread.
    """
    import numpy as np

    exponents = layout.sign >> layout.mantissa
    keys = np.right_shift(base, layout.mantissa, out=workers.buffer("base ranks", base.dtype, len(base)))
    keys &= exponents - 1
    narrow = workers.buffer("exponents", np.uint8 if exponents <= _BYTE else np.uint16, len(base))
    narrow[:] = keys
    # numpy sorts into new memory. Several short sorts get the same memory again, and the system need not clear it.
    orders: Array = workers.buffer("orders", np.intp, len(base))
    starts, counts = [], []
    for start, stop in pieces(len(base), _SORTED_TOGETHER):
        np.add(np.argsort(narrow[start:stop], kind="stable"), start, out=orders[start:stop])
        starts.append(start)
        counts.append(np.bincount(narrow[start:stop], minlength=exponents))
    if len(starts) <= 1:
        return orders
    places: Array = workers.buffer("places", np.intp, len(base))
    table = np.array(counts)
    ends = table.cumsum(axis=1) + np.array(starts)[:, None]
    at = 0
    for exponent in np.flatnonzero(table.any(axis=0)):
        for count, end in zip(table[:, exponent].tolist(), ends[:, exponent].tolist(), strict=True):
            places[at : at + count] = orders[end - count : end]
            at += count
    return places


def _ranks(bits: Array, layout: FloatFormat | None, out: Array) -> Array:
    """Write to ``out`` integers in the order of the numbers; of such integers, the bits of the numbers again."""
    import numpy as np

    if layout is None:
        out[:] = bits
        return out
    np.right_shift(_signs(bits, out), 1, out=out)
    return np.bitwise_xor(out, bits, out=out)


def _signs(numbers: Array, out: Array) -> Array:
    """Write ones to all bits of ``out`` where the highest bit of the number is one, else zeros."""
    import numpy as np

    signed = f"i{numbers.itemsize}"
    np.right_shift(numbers.view(signed), 8 * numbers.itemsize - 1, out=out.view(signed))
    return out
