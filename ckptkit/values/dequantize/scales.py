"""Scales of a weight: one for all of it, for each row, column, group of columns, or block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.dequantize.model import BrokenPartError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["ScaleLayout", "scale_layout"]

_USUAL_BLOCK = 128  # of DeepSeek, and of nearly every model since


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """Which scale each number of a weight has: the sizes of the blocks along each dim, and the number of blocks."""

    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    counts: tuple[int, ...]

    def spread(self, scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return scales in their layout as (matrices, block rows, block columns); nothing is copied per number."""
        import numpy as np

        *leading, rows, columns = (1, 1, *self.counts)[-max(len(self.counts), 2) :]
        wanted = self.shape[: max(len(self.shape) - 2, 0)]
        full = scales.reshape(*leading[-len(wanted) :] if wanted else (), rows, columns)
        for dim, size in enumerate(wanted):
            block = self.blocks[dim]
            if full.shape[dim] != size:
                full = np.repeat(full, block, axis=dim)[(slice(None),) * dim + (slice(0, size),)]
        return np.ascontiguousarray(full.reshape(math.prod(wanted), rows, columns))

    def multiply(
        self,
        numbers: npt.NDArray[Any],
        spread: npt.NDArray[np.float32],
        first: int,
        out: npt.NDArray[np.float32],
        column: int = 0,
    ) -> None:
        """Multiply the rows of a block, which begins at the row ``first``, by their scales, into ``out``."""
        import numpy as np

        self.apply(np.multiply, numbers, spread, first, out, column)

    def apply(  # noqa: PLR0917 - a block, its place and what it is combined with
        self,
        operation: np.ufunc,
        numbers: npt.NDArray[Any],
        spread: npt.NDArray[Any],
        first: int,
        out: npt.NDArray[Any],
        column: int = 0,
    ) -> None:
        """Combine the rows of a block, which begins at the row ``first``, with their scales or zero points.

        The block has the columns from ``column`` on.
        """
        import numpy as np

        rows = self.shape[-2] if len(self.shape) > 1 else 1
        columns = numbers.shape[1]
        tall, wide = (1, 1, *self.blocks)[-2:]
        last = first + len(numbers)
        at = first
        while at < last:
            matrix, row = divmod(at, rows)
            if tall == 1:
                end = min(at + rows - row, last)
                scales = spread[matrix, row : row + end - at]
            else:
                end = min(at + tall - row % tall, at + rows - row, last)
                scales = spread[matrix, row // tall : row // tall + 1]
            block = slice(at - first, end - first)
            if scales.shape[1] > 1:
                scales = scales[:, column // wide : -(-(column + columns) // wide)]
            if scales.shape[1] in (1, columns):
                operation(numbers[block], scales, out=out[block])
            elif columns % wide == column % wide == 0:
                grouped = (end - at, scales.shape[1], wide)
                operation(numbers[block].reshape(grouped), scales[:, :, None], out=out[block].reshape(grouped))
            else:
                groups = np.arange(column, column + columns) // wide - column // wide
                operation(numbers[block], np.take(scales, groups, axis=1), out=out[block])
            at = end


def scale_layout(role: str, shape: Sequence[int], scales: TensorInfo, usual: Sequence[int] = ()) -> ScaleLayout:
    """Return the layout of scales of a weight of this shape; ``usual`` are the sizes of the last dims of a block.

    Scales of fewer dims belong to the first dims of the weight, or if there are as many as columns, to the columns.
    Without ``usual``, blocks have 128 rows and columns if that gives as many scales, else all have the same size.
    Raises ``BrokenPartError`` for scales that fit in no way.
    """
    counts = _aligned(tuple(shape), scales.shape)
    is_known = bool(usual)
    usual = (*(1,) * (len(shape) - len(usual)), *usual[-len(shape) :]) if usual else (_USUAL_BLOCK,) * len(shape)
    blocks: list[int] = []
    for dim, (size, count) in enumerate(zip(shape, counts or (), strict=True) if counts is not None else ()):
        if count == size:
            blocks.append(1)
        elif count == 1:
            blocks.append(size)
        elif count == -(-size // usual[dim]):
            blocks.append(usual[dim])
        elif not is_known and count and size % count == 0 and len(scales.shape) == len(shape):
            blocks.append(size // count)
        else:
            break
    if counts is None or len(blocks) < len(shape):
        sizes = f" in blocks of {list(usual)}" if is_known else ""
        raise BrokenPartError(role, f"is {scales}, which does not fit a weight of {list(shape)}{sizes}")
    return ScaleLayout(tuple(shape), tuple(blocks), counts)


def _aligned(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the number of scales along each dim of the weight, or None where that cannot be."""
    if math.prod(scales) == 1:
        return (1,) * len(shape)
    if len(scales) > len(shape):
        return None
    if len(scales) == 1 and len(shape) > 1 and scales[0] == shape[-1] != shape[0]:
        return (*(1,) * (len(shape) - 1), shape[-1])
    return (*scales, *(1,) * (len(shape) - len(scales)))
