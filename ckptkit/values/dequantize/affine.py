"""Tensors that torch itself quantised: integers, less a zero point, times a scale, for all or for each slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.arrays import numpy_dtype
from ckptkit.values.dequantize.model import BrokenPartError, ElementwiseDecoder, Settings, require_part
from ckptkit.values.dequantize.scales import ScaleLayout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Affine", "affine"]

_INTEGERS: Final = {"QI8": "I8", "QU8": "U8", "QI32": "I32"}


@dataclass(frozen=True, slots=True)
class Affine(ElementwiseDecoder):
    """A tensor of torch with one scale and zero point, or one for each slice along a dim."""

    layout: ScaleLayout
    scales: tuple[float, ...]
    zeros: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.parts["codes"].shape

    @property
    def recorded(self) -> str:
        """The dtype that ``Tensor.dequantize`` gives."""
        return "F32"

    def prepare(self, whole: Mapping[str, memoryview]) -> Any:  # noqa: ARG002 - the plan has the scales
        """Return scales and zero points in their layout."""
        import numpy as np

        dtype = np.float32 if len(self.scales) == 1 else np.float64
        spread = [np.array(values, dtype).reshape(self.layout.counts) for values in (self.scales, self.zeros)]
        return tuple(self.layout.spread(values) for values in spread)

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Subtract and multiply as torch does: in float32 with one scale, in float64 with several."""
        import numpy as np

        scales, zeros = held
        code = numpy_dtype(_INTEGERS[self.parts["codes"].dtype])
        wide = out
        if scales.dtype != out.dtype:
            wide = workers.buffer("float64", scales.dtype, out.size).reshape(out.shape)
        np.copyto(wide, np.frombuffer(streamed["codes"], code).reshape(out.shape))
        self.layout.apply(np.subtract, wide, zeros, row, wide, start)
        self.layout.apply(np.multiply, wide, scales, row, wide, start)
        if wide is not out:
            np.copyto(out, wide, casting="same_kind")


def affine(parts: Mapping[str, TensorInfo], settings: Settings) -> Affine:
    """Return the decoder; the settings have ``scales``, ``zeros`` and ``axis``, which is -1 for one scale."""
    codes = require_part(parts, "codes", tuple(_INTEGERS))
    scales, zeros, axis = settings.get("scales"), settings.get("zeros"), settings.get("axis", -1)
    if not isinstance(scales, tuple) or not isinstance(zeros, tuple) or not isinstance(axis, int):
        raise BrokenPartError("codes", "has no scales and zero points")
    if not -1 <= axis < len(codes.shape):
        raise BrokenPartError("codes", f"is {codes}, and has no dim {axis} of scales")
    counts = tuple(size if dim == axis else 1 for dim, size in enumerate(codes.shape))
    count = 1 if axis < 0 else codes.shape[axis]
    if len(scales) != count or len(zeros) != count:
        raise BrokenPartError("codes", f"has {len(scales)} scales and {len(zeros)} zero points in place of {count}")
    if not all(abs(value) < float("inf") for value in scales):
        raise BrokenPartError("codes", "has scales that are NaN or infinite")
    blocks = tuple(1 if dim == axis else size for dim, size in enumerate(codes.shape))
    return Affine(parts, ScaleLayout(codes.shape, blocks, counts), tuple(map(float, scales)), tuple(map(float, zeros)))
