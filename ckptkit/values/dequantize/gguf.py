"""Decode the tensors of GGUF files that are stored in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import BLOCK_TYPES
from ckptkit.values.dequantize import gguf_blocks, gguf_iq, gguf_k
from ckptkit.values.dequantize.magnitudes import Magnitudes
from ckptkit.values.dequantize.model import BrokenPartError, Decoder, Settings, UnknownFormError
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ckptkit.values.dequantize.gguf_blocks import Blocks, Values

__all__ = ["BLOCK_DECODERS", "InBlocks", "in_blocks"]

# Numbers that are decoded at once: their buffers stay in the cache, and threads seldom wait for each other.
_PIECE: Final = 1 << 17
# Scales of F16 and E4M3 are multiples of 2 ** -24 below 2 ** 16. Their factors are multiples of 1 / 8 below 2 ** 12, so
# all numbers, and differences of them, are multiples of 2 ** -27.
_MAGNITUDES: Final = Magnitudes(2.0**-27, 2.0**29)
_OTHER_SCALES: Final = frozenset({"Q8_K", "MXFP4"})
# Q8_1 is missing: llama.cpp keeps activations in it, in two layouts, and never weights.
BLOCK_DECODERS: Final[Mapping[str, Callable[[Blocks, Values], None]]] = {
    "Q1_0": gguf_blocks.decode_q1_0,
    "Q4_0": gguf_blocks.decode_q4_0,
    "Q4_1": gguf_blocks.decode_q4_1,
    "Q5_0": gguf_blocks.decode_q5_0,
    "Q5_1": gguf_blocks.decode_q5_1,
    "Q8_0": gguf_blocks.decode_q8_0,
    "Q8_K": gguf_blocks.decode_q8_k,
    "MXFP4": gguf_blocks.decode_mxfp4,
    "NVFP4": gguf_blocks.decode_nvfp4,
    "TQ1_0": gguf_blocks.decode_tq1_0,
    "TQ2_0": gguf_blocks.decode_tq2_0,
    "Q2_K": gguf_k.decode_q2_k,
    "Q3_K": gguf_k.decode_q3_k,
    "Q4_K": gguf_k.decode_q4_k,
    "Q5_K": gguf_k.decode_q5_k,
    "Q6_K": gguf_k.decode_q6_k,
    "IQ1_S": gguf_iq.decode_iq1_s,
    "IQ1_M": gguf_iq.decode_iq1_m,
    "IQ2_XXS": gguf_iq.decode_iq2_xxs,
    "IQ2_XS": gguf_iq.decode_iq2_xs,
    "IQ2_S": gguf_iq.decode_iq2_s,
    "IQ3_XXS": gguf_iq.decode_iq3_xxs,
    "IQ3_S": gguf_iq.decode_iq3_s,
    "IQ4_NL": gguf_blocks.decode_iq4_nl,
    "IQ4_XS": gguf_iq.decode_iq4_xs,
}


@dataclass(frozen=True, slots=True)
class InBlocks(Decoder):
    """A tensor in blocks of GGUF. Its only part, ``codes``, has the type of its blocks as dtype.

    The rows of its ``grid`` are the blocks, so that a tensor of one long row is decoded in pieces, too.
    """

    has_scales_in_codes: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, in the order of torch."""
        return self.parts["codes"].shape

    @property
    def grid(self) -> tuple[int, int]:
        """The blocks as rows."""
        elements = BLOCK_TYPES[self.parts["codes"].dtype].elements
        return math.prod(self.shape) // elements, elements

    def prepare(self, whole: Mapping[str, memoryview]) -> None:
        """Prepare nothing: each block has its own scales."""

    def magnitudes(self, held: None) -> Magnitudes | None:  # noqa: ARG002
        """Return those of any blocks of this type."""
        return None if self.parts["codes"].dtype in _OTHER_SCALES else _MAGNITUDES

    def decode(  # noqa: PLR0917 - as in the base class
        self,
        first: int,
        last: int,
        streamed: Mapping[str, memoryview],
        held: Any,  # noqa: ARG002
        out: npt.NDArray[np.float32],
        workers: Workers,  # noqa: ARG002
    ) -> None:
        """Fill ``out`` with the numbers of the blocks; raise ``BrokenPartError`` where a scale is NaN or infinite."""
        import numpy as np

        dtype = self.parts["codes"].dtype
        blocks = np.frombuffer(streamed["codes"], np.uint8).reshape(last - first, BLOCK_TYPES[dtype].nbytes)
        step = _PIECE // BLOCK_TYPES[dtype].elements
        for start in range(0, last - first, step):
            BLOCK_DECODERS[dtype](blocks[start : start + step], out[start : start + step])


def in_blocks(parts: Mapping[str, TensorInfo], settings: Settings) -> InBlocks:  # noqa: ARG001 - blocks have all
    """Return the decoder of a tensor in blocks."""
    codes = parts["codes"]
    if codes.dtype not in BLOCK_DECODERS:
        raise UnknownFormError("of intermediate results")
    block = BLOCK_TYPES[codes.dtype]
    if not codes.shape or codes.shape[-1] % block.elements:
        raise BrokenPartError("codes", f"has rows that do not divide into blocks of {block.elements}")
    if codes.nbytes != math.prod(codes.shape) // block.elements * block.nbytes:
        raise BrokenPartError("codes", f"has {codes.nbytes:,} bytes, which do not fit its shape")
    return InBlocks(parts)
