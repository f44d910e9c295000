"""Signed integers of 4 bits, two in a byte, with scales and offsets by groups of columns: Int4Tensor of torchao."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.values.dequantize.model import (
    BrokenPartError,
    ElementwiseDecoder,
    Settings,
    floats_of,
    half_dtype,
    require_part,
    setting_int,
)
from ckptkit.values.dequantize.packed.bits import look_up
from ckptkit.values.dequantize.scales import ScaleLayout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Nibbles", "nibbles"]

_BOOK: Final = tuple(float(code - 16 if code > 7 else code) for code in range(16))  # of two's complement


class _Held(NamedTuple):
    scales: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Nibbles(ElementwiseDecoder):
    """Codes from -8 to 7, the first of each byte in its lower bits, times a scale and plus an offset.

    Scales and offsets are stored transposed: (groups, output features). What torchao calls a zero point is the offset,
    a number of the weight.

    Source: https://github.com/pytorch/ao, ``Int4Tensor``; its codes are made by ``int4_row_quantize_zp`` of
    https://github.com/pytorch/FBGEMM.
    """

    layout: ScaleLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes, of which a byte has two."""
        return self.layout.shape

    @property
    def recorded(self) -> str | None:
        """The dtype of the scales, which is that of the weight."""
        return half_dtype(self.parts["scales"])

    def prepare(self, whole: Mapping[str, memoryview]) -> _Held:
        """Return the scale and the offset of each group."""
        import numpy as np

        scales, offsets = (
            self.layout.spread(np.ascontiguousarray(floats_of(role, self.parts[role], whole[role]).swapaxes(-1, -2)))
            for role in ("scales", "zeros")
        )
        return _Held(scales, offsets)

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,  # noqa: ARG002
    ) -> None:
        """Look up the codes, multiply and add."""
        import numpy as np

        look_up(np.frombuffer(streamed["codes"], np.uint8), _BOOK, out.reshape(-1), high_first=False)
        self.layout.multiply(out, held.scales, row, out, start)
        self.layout.apply(np.add, out, held.offsets, row, out, start)


def nibbles(parts: Mapping[str, TensorInfo], settings: Settings) -> Nibbles:
    """Return the decoder of these parts; the setting is ``group_size``."""
    size = setting_int(settings, "group_size")
    codes = require_part(parts, "codes", ("I8", "U8"))
    if len(codes.shape) < 2:
        raise BrokenPartError("codes", f"is {codes}, and not rows of codes")
    *leading, rows, half = codes.shape
    groups = -(-2 * half // size)
    for role in ("scales", "zeros"):
        require_part(parts, role, PLAIN_FLOATS, (*leading, groups, rows))
    blocks, counts = (*(1,) * len(leading), 1, size), (*leading, rows, groups)
    return Nibbles(parts, ScaleLayout((*leading, rows, 2 * half), blocks, counts))
