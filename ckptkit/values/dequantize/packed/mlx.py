"""Weights of MLX: codes of 2 to 8 bits along the rows, times a scale and plus a bias for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.values.dequantize.model import (
    BrokenPartError,
    ElementwiseDecoder,
    Settings,
    floats_of,
    require_part,
    setting_int,
)
from ckptkit.values.dequantize.packed.bits import dense_range, unpack_dense
from ckptkit.values.dequantize.scales import ScaleLayout, scale_layout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Mlx", "mlx"]

_BITS = (2, 3, 4, 5, 6, 8)


class _Held(NamedTuple):
    scales: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Mlx(ElementwiseDecoder):
    """Codes in words of 32 bits, row by row without gaps.

    Source: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
    """

    bits: int
    layout: ScaleLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the words and the number of bits give."""
        return self.layout.shape

    @property
    def recorded(self) -> str | None:
        """The dtype of the scales, which is that of the weight."""
        return self.parts["scales"].dtype

    def prepare(self, whole: Mapping[str, memoryview]) -> _Held:
        """Return the scale and the bias of each group."""
        scales, biases = (
            self.layout.spread(floats_of(role, self.parts[role], whole[role])) for role in ("scales", "biases")
        )
        return _Held(scales, biases)

    def range_in_row(self, role: str, row: int, start: int, stop: int) -> tuple[int, int]:
        """Return the bytes of some codes of a row, which can end with bits that no code has."""
        return dense_range(self.range_of(role, row, row + 1)[0], self.bits, start, stop)

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Unpack some codes, multiply and add."""
        import numpy as np

        unpack_dense(np.frombuffer(streamed["codes"], np.uint8).reshape(len(out), -1), self.bits, 0, out, workers)
        self.layout.multiply(out, held.scales, row, out, start)
        self.layout.apply(np.add, out, held.biases, row, out, start)


def mlx(parts: Mapping[str, TensorInfo], settings: Settings) -> Mlx:
    """Return the decoder of these parts; the settings are ``bits`` and ``group_size``."""
    bits, size = setting_int(settings, "bits"), setting_int(settings, "group_size")
    if bits not in _BITS:
        raise BrokenPartError("codes", f"cannot be decoded: {bits} bits are not one of {_BITS}")
    codes = require_part(parts, "codes", ("U32",))
    scales = require_part(parts, "scales", PLAIN_FLOATS)
    require_part(parts, "biases", PLAIN_FLOATS, scales.shape)
    columns = codes.shape[-1] * 32 // bits if codes.shape else 0
    if len(codes.shape) != len(scales.shape) or len(codes.shape) < 2 or scales.shape[-1] * size != columns:
        raise BrokenPartError("scales", f"is {scales}, which does not fit {columns} columns in groups of {size}")
    shape = (*codes.shape[:-1], columns)
    return Mlx(parts, bits, scale_layout("scales", shape, scales, (1, size)))
