"""Weights of AWQ in the layout of its GEMM kernels: 4 bits, packed along the output features in their own order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.dequantize.model import (
    BrokenPartError,
    Decoder,
    Settings,
    UnknownFormError,
    floats_of,
    half_dtype,
    require_part,
)
from ckptkit.values.dequantize.packed.bits import transposed
from ckptkit.values.dequantize.packed.grouped import Groups, rows_of_groups
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Awq", "awq"]

_EACH, _BITS = 8, 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of 8 output features, in nibbles from the lowest


class _Held(NamedTuple):
    words: npt.NDArray[np.uint32]
    groups: Groups


@dataclass(frozen=True, slots=True)
class Awq(Decoder):
    """Codes of (input features, output features / 8).

    Source: AutoAWQ, https://github.com/casper-hansen/AutoAWQ, ``dequantize_gemm``.
    """

    width: int
    streamed: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Output features and input features, as in ``torch.nn.Linear``."""
        inputs, words = self.parts["codes"].shape
        return (words * _EACH, inputs)

    @property
    def multiple(self) -> int:
        """The number of output features in a word."""
        return _EACH

    @property
    def recorded(self) -> str | None:
        """The dtype of the scales, which is that of the products."""
        return half_dtype(self.parts["scales"])

    def prepare(self, whole: Mapping[str, memoryview]) -> _Held:
        """Return the words, and the scales and zero points by output feature."""
        import numpy as np

        scales = np.ascontiguousarray(floats_of("scales", self.parts["scales"], whole["scales"]).T)
        packed = np.frombuffer(whole["zeros"], np.uint32).reshape(self.parts["zeros"].shape)
        zeros = np.empty((packed.shape[1] * _EACH, len(packed)), np.float32)
        _unpack(np.ascontiguousarray(packed.T), zeros, Workers(1))
        words = np.frombuffer(whole["codes"], np.uint32).reshape(self.parts["codes"].shape)
        layout = rows_of_groups(*self.shape, scales.shape[1], self.width)
        return _Held(words, Groups(layout, scales[None], zeros[None]))

    def magnitudes(self, held: _Held) -> Magnitudes | None:
        """Return those of all codes with any scale and zero point."""
        return held.groups.magnitudes(_BITS)

    def decode(  # noqa: PLR0917
        self,
        first: int,
        last: int,
        streamed: Mapping[str, memoryview],  # noqa: ARG002 - the codes are held
        held: Any,
        out: npt.NDArray[np.float32],
        workers: Workers,
    ) -> None:
        """Transpose the words of some output features, unpack them, and apply scales and zero points."""
        _unpack(transposed(held.words, first // _EACH, -(-last // _EACH), workers), out, workers)
        held.groups.apply(out, first, workers)


def _unpack(words: npt.NDArray[np.uint32], out: npt.NDArray[np.float32], workers: Workers) -> None:
    """Fill 8 rows of ``out`` from each row of words."""
    import numpy as np

    shifted = workers.buffer("shifted", np.uint32, words.size).reshape(words.shape)
    for row, place in enumerate(_PLACES):
        np.right_shift(words, np.uint32(4 * place), out=shifted)
        np.bitwise_and(shifted, np.uint32(15), out=shifted)
        target = out[row::_EACH]
        np.copyto(target, shifted[: len(target)], casting="unsafe")


def awq(parts: Mapping[str, TensorInfo], settings: Settings) -> Awq:  # noqa: ARG001 - of every family
    """Return the decoder of these parts; nothing in the settings is needed."""
    if "g_idx" in parts:
        raise UnknownFormError("with input features in the order of activations")
    codes = require_part(parts, "codes", ("I32",)).shape
    scales = require_part(parts, "scales", PLAIN_FLOATS).shape
    fits = len(codes) == len(scales) == 2 and scales[1] == codes[1] * _EACH
    if not fits or not scales[0] or codes[0] % scales[0]:
        raise BrokenPartError("scales", f"is {parts['scales']}, which does not fit codes of {list(codes)}")
    require_part(parts, "zeros", ("I32",), (scales[0], codes[1]))
    return Awq(parts, codes[0] // scales[0])
