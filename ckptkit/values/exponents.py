"""Count numbers by their exponents: how many have a magnitude between two powers of two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = ["count_bytes", "count_exponents", "present"]

_BLOCK: Final = 1 << 16  # numbers that are shifted at once: they stay in the cache


def count_exponents(numbers: _Array, workers: Workers) -> _Array:
    """Return how many numbers have each exponent field: 256 counts for F32 and BF16, 2048 for F64.

    ``numbers`` are the bits as unsigned integers, of 2 bytes for BF16, of 4 for F32 and of 8 for F64.
    """
    import numpy as np

    count = len(numbers)
    shift = numbers.dtype.type({2: 7, 4: 23, 8: 52}[numbers.itemsize])
    if numbers.itemsize == 8:
        shifted = np.right_shift(numbers, shift, out=workers.buffer("shifted", numbers.dtype, count))
        np.bitwise_and(shifted, numbers.dtype.type(2047), out=shifted)
        return np.bincount(shifted.view(np.int64), minlength=2048)
    fields = workers.buffer("fields", np.uint8, count)
    for start, stop in pieces(count, _BLOCK):
        shifted = workers.buffer("shifted", numbers.dtype, stop - start)
        np.right_shift(numbers[start:stop], shift, out=shifted)
        np.copyto(fields[start:stop], shifted, casting="unsafe")  # drops the sign
    return count_bytes(fields, workers)


def count_bytes(numbers: _Array, workers: Workers) -> _Array:
    """Return how often each of the 256 values of a byte occurs.

    ``numpy.bincount`` holds the lock of the interpreter, and is as fast for 65,536 values as for 256. So two bytes are
    counted at once. It would make an array of 8 bytes a number at each call, whose pages the system clears first.
    """
    import numpy as np

    pairs = len(numbers) // 2
    if pairs < 1 << 14:
        return np.bincount(numbers, minlength=256)
    wide = workers.buffer("pairs", np.intp, pairs)
    np.copyto(wide, numbers[: 2 * pairs].view(np.uint16))
    table = np.bincount(wide, minlength=1 << 16).reshape(256, 256)
    counts: _Array = table.sum(axis=0) + table.sum(axis=1)
    if len(numbers) % 2:
        counts[numbers[-1]] += 1
    return counts


def present(counts: _Array) -> dict[int, int]:
    """Return the positions of the counts that are not zero, and these counts."""
    positions = counts.nonzero()[0]
    return dict(zip(positions.tolist(), counts[positions].tolist(), strict=True))
