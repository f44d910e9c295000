"""Weights of MLX: codes of 2 to 8 bits along the rows, times a scale and plus a bias for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.values.dequantize.model import (
    BrokenPartError,
    Decoder,
    Settings,
    floats_of,
    require_part,
    setting_int,
)
from ckptkit.values.dequantize.packed.bits import unpack_dense
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
class Mlx(Decoder):
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

    def decode(  # noqa: PLR0917
        self,
        first: int,
        last: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Unpack some rows, multiply and add."""
        import numpy as np

        packed = np.frombuffer(streamed["codes"], np.uint8).reshape(last - first, -1)
        unpack_dense(packed, self.bits, 0, out, workers)
        self.layout.multiply(out, held.scales, first, out)
        self.layout.apply(np.add, out, held.biases, first, out)


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
