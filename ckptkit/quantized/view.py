"""A checkpoint with quantised weights as numbers: each is one plain tensor, which is decoded when it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ckptkit.core.arguments import refuse
from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo, replaced_tensors
from ckptkit.core.checkpoint.stored import StoredBytes
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_types import DType
from ckptkit.errors import PlanError
from ckptkit.quantized import QuantizedWeight, quantized_weights
from ckptkit.quantized.decoding import Decoded, Decoding

__all__ = [
    "DequantizeLike",
    "DequantizedView",
    "DequantizedWeight",
    "as_numbers",
    "dequantized",
    "parse_dequantize",
]

# Whether quantised weights are read as numbers, or the dtype of these.
DequantizeLike: TypeAlias = bool | str | DType


def parse_dequantize(dequantize: DequantizeLike) -> tuple[bool, str | None]:
    """Return whether quantised weights are read as numbers, and the code of their dtype if the argument names one.

    Raises ``PlanError`` for a dtype that is not known.
    """
    if isinstance(dequantize, bool):
        return dequantize, None
    from ckptkit.values.casting import float_dtype

    if not isinstance(dequantize, str) and type(dequantize).__name__ != "dtype":
        refuse(dequantize, "dequantize", "a bool, or a dtype")
    return True, float_dtype(dequantize)


@dataclass(frozen=True, slots=True)
class DequantizedWeight:
    """A quantised weight that is read as numbers: its key, the scheme of its codes, and the dtype of the numbers."""

    key: str
    scheme: str
    dtype: str


@dataclass(frozen=True, slots=True)
class DequantizedView:
    """A checkpoint with plain tensors in place of quantised weights.

    Attributes:
        original: The checkpoint as it is stored.
        checkpoint: The same with one tensor for each quantised weight, under the key of the weight.
        weights: The decoder of each such tensor, by its key.
        reasons: What says which dtype a tensor has, as the end of a sentence; empty if the caller says it.
    """

    original: Checkpoint
    checkpoint: Checkpoint
    weights: Mapping[str, Decoded]
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def listed(self) -> tuple[DequantizedWeight, ...]:
        """The weights that are read as numbers, for a report."""
        return tuple(
            DequantizedWeight(key, decoded.weight.scheme, self.checkpoint[key].dtype)
            for key, decoded in self.weights.items()
        )

    def notes(self, dtypes: Mapping[str, str] | None = None) -> list[str]:
        """Return sentences that say how many weights are dequantised, to which dtype, and what says so.

        ``dtypes`` are the dtypes that the weights get, if not those of ``checkpoint``.
        """
        counts: dict[tuple[str, str, str], int] = {}
        for key, decoded in self.weights.items():
            found = self.checkpoint[key].dtype
            dtype = found if dtypes is None else dtypes.get(key)
            if dtype is not None:
                row = (decoded.weight.scheme, dtype, self.reasons[key] if dtype == found else "")
                counts[row] = counts.get(row, 0) + 1
        return [
            f"{plural(count, 'weight')} ({scheme}) {'is' if count == 1 else 'are'} dequantised to {dtype}{reason}"
            for (scheme, dtype, reason), count in counts.items()
        ]


def as_numbers(
    checkpoint: Checkpoint, dequantize: DequantizeLike, losses: MutableMapping[str, CastLoss] | None = None
) -> DequantizedView:
    """Return a checkpoint with its quantised weights as numbers, or as it is if ``dequantize`` is false.

    The numbers are F32 if ``dequantize`` names no dtype. ``losses`` and errors are as in ``dequantized``.
    """
    is_wanted, dtype = parse_dequantize(dequantize)
    if not is_wanted:
        return DequantizedView(checkpoint, checkpoint, {})
    return dequantized(checkpoint, dtype or "F32", losses=losses)


def dequantized(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    *,
    wanted: Callable[[QuantizedWeight], str | bool] | None = None,
    losses: MutableMapping[str, CastLoss] | None = None,
) -> DequantizedView:
    """Return a checkpoint with its quantised weights as numbers of ``dtype``; none of them is read yet.

    Without ``dtype``, the dtype is the one that ``config.json`` names, else the one that the scheme records, else F32.
    ``wanted`` says of each weight whether it is dequantised, or to which dtype. ``losses`` gets the losses of each
    weight whenever all of it was read.

    Raises ``PlanError`` for a scheme that ckptkit cannot decode, and ``FormatError`` for missing or broken parts.
    """
    found = quantized_weights(checkpoint)
    decoding = Decoding(checkpoint)
    weights: dict[str, Decoded] = {}
    dtypes: dict[str, tuple[str, str]] = {}
    for weight in found.weights:
        answer = True if wanted is None else wanted(weight)
        if answer:
            decoded = decoding.decoded(weight)
            if weight.key in weights:
                raise PlanError(f"{quoted(weight.key)} is the name of two quantised weights")
            weights[weight.key] = decoded
            said = answer if isinstance(answer, str) else dtype
            dtypes[weight.key] = _dtype(said, decoding.dtype, decoded.decoder.recorded)
    if not weights:
        return DequantizedView(checkpoint, checkpoint, weights)
    parts = {part: key for key, decoded in weights.items() for part in decoded.weight.parts}
    infos: dict[str, TensorInfo] = {}
    for key, info in checkpoint.items():
        owner = parts.get(key)
        if owner is None:
            if key in weights:
                raise PlanError(f"{quoted(key)} is a tensor, and also the name of a quantised weight")
            infos[key] = info
        elif owner not in infos:
            infos[owner] = TensorInfo(owner, dtypes[owner][0], weights[owner].decoder.shape)
    from ckptkit.values.workers import Workers

    stored, workers = StoredBytes(checkpoint), Workers()

    def payload(info: TensorInfo) -> Payload | None:
        decoded = weights.get(info.key)
        return None if decoded is None else decoded.payload(stored, info, workers, losses)

    reasons = {key: reason for key, (_, reason) in dtypes.items()}
    return DequantizedView(checkpoint, replaced_tensors(checkpoint, infos, payload), weights, reasons)


def _dtype(said: str | None, configured: str | None, recorded: str | None) -> tuple[str, str]:
    """Return the dtype of a dequantised weight, and what says so."""
    if said is not None:
        return said, ""
    if configured is not None:
        return configured, ", as config.json says"
    if recorded is not None:
        return recorded, ", as the quantised weights say"
    return "F32", ", because nothing names the dtype that they had"
