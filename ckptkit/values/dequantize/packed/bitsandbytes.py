"""Weights of bitsandbytes: nf4 and fp4 with plain or nested statistics, and int8 by rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.dequantize.model import (
    BrokenPartError,
    ElementwiseDecoder,
    Settings,
    floats_of,
    require_part,
    setting_int,
)
from ckptkit.values.dequantize.packed.bits import look_up
from ckptkit.values.dequantize.packed.grouped import combine_blocks
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["FourBits", "Int8Rows", "four_bits", "int8_rows"]

_BOOK, _BYTE_BOOK = 16, 256
_PER_127: Final = 7.874015718698502e-3  # as bitsandbytes writes 1 / 127
_DTYPES: Final = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class _Held(NamedTuple):
    book: tuple[float, ...]
    scales: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FourBits(ElementwiseDecoder):
    """Codes of 4 bits that name numbers of a book, two in a byte with the higher bits first, row after row.

    Each block of ``blocksize`` numbers of the flat weight has a scale, also across the ends of rows. Nested scales are
    codes themselves: of a book of 256 numbers, with scales of their own, and an offset.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes, ``dequantize_4bit``.
    """

    weight: tuple[int, ...]
    blocksize: int
    dtype: str | None
    nested_blocksize: int
    nested_offset: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the quant_state records."""
        return self.weight

    @property
    def recorded(self) -> str | None:
        """The dtype that the quant_state records."""
        return self.dtype

    def range_of(self, role: str, first: int, last: int) -> tuple[int, int]:
        """Return the bytes of some rows; the first and the last of them can belong to two rows."""
        return self.range_in_row(role, first, 0, (last - first) * self.grid[1])

    def range_in_row(self, role: str, row: int, start: int, stop: int) -> tuple[int, int]:  # noqa: ARG002 - of codes
        """Return the bytes of some numbers after the beginning of a row."""
        begin = row * self.grid[1]
        low = (begin + start) // 2
        return low, -(-(begin + stop) // 2) - low

    def prepare(self, whole: Mapping[str, memoryview]) -> _Held:
        """Return the book and the scale of each block."""
        import numpy as np

        book = floats_of("quant_map", self.parts["quant_map"], whole["quant_map"])
        if "nested_absmax" not in self.parts:
            return _Held(tuple(book.tolist()), floats_of("absmax", self.parts["absmax"], whole["absmax"]).reshape(-1))
        numbers = floats_of("nested_quant_map", self.parts["nested_quant_map"], whole["nested_quant_map"])
        outer = floats_of("nested_absmax", self.parts["nested_absmax"], whole["nested_absmax"]).reshape(-1)
        scales = numbers[np.frombuffer(whole["absmax"], np.uint8)]
        combine_blocks(np.multiply, scales, 0, outer, self.nested_blocksize)
        scales += np.float32(self.nested_offset)
        return _Held(tuple(book.tolist()), scales)

    def magnitudes(self, held: _Held) -> Magnitudes:
        """Return those of the products of any number of the book and any scale."""
        import numpy as np

        return Magnitudes.of(np.array(held.book)).times(Magnitudes.of(held.scales))

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Look up the numbers of the codes, and multiply each block by its scale."""
        import numpy as np

        packed = np.frombuffer(streamed["codes"], np.uint8)
        begin = row * self.grid[1] + start
        flat = out.reshape(-1)
        odd = begin % 2
        if not odd and not flat.size % 2:
            look_up(packed, held.book, flat, high_first=True)
        else:
            numbers = workers.buffer("unpacked", np.float32, 2 * len(packed))
            look_up(packed, held.book, numbers, high_first=True)
            np.copyto(flat, numbers[odd : odd + flat.size])
        combine_blocks(np.multiply, flat, begin, held.scales, self.blocksize)


def four_bits(parts: Mapping[str, TensorInfo], settings: Settings) -> FourBits:
    """Return the decoder of these parts; the settings are those of the quant_state."""
    shape, offset = settings.get("shape"), settings.get("nested_offset", 0.0)
    if not isinstance(shape, tuple) or not shape or min(shape) < 0:
        raise BrokenPartError("quant_state", f"has a shape of {shape!r}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise BrokenPartError("quant_state", f"has a nested_offset of {offset!r}")
    dtype = _DTYPES.get(str(settings.get("dtype")))
    made = FourBits(parts, shape, setting_int(settings, "blocksize"), dtype, 1, float(offset))
    count = math.prod(shape)
    codes = parts["codes"]
    if codes.nbytes != -(-count // 2):
        raise BrokenPartError(
            "codes", f"is {codes}, and {count:,} codes of a weight of {list(shape)} are {-(-count // 2):,} bytes"
        )
    require_part(parts, "quant_map", ("F32",), (_BOOK,))
    blocks = -(-count // made.blocksize)
    nested = "nested_absmax" in parts
    require_part(parts, "absmax", ("U8",) if nested else ("F32",))
    if parts["absmax"].elements != blocks:
        raise BrokenPartError("absmax", f"is {parts['absmax']}, and must have {blocks:,} elements")
    if not nested:
        return made
    size = setting_int(settings, "nested_blocksize")
    require_part(parts, "nested_quant_map", ("F32",), (_BYTE_BOOK,))
    require_part(parts, "nested_absmax", ("F32",))
    if parts["nested_absmax"].elements != -(-blocks // size):
        raise BrokenPartError(
            "nested_absmax", f"is {parts['nested_absmax']}, and must have {-(-blocks // size):,} elements"
        )
    return replace(made, nested_blocksize=size)


@dataclass(frozen=True, slots=True)
class Int8Rows(ElementwiseDecoder):
    """Integers of 8 bits, with the largest absolute value of each row in ``SCB``.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes, ``int8_vectorwise_dequant``.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return self.parts["codes"].shape

    def prepare(self, whole: Mapping[str, memoryview]) -> npt.NDArray[np.float32]:
        """Return the largest absolute value of each row."""
        return floats_of("scales", self.parts["scales"], whole["scales"]).reshape(-1, 1)

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,  # noqa: ARG002 - a row has one scale
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,  # noqa: ARG002 - no scratch memory is needed
    ) -> None:
        """Multiply in the order of bitsandbytes, which rounds twice."""
        import numpy as np

        codes = np.frombuffer(streamed["codes"], np.int8).reshape(out.shape)
        np.multiply(codes, held[row : row + len(out)], out=out)
        np.multiply(out, np.float32(_PER_127), out=out)


def int8_rows(parts: Mapping[str, TensorInfo], settings: Settings) -> Int8Rows:  # noqa: ARG001 - of every family
    """Return the decoder of these parts; nothing in the settings is needed."""
    made = Int8Rows(parts)
    require_part(parts, "codes", ("I8",))
    require_part(parts, "scales", ("F32", "F16", "BF16"))
    if len(made.shape) < 1 or parts["scales"].elements != made.grid[0]:
        raise BrokenPartError("scales", f"is {parts['scales']}, and must have {made.grid[0]:,} elements")
    return made
