"""Integers that are packed along the rows of a weight: ``pack-quantized`` of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.dequantize.model import (
    BrokenPartError,
    ElementwiseDecoder,
    Settings,
    floats_of,
    half_dtype,
    require_part,
    setting_int,
)
from ckptkit.values.dequantize.packed.bits import codes_in_words, dense_range, unpack_dense, unpack_words
from ckptkit.values.dequantize.packed.grouped import Groups
from ckptkit.values.dequantize.scales import ScaleLayout, scale_layout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["PackedRows", "packed_rows"]

_MOST_BITS = 8


@dataclass(frozen=True, slots=True)
class PackedRows(ElementwiseDecoder):
    """Codes of 1 to 8 bits in words of 32 bits, row by row, each the integer plus half of the range.

    With ``is_dense``, a code can cross two words; else the highest bits of each word can be a gap, as versions of
    compressed-tensors before 0.15 wrote them. Zero points are packed along the rows of the weight in the same way.

    Source: https://github.com/vllm-project/compressed-tensors, ``pack_to_int32``.
    """

    weight: tuple[int, ...]
    bits: int
    is_dense: bool
    layout: ScaleLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in ``weight_shape``."""
        return self.weight

    @property
    def recorded(self) -> str | None:
        """The dtype of the scales, which is that of the products."""
        return half_dtype(self.parts["scales"])

    def prepare(self, whole: Mapping[str, memoryview]) -> Groups:
        """Return the scales and zero points of each row."""
        import numpy as np

        scales = self.layout.spread(floats_of("scales", self.parts["scales"], whole["scales"]))
        found = Groups(self.layout, scales, self._zero_points(whole))
        if "g_idx" in self.parts:
            index = np.frombuffer(whole["g_idx"], np.int32)
            found = found if (index == -1).all() else found.indexed(index)
        return found

    def _zero_points(self, whole: Mapping[str, memoryview]) -> npt.NDArray[np.float32] | None:
        import numpy as np

        info = self.parts.get("zeros")
        if info is None:
            return None
        if info.dtype != "I32":
            return self.layout.spread(floats_of("zeros", info, whole["zeros"]))
        groups, height = info.shape[-1], self.weight[-2]
        words = np.frombuffer(whole["zeros"], np.uint32).reshape(-1, *info.shape[-2:]).transpose(0, 2, 1)
        made = np.empty((len(words) * groups, height), np.float32)
        self._unpack(np.ascontiguousarray(words).reshape(len(made), -1).view(np.uint8), made, Workers(1))
        return np.ascontiguousarray(made.reshape(-1, groups, height).transpose(0, 2, 1))

    def _unpack(self, packed: npt.NDArray[np.uint8], out: npt.NDArray[np.float32], workers: Workers) -> None:
        import numpy as np

        half = 1 << self.bits - 1
        if self.is_dense:
            unpack_dense(packed, self.bits, half, out, workers)
        else:
            unpack_words(packed.view(np.uint32), self.bits, half, out, workers)

    def magnitudes(self, held: Groups) -> Magnitudes | None:
        """Return those of all codes with any scale and zero point."""
        return held.magnitudes(self.bits)

    @property
    def splits_rows(self) -> bool:
        """Whether codes follow each other without gaps, so that each byte says which codes it has."""
        return self.is_dense

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
        """Unpack some codes, and apply scales and zero points."""
        import numpy as np

        self._unpack(np.frombuffer(streamed["codes"], np.uint8).reshape(len(out), -1), out, workers)
        held.apply(out, row, workers, start)


def packed_rows(parts: Mapping[str, TensorInfo], settings: Settings) -> PackedRows:
    """Return the decoder of these parts; the settings are ``bits``, ``shape`` and ``dense``."""
    bits, shape, dense = setting_int(settings, "bits"), settings.get("shape"), settings.get("dense", True)
    if not isinstance(shape, tuple) or len(shape) < 2 or min(shape) < 1:
        raise BrokenPartError("shape", f"has the values {shape!r}, which are not the shape of a weight")
    if bits > _MOST_BITS:
        raise BrokenPartError("codes", f"cannot be decoded: {bits} bits are more than {_MOST_BITS}")
    is_dense = bool(dense)
    require_part(parts, "codes", ("I32",), (*shape[:-1], codes_in_words(shape[-1], bits, is_dense=is_dense)))
    scales, zeros = require_part(parts, "scales", PLAIN_FLOATS), parts.get("zeros")
    groups = max(scales.shape[-1:], default=0) or 1
    if shape[-1] % groups and "group_size" not in settings:
        raise BrokenPartError("scales", f"is {scales}, and nothing says which columns of {list(shape)} a group has")
    layout = scale_layout("scales", shape, scales, (1, setting_int(settings, "group_size", shape[-1] // groups)))
    if layout.blocks[-2] not in (1, shape[-2]):
        raise BrokenPartError("scales", f"is {scales}, which does not fit a weight of {list(shape)}")
    if zeros is not None and zeros.dtype == "I32":
        high = codes_in_words(shape[-2], bits, is_dense=is_dense)
        require_part(parts, "zeros", ("I32",), (*shape[:-2], high, layout.counts[-1]))
    elif zeros is not None and (require_part(parts, "zeros", ("I8",)).shape != scales.shape):
        raise BrokenPartError("zeros", f"is {zeros}, which does not fit scales of {list(scales.shape)}")
    if "g_idx" in parts:
        require_part(parts, "g_idx", ("I32",), shape[-1:])
    return PackedRows(parts, shape, bits, is_dense, layout)
