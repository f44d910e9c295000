"""Weights of HQQ: groups of rows or columns, whose codes are packed with those of far parts of the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS, dtype_code
from ckptkit.values.dequantize.model import BrokenPartError, ElementwiseDecoder, Settings, floats_of, require_part
from ckptkit.values.dequantize.packed.grouped import combine_blocks
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Hqq", "hqq"]

_PACKINGS: Final = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "2bit_u8": (2, 4), "1bit_u8": (1, 8), "3bit_32": (3, 10)}


class _Held(NamedTuple):
    packed: npt.NDArray[Any]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Hqq(ElementwiseDecoder):
    """Codes of a matrix of groups: a group is a row of it, or with ``axis`` 0 a column.

    An item of the packed codes has one code of each of several equal parts of the matrix, the first part in the highest
    bits. Zero points are floats.

    Source: https://github.com/mobiusml/hqq, ``BitPack`` and ``Quantizer.dequantize``.
    """

    weight: tuple[int, ...]
    bits: int
    each: int
    axis: int
    dtype: str | None
    streamed: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the parts record."""
        return self.weight

    @property
    def recorded(self) -> str | None:
        """The dtype in which HQQ computes."""
        return self.dtype

    def prepare(self, whole: Mapping[str, memoryview]) -> _Held:
        """Return the packed codes, and the scale and the zero point of each group."""
        import numpy as np

        scales, zeros = (floats_of(role, self.parts[role], whole[role]).reshape(-1) for role in ("scales", "zeros"))
        return _Held(np.frombuffer(whole["codes"], np.uint32 if self.each > 8 else np.uint8), scales, zeros)

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],  # noqa: ARG002 - the codes are held
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Take the codes out of each part that the numbers are in, and apply scales and zero points."""
        import numpy as np

        flat = out.reshape(-1)
        start += row * self.grid[1]
        stop = start + flat.size
        size = len(held.packed)  # of a part of the matrix
        shifted = workers.buffer("shifted", held.packed.dtype, flat.size)
        for part in range(start // size, -(-stop // size)):
            begin, end = max(start, part * size), min(stop, (part + 1) * size)
            codes = shifted[: end - begin]
            place = held.packed.dtype.type(self.bits * (self.each - 1 - part))
            np.right_shift(held.packed[begin - part * size : end - part * size], place, out=codes)
            np.bitwise_and(codes, held.packed.dtype.type((1 << self.bits) - 1), out=codes)
            flat[begin - start : end - start] = codes
        groups = len(held.scales)
        for operation, values in ((np.subtract, held.zeros), (np.multiply, held.scales)):
            if self.axis:
                combine_blocks(operation, flat, start, values, math.prod(self.weight) // groups)
            else:
                operation(flat, np.take(values, np.arange(start, stop), mode="wrap"), out=flat)


def hqq(parts: Mapping[str, TensorInfo], settings: Settings) -> Hqq:
    """Return the decoder of these parts; the settings are ``shape``, ``packing``, ``axis`` and ``dtype``."""
    shape, packing, axis = (settings.get(name) for name in ("shape", "packing", "axis"))
    if not isinstance(shape, tuple) or not shape or min(shape) < 1:
        raise BrokenPartError("shape", f"has the values {shape!r}, which are not the shape of a weight")
    if not isinstance(packing, str) or packing not in _PACKINGS:
        raise BrokenPartError("packing", f"is {packing!r}, and not one of {', '.join(_PACKINGS)}")
    if axis not in (0, 1):
        raise BrokenPartError("axis", f"is {axis!r}, and must be 0 or 1")
    bits, each = _PACKINGS[packing]
    scales = require_part(parts, "scales", PLAIN_FLOATS)
    require_part(parts, "zeros", PLAIN_FLOATS, scales.shape)
    count, groups = math.prod(shape), scales.elements
    if not groups or count % groups:
        raise BrokenPartError("scales", f"is {scales}, which does not fit a weight of {list(shape)}")
    rows, columns = (groups, count // groups) if axis else (count // groups, groups)
    codes = require_part(parts, "codes", PLAIN_FLOATS | {"U8", "I32"})
    wanted = -(-rows // each) * columns * (4 if packing == "3bit_32" else 1)
    if codes.nbytes != wanted or (rows % each and packing != "3bit_32"):
        raise BrokenPartError("codes", f"is {codes}, which does not fit {packing} of a weight of {list(shape)}")
    return Hqq(parts, shape, bits, each, int(axis), dtype_code(str(settings.get("dtype"))))
