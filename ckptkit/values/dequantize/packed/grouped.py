"""Scales and zero points of the groups of columns that integer schemes have: ``(code - zero) * scale``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.dequantize.model import BrokenPartError
from ckptkit.values.dequantize.scales import ScaleLayout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Groups", "combine_blocks", "rows_of_groups"]


@dataclass(frozen=True, slots=True)
class Groups:
    """The scale and the zero point of each group of each row.

    Attributes:
        layout: Which group each number has.
        scales: The scales, spread in the layout.
        zeros: The zero points in the same form, or None if the codes have none.
        index: The group of each column, or None if the groups follow each other.
    """

    layout: ScaleLayout
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.float32] | None = None
    index: npt.NDArray[np.int32] | None = None

    def apply(self, numbers: npt.NDArray[np.float32], first: int, workers: Workers, column: int = 0) -> None:
        """Turn the codes of the rows from ``first``, and of the columns from ``column``, into numbers, in place."""
        import numpy as np

        for operation, values in ((np.subtract, self.zeros), (np.multiply, self.scales)):
            if values is None:
                continue
            if self.index is None:
                self.layout.apply(operation, numbers, values, first, numbers, column)
                continue
            rows, columns = numbers.shape
            spread = workers.buffer("spread", np.float32, rows * columns).reshape(rows, columns)
            groups = values.reshape(-1, values.shape[-1])[first : first + rows]
            np.take(groups, self.index[column : column + columns], axis=1, out=spread, mode="clip")
            operation(numbers, spread, out=numbers)

    def magnitudes(self, bits: int) -> Magnitudes | None:
        """Return those of all numbers that codes of ``bits`` bits can be, unless zero points are not integers."""
        import numpy as np

        largest = float(1 << bits)
        if self.zeros is not None:
            if not np.array_equal(self.zeros, np.rint(self.zeros)):
                return None
            largest += Magnitudes.of(self.zeros).largest
        return Magnitudes(1, largest).times(Magnitudes.of(self.scales))

    def indexed(self, index: npt.NDArray[np.int32], role: str = "g_idx") -> Groups:
        """Return these groups with their columns in any order: ``index`` has the group of each column.

        Raises ``BrokenPartError`` for a group that does not exist.
        """
        import numpy as np

        most = self.scales.shape[-1]
        bad = int(np.count_nonzero((index < 0) | (index >= most)))
        if bad:
            raise BrokenPartError(
                role, f"has {bad:,} of {index.size:,} values that are not groups from 0 to {most - 1}"
            )
        in_order = np.arange(len(index)) // self.layout.blocks[-1]
        return self if most == 1 or np.array_equal(index, in_order) else replace(self, index=index)


def rows_of_groups(rows: int, columns: int, count: int, width: int) -> ScaleLayout:
    """Return the layout of ``count`` groups of ``width`` columns in each row."""
    return ScaleLayout((rows, columns), (1, width), (rows, count))


def combine_blocks(
    operation: np.ufunc, numbers: npt.NDArray[np.float32], start: int, values: npt.NDArray[np.float32], size: int
) -> None:
    """Combine the numbers of a flat weight from number ``start`` on with the values of blocks of ``size``, in place."""
    head = min(-start % size, len(numbers))
    block = start // size
    if head:
        operation(numbers[:head], values[block], out=numbers[:head])
        block += 1
    count = (len(numbers) - head) // size
    end = head + count * size
    whole = numbers[head:end].reshape(count, size)
    operation(whole, values[block : block + count, None], out=whole)
    if end < len(numbers):
        operation(numbers[end:], values[block + count], out=numbers[end:])
