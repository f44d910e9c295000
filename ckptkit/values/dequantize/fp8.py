"""Weights of 8-bit floats or integers with scales: for the whole tensor, rows, columns, groups, or blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.values.casting import are_finite, cast_bytes
from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.dequantize.model import (
    E8M0,
    FP8,
    ElementwiseDecoder,
    Settings,
    UnknownFormError,
    floats_of,
    half_dtype,
    require_part,
)
from ckptkit.values.dequantize.scales import ScaleLayout, scale_layout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Scaled", "scaled"]

_INTEGERS = frozenset({"I8", "I16", "I32", "I64"})


class _Held(NamedTuple):
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Scaled(ElementwiseDecoder):
    """Numbers of 8 bits, each less its zero point if there is one, and times its scale.

    Whatever the scales are called, they multiply: ``weight_scale_inv`` is the inverse of what the weight was multiplied
    by when it was quantised. Scales can be powers of two of F8_E8M0.
    """

    layout: ScaleLayout
    zeros: ScaleLayout | None = None
    dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return self.parts["codes"].shape

    @property
    def recorded(self) -> str | None:
        """The dtype that the settings say, else that of the scales if it is F16 or BF16."""
        return self.dtype or half_dtype(self.parts["scales"])

    def infinite_codes(self, streamed: Mapping[str, memoryview]) -> int:
        """Return the number of codes of 8-bit floats that are NaN or inf."""
        import numpy as np

        dtype = self.parts["codes"].dtype
        if dtype not in FP8 or are_finite(np.frombuffer(streamed["codes"], np.uint8), dtype):
            return 0
        numbers = np.frombuffer(cast_bytes(streamed["codes"], dtype, "F32", Workers(1)), np.float32)
        return numbers.size - int(np.count_nonzero(np.isfinite(numbers)))

    def prepare(self, whole: Mapping[str, memoryview]) -> _Held:
        """Return the scales and zero points in their layouts."""
        scales = self.layout.spread(floats_of("scales", self.parts["scales"], whole["scales"]))
        if self.zeros is None:
            return _Held(scales, None)
        return _Held(scales, self.zeros.spread(floats_of("zeros", self.parts["zeros"], whole["zeros"])))

    def magnitudes(self, held: _Held) -> Magnitudes | None:
        """Return those of the products of any code and any scale, unless there are zero points."""
        import numpy as np

        if held.zeros is not None:
            return None
        every = cast_bytes(memoryview(bytes(range(256))), self.parts["codes"].dtype, "F32", Workers(1))
        codes = np.frombuffer(every, np.float32)
        return Magnitudes.of(codes[np.isfinite(codes)]).times(Magnitudes.of(held.scales))

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Widen the codes, subtract the zero points, and multiply."""
        import numpy as np

        wide = cast_bytes(streamed["codes"], self.parts["codes"].dtype, "F32", workers, "wide")
        numbers = np.frombuffer(wide, np.float32).reshape(out.shape)
        if self.zeros is not None:
            self.zeros.apply(np.subtract, numbers, held.zeros, row, out, start)
            numbers = out
        self.layout.multiply(numbers, held.scales, row, out, start)


def scaled(parts: Mapping[str, TensorInfo], settings: Settings) -> Scaled:
    """Return the decoder of these parts; the settings can have ``block``, the sizes of a block, and ``dtype``."""
    codes = require_part(parts, "codes", FP8 | {"I8"})
    scales = require_part(parts, "scales", PLAIN_FLOATS | E8M0)
    if "g_idx" in parts:
        raise UnknownFormError("with columns in the order of activations")
    block = settings.get("block", ())
    usual = block if isinstance(block, tuple) else ()
    layout, zeros = scale_layout("scales", codes.shape, scales, usual), None
    if "zeros" in parts:
        zeros = scale_layout("zeros", codes.shape, require_part(parts, "zeros", PLAIN_FLOATS | FP8 | _INTEGERS), usual)
    dtype = settings.get("dtype")
    return Scaled(parts, layout, zeros, dtype if isinstance(dtype, str) else None)
