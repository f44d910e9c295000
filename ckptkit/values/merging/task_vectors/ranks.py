"""The ranks of numbers within their rows."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from ckptkit.values.merging.model import Array
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["ranks_in_rows"]

_SHORT: Final = 128  # numbers in a row, which are sorted without a look at their digits


def ranks_in_rows(numbers: Array, row: int, workers: Workers) -> npt.NDArray[np.float32]:
    """Return the rank of each number in its row, ascending from 0; of equal numbers the first has the lower rank.

    The numbers must not be negative. The array is a buffer of this thread.
    """
    import numpy as np

    size = len(numbers)
    ranks = workers.buffer("merge ranks", np.float32, size)
    if row < _SHORT or numbers.dtype != np.float32:
        order = np.argsort(numbers.reshape(-1, row), axis=1, kind="stable")
        order += np.arange(0, size, row)[:, None]
    else:
        order = _order(numbers, row, workers)
    ranks[order.reshape(-1)] = _ascending(row, size // row)
    return ranks


@functools.lru_cache(maxsize=4)
def _ascending(row: int, rows: int) -> npt.NDArray[np.float32]:
    """Return the ranks of sorted rows."""
    import numpy as np

    return np.tile(np.arange(row, dtype=np.float32), rows)


def _order(numbers: Array, row: int, workers: Workers) -> npt.NDArray[np.intp]:
    """Return the indexes of the numbers of each row in ascending order.

    The rows are ordered by the lower half of the bits, and then by the upper half. A stable order of 16-bit integers
    needs no comparisons.
    """
    import numpy as np

    size = len(numbers)
    rows = np.arange(0, size, row)[:, None]
    half = workers.buffer("merge half", np.uint16, size)
    upper = workers.buffer("merge upper", np.uint16, size)
    np.copyto(half, numbers.view(np.uint32), casting="unsafe")
    first = np.argsort(half.reshape(-1, row), axis=1, kind="stable")
    first += rows
    np.right_shift(numbers.view(np.uint32), 16, out=upper, casting="unsafe")
    upper.take(first.reshape(-1), out=half, mode="clip")  # any other mode copies the output
    second = np.argsort(half.reshape(-1, row), axis=1, kind="stable")
    second += rows
    order = workers.buffer("merge order", np.intp, size)
    first.reshape(-1).take(second.reshape(-1), out=order, mode="clip")
    return order.reshape(-1, row)
