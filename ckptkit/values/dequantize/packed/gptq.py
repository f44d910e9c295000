"""Weights of GPTQ: codes of 2, 3, 4 or 8 bits that are packed along the input features, and transposed."""

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
    floats_of,
    half_dtype,
    require_part,
    setting_int,
)
from ckptkit.values.dequantize.packed.bits import codes_in_words, transposed, unpack_dense, unpack_integers
from ckptkit.values.dequantize.packed.grouped import Groups, rows_of_groups
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Gptq", "gptq"]

_BITS = (2, 3, 4, 8)
_ZEROS = ("v1", "v2", "symmetric")


class _Held(NamedTuple):
    words: npt.NDArray[np.uint32]
    groups: Groups


@dataclass(frozen=True, slots=True)
class Gptq(Decoder):
    """Codes of (input features, output features), of which each column is a dense row of bits in words of 32 bits.

    ``zeros`` says what ``qzeros`` has: ``"v1"`` is each zero point less 1, ``"v2"`` the zero points. Codes that are
    ``"symmetric"`` have the middle of their range as zero point.

    Source: GPTQModel, https://github.com/ModelCloud/GPTQModel; the packing is that of https://arxiv.org/abs/2210.17323.
    """

    bits: int
    zeros: str
    width: int
    inputs: int
    streamed: ClassVar[tuple[str, ...]] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Output features and input features, as in ``torch.nn.Linear``."""
        return (self.parts["codes"].shape[1], self.inputs)

    @property
    def recorded(self) -> str | None:
        """The dtype of the scales, which is that of the products."""
        return half_dtype(self.parts["scales"])

    def prepare(self, whole: Mapping[str, memoryview]) -> _Held:
        """Return the words, and the scales and zero points by output feature."""
        import numpy as np

        outputs = self.shape[0]
        scales = np.ascontiguousarray(floats_of("scales", self.parts["scales"], whole["scales"]).T)[None]
        layout = rows_of_groups(*self.shape, scales.shape[-1], self.width)
        groups = Groups(layout, scales, self._zero_points(whole))
        if "g_idx" in self.parts:
            groups = groups.indexed(np.frombuffer(whole["g_idx"], np.int32))
        return _Held(np.frombuffer(whole["codes"], np.uint32).reshape(-1, outputs), groups)

    def _zero_points(self, whole: Mapping[str, memoryview]) -> npt.NDArray[np.float32] | None:
        import numpy as np

        if self.zeros == "symmetric":
            return None
        words = np.frombuffer(whole["zeros"], np.uint32).reshape(self.parts["zeros"].shape)
        if self.zeros == "v1" and self.bits != 3:
            # GPTQModel subtracts 1 from all codes of a word at once, and adds it so: a zero point of 0 borrows.
            words = words + np.uint32(sum(1 << place for place in range(0, 32, self.bits)))
        zeros = unpack_integers(words, self.bits, self.shape[0])
        if self.zeros == "v1" and self.bits == 3:
            zeros = (zeros + 1) % (1 << self.bits)
        return np.ascontiguousarray(zeros.T)[None]

    def magnitudes(self, held: _Held) -> Magnitudes | None:
        """Return those of all codes with any scale and zero point."""
        return held.groups.magnitudes(self.bits)

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
        import numpy as np

        words = transposed(held.words, first, last, workers)
        middle = 1 << self.bits - 1 if self.zeros == "symmetric" else 0
        unpack_dense(words.view(np.uint8), self.bits, middle, out, workers)
        held.groups.apply(out, first, workers)


def gptq(parts: Mapping[str, TensorInfo], settings: Settings) -> Gptq:
    """Return the decoder of these parts; the settings are ``bits``, ``zeros`` and, if need be, ``group_size``."""
    bits, zeros = setting_int(settings, "bits"), settings.get("zeros")
    if bits not in _BITS:
        raise BrokenPartError("codes", f"cannot be decoded: {bits} bits are not one of {_BITS}")
    if zeros not in _ZEROS:
        raise BrokenPartError("codes", f"cannot be decoded: zeros is {zeros!r}, and not one of {_ZEROS}")
    codes = require_part(parts, "codes", ("I32",)).shape
    scales = require_part(parts, "scales", PLAIN_FLOATS).shape
    if len(codes) != 2 or len(scales) != 2 or scales[1] != codes[1] or not scales[0]:
        raise BrokenPartError("scales", f"is {parts['scales']}, which does not fit codes of {list(codes)}")
    inputs = codes[0] * 32 // bits
    if "g_idx" in parts:
        inputs = require_part(parts, "g_idx", ("I32",)).elements
        if codes_in_words(inputs, bits) != codes[0]:
            raise BrokenPartError("g_idx", f"is {parts['g_idx']}, which does not fit codes of {list(codes)}")
    if zeros != "symmetric":
        require_part(parts, "zeros", ("I32",), (scales[0], codes_in_words(codes[1], bits)))
    if inputs % scales[0] and "group_size" not in settings and "g_idx" not in parts:
        raise BrokenPartError("scales", f"is {parts['scales']}, and nothing says which of {inputs} columns a group has")
    width = setting_int(settings, "group_size", -(-inputs // scales[0]))
    if -(-inputs // width) != scales[0]:
        raise BrokenPartError("scales", f"is {parts['scales']}: {inputs} columns are not as many groups of {width}")
    return Gptq(parts, bits, str(zeros), width, inputs)
