"""Weights of 8-bit floats or integers with scales: for the whole tensor, rows, columns, groups, or blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.casting import cast_bytes
from ckptkit.values.dequantize.model import E8M0, FLOATS, FP8, Decoder, Settings, floats_of, require_part
from ckptkit.values.dequantize.scales import ScaleLayout, scale_layout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Scaled", "scaled"]


@dataclass(frozen=True, slots=True)
class Scaled(Decoder):
    """Numbers of 8 bits, each times its scale.

    Whatever the scales are called, they multiply: ``weight_scale_inv`` is the inverse of what the weight was multiplied
    by when it was quantised. Scales can be powers of two of F8_E8M0.
    """

    layout: ScaleLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return self.parts["codes"].shape

    @property
    def recorded(self) -> str | None:
        """The dtype of the scales, if it is F16 or BF16."""
        found = self.parts["scales"].dtype
        return found if found in {"F16", "BF16"} else None

    def prepare(self, whole: Mapping[str, memoryview]) -> npt.NDArray[np.float32]:
        """Return the scales in their layout."""
        return self.layout.spread(floats_of("scales", self.parts["scales"], whole["scales"]))

    def decode(  # noqa: PLR0917
        self,
        first: int,
        last: int,  # noqa: ARG002 - ``out`` has as many rows
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Widen the codes, and multiply them."""
        import numpy as np

        wide = cast_bytes(streamed["codes"], self.parts["codes"].dtype, "F32", workers, "wide")
        self.layout.multiply(np.frombuffer(wide, np.float32).reshape(out.shape), held, first, out)


def scaled(parts: Mapping[str, TensorInfo], settings: Settings) -> Scaled:
    """Return the decoder of these parts; ``block`` of the settings has the sizes of a block."""
    codes = require_part(parts, "codes", FP8 | {"I8"})
    scales = require_part(parts, "scales", FLOATS | E8M0)
    block = settings.get("block", ())
    return Scaled(parts, scale_layout("scales", codes.shape, scales, block if isinstance(block, tuple) else ()))
