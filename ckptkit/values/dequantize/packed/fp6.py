"""Weights of 6-bit floats, one code in each byte, with a power of two for each group of columns: MX of torchao."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.values.dequantize.model import (
    E8M0,
    BrokenPartError,
    ElementwiseDecoder,
    Settings,
    floats_of,
    require_part,
    setting_int,
)
from ckptkit.values.dequantize.scales import ScaleLayout, scale_layout
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Float6", "float6"]

_CODES: Final = 64
_DTYPES: Final = {"e2m3": "float6_e2m3fn", "e3m2": "float6_e3m2fn"}


@functools.cache
def _numbers(kind: str) -> npt.NDArray[np.float32]:
    import ml_dtypes
    import numpy as np

    codes = np.arange(_CODES, dtype=np.uint8)
    values: npt.NDArray[np.float32] = codes.view(getattr(ml_dtypes, _DTYPES[kind])).astype(np.float32)
    values.flags.writeable = False
    return values


@dataclass(frozen=True, slots=True)
class Float6(ElementwiseDecoder):
    """Numbers of 6 bits in the lower bits of a byte, each times the scale of its group.

    Source: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
    """

    layout: ScaleLayout
    kind: str
    dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return self.parts["codes"].shape

    @property
    def recorded(self) -> str | None:
        """The dtype that the settings say, or None."""
        return self.dtype

    def prepare(self, whole: Mapping[str, memoryview]) -> npt.NDArray[np.float32]:
        """Return the scale of each group."""
        return self.layout.spread(floats_of("scales", self.parts["scales"], whole["scales"]))

    def decode_columns(  # noqa: PLR0917
        self,
        row: int,
        start: int,
        streamed: Mapping[str, memoryview],
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,  # noqa: ARG002
    ) -> None:
        """Look up the numbers, and multiply them. Raises ``BrokenPartError`` for a code of more than 6 bits."""
        import numpy as np

        codes = np.frombuffer(streamed["codes"], np.uint8)
        if codes.size and int(codes.max()) >= _CODES:
            bad = int(np.count_nonzero(codes >= _CODES))
            raise BrokenPartError(
                "codes", f"has {bad:,} of {codes.size:,} codes in a block that are above {_CODES - 1}"
            )
        np.take(_numbers(self.kind), codes, out=out.reshape(-1), mode="clip")
        self.layout.multiply(out, held, row, out, start)


def float6(parts: Mapping[str, TensorInfo], settings: Settings) -> Float6:
    """Return the decoder of these parts; the settings are ``kind``, ``group_size`` and ``dtype``."""
    kind, dtype = settings.get("kind"), settings.get("dtype")
    if kind not in _DTYPES:
        raise BrokenPartError("codes", f"cannot be decoded: kind is {kind!r}, and not one of {', '.join(_DTYPES)}")
    codes, scales = require_part(parts, "codes", ("U8",)), require_part(parts, "scales", E8M0)
    layout = scale_layout("scales", codes.shape, scales, (1, setting_int(settings, "group_size")))
    return Float6(parts, layout, str(kind), dtype if isinstance(dtype, str) else None)
