"""Weights of 4-bit floats: MX formats with a power of two for 32 numbers, and nvfp4 with two levels of scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.values.arrays import float4_values
from ckptkit.values.dequantize.model import (
    E8M0,
    BrokenPartError,
    ElementwiseDecoder,
    Settings,
    floats_of,
    require_part,
)
from ckptkit.values.dequantize.packed.bits import look_up
from ckptkit.values.dequantize.scales import ScaleLayout, scale_layout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "Float4",
    "Float4Blocks",
    "mxfp4",
    "mxfp4_blocks",
    "mxfp4_blocks_transposed",
    "nvfp4",
    "nvfp4_divided",
    "nvfp4_without_global",
]

_PACKED = frozenset({"U8", "I8", "F4"})
_OF_NVFP4, _OF_MX = 16, 32  # numbers for each scale


@dataclass(frozen=True, slots=True)
class Float4(ElementwiseDecoder):
    """Two numbers in each byte, the first in its lower half, each times the scale of its group.

    With a global scale, the scale of a group is multiplied by it, or divided, before it is used.
    """

    layout: ScaleLayout
    divides: bool = False
    dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return self.layout.shape

    @property
    def recorded(self) -> str | None:
        """The dtype that the settings say, or None."""
        return self.dtype

    def prepare(self, whole: Mapping[str, memoryview]) -> npt.NDArray[np.float32]:
        """Return the scale of each group."""
        scales: npt.NDArray[np.float32] = self.layout.spread(floats_of("scales", self.parts["scales"], whole["scales"]))
        if "global" not in whole:
            return scales
        common = floats_of("global", self.parts["global"], whole["global"]).reshape(-1, 1, 1)
        if self.divides and not common.all():
            raise BrokenPartError("global", "is 0, and the scales are divided by it")
        return scales / common if self.divides else scales * common

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,  # noqa: ARG002
    ) -> None:
        """Look up the numbers, and multiply them."""
        import numpy as np

        look_up(np.frombuffer(streamed["codes"], np.uint8), float4_values().tolist(), out.reshape(-1), high_first=False)
        self.layout.multiply(out, held, row, out, start)


@dataclass(frozen=True, slots=True)
class Float4Blocks(Float4):
    """The blocks of gpt-oss: 16 bytes for each scale; in the files of transformers, the weight is the transpose."""

    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        *leading, rows, columns = self.layout.shape
        return (*leading, columns, rows) if self.is_transposed else self.layout.shape

    @property
    def multiple(self) -> int:
        """The number of rows that share scales where the weight is transposed, since they are columns of the codes."""
        return _OF_MX if self.is_transposed else 1

    @property
    def splits_rows(self) -> bool:
        """A row of the transpose is a column of the codes."""
        return not self.is_transposed

    @property
    def rows_together(self) -> int:
        """All rows of a matrix where it is transposed."""
        return self.layout.shape[-1] if self.is_transposed else 1

    def range_of(self, role: str, first: int, last: int) -> tuple[int, int]:  # noqa: ARG002 - only codes are streamed
        """Return the bytes of whole matrices, or of rows."""
        rows, columns = self.layout.shape[-2:]
        if not self.is_transposed:
            width = columns // 2
            return first * width, (last - first) * width
        matrix = rows * columns // 2
        start = first // columns
        return start * matrix, (-(-last // columns) - start) * matrix

    def decode(  # noqa: PLR0917
        self,
        first: int,
        last: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Decode the rows as they are stored; or some columns of each matrix of codes, which are transposed."""
        import numpy as np

        if not self.is_transposed:
            Float4.decode(self, first, last, streamed, held, out, workers)
            return
        rows, columns = self.layout.shape[-2:]
        matrices = np.frombuffer(streamed["codes"], np.uint8).reshape(-1, rows, columns // 2)
        at = first
        while at < last:
            number, begin = divmod(at, columns)
            end = min(begin + last - at, columns)
            part = matrices[number - first // columns, :, begin // 2 : -(-end // 2)]
            codes = workers.buffer("codes of a matrix", np.uint8, part.size).reshape(part.shape)
            np.copyto(codes, part)
            wide = workers.buffer("matrix", np.float32, 2 * part.size).reshape(rows, -1)
            self.decode_columns(number * rows, begin, {"codes": codes.data.cast("B")}, held, wide, workers)
            np.copyto(out[at - first : at - first + end - begin], wide.T[: end - begin])
            at += end - begin


def _packed(parts: Mapping[str, TensorInfo], group: int) -> ScaleLayout:
    """Return the layout of scales for groups of the last dim, of which codes in bytes have half the size."""
    codes, scales = require_part(parts, "codes", _PACKED), parts["scales"]
    if not codes.shape:
        raise BrokenPartError("codes", f"is {codes}, and has no dim of groups")
    shape = codes.shape if codes.dtype == "F4" else (*codes.shape[:-1], 2 * codes.shape[-1])
    if shape[-1] % 2:
        raise BrokenPartError("codes", f"is {codes}, an odd number of codes in each row")
    wanted = (*shape[:-1], -(-shape[-1] // group))
    if scales.shape != wanted:
        raise BrokenPartError("scales", f"is {scales}, and must be {list(wanted)} for groups of {group}")
    return scale_layout("scales", shape, scales, (group,))


def mxfp4(parts: Mapping[str, TensorInfo], settings: Settings) -> Float4:
    """Return the decoder of codes with a power of two for each 32 numbers of a row."""
    require_part(parts, "scales", E8M0)
    return Float4(parts, _packed(parts, _OF_MX), dtype=_dtype(settings))


def nvfp4(parts: Mapping[str, TensorInfo], settings: Settings) -> Float4:
    """Return the decoder of codes with an E4M3 scale for each 16 numbers of a row, times a global scale."""
    return _with_global(parts, settings, divides=False)


def nvfp4_divided(parts: Mapping[str, TensorInfo], settings: Settings) -> Float4:
    """Return the decoder of codes with an E4M3 scale for each 16 numbers of a row, divided by a global scale."""
    return _with_global(parts, settings, divides=True)


def nvfp4_without_global(parts: Mapping[str, TensorInfo], settings: Settings) -> Float4:
    """Return the decoder of codes with an E4M3 scale for each 16 numbers of a row, and no other scale."""
    require_part(parts, "scales", ("F8_E4M3",))
    return Float4(parts, _packed(parts, _OF_NVFP4), dtype=_dtype(settings))


def _dtype(settings: Settings) -> str | None:
    found = settings.get("dtype")
    return found if isinstance(found, str) else None


def _with_global(parts: Mapping[str, TensorInfo], settings: Settings, *, divides: bool) -> Float4:
    require_part(parts, "scales", ("F8_E4M3",))
    common = require_part(parts, "global", PLAIN_FLOATS)
    layout = _packed(parts, _OF_NVFP4)
    if common.elements not in {1, math.prod(layout.shape[:-2])}:
        raise BrokenPartError("global", f"is {common}, and not one scale, or one for each matrix")
    return Float4(parts, layout, divides, _dtype(settings))


def mxfp4_blocks(parts: Mapping[str, TensorInfo], settings: Settings) -> Float4:  # noqa: ARG001
    """Return the decoder of ``[..., rows, groups, 16]`` bytes."""
    return _blocks(parts, is_transposed=False)


def mxfp4_blocks_transposed(parts: Mapping[str, TensorInfo], settings: Settings) -> Float4:  # noqa: ARG001
    """Return the decoder of ``[..., rows, groups, 16]`` bytes of the transpose of a weight."""
    return _blocks(parts, is_transposed=True)


def _blocks(parts: Mapping[str, TensorInfo], *, is_transposed: bool) -> Float4Blocks:
    codes = require_part(parts, "codes", ("U8",))
    half = _OF_MX // 2
    if len(codes.shape) < 3 or codes.shape[-1] != half:
        raise BrokenPartError("codes", f"is {codes}, and not rows of blocks of {half} bytes")
    scales = require_part(parts, "scales", ("U8",), codes.shape[:-1])
    shape = (*codes.shape[:-2], codes.shape[-2] * _OF_MX)
    return Float4Blocks(parts, scale_layout("scales", shape, scales, (_OF_MX,)), is_transposed=is_transposed)
