"""Find the tensors that together are one quantised weight: codes, scales, zero points and other companions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.quantized.table import SCHEMES, Part, Scheme

__all__ = ["Quantized", "QuantizedWeight", "quantized_weights"]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One quantised weight, which a checkpoint stores as codes and companions.

    Attributes:
        key: The name of the weight, such as ``"layers.0.q_proj.weight"``. No tensor need have this key.
        scheme: The name of the scheme for messages and JSON, such as ``"fp8"`` or ``"bitsandbytes nf4"``.
        parts: The keys of all tensors of the weight in the order of the file, the tensor of codes included.
        coded: The key of the tensor that holds the codes.
        way_out: The library that makes a plain weight, as a sentence for hints.
        missing: The keys of the parts that the scheme needs and the checkpoint does not have.
    """

    key: str
    scheme: str
    parts: tuple[str, ...]
    coded: str
    way_out: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Quantized:
    """The quantised weights of a checkpoint, false if there are none; ``by_key`` has the weight of each part."""

    weights: tuple[QuantizedWeight, ...] = ()
    by_key: Mapping[str, QuantizedWeight] = field(init=False)

    def __post_init__(self) -> None:
        """Fill ``by_key``."""
        parts = {key: weight for weight in self.weights for key in weight.parts}
        object.__setattr__(self, "by_key", MappingProxyType(parts))

    def __bool__(self) -> bool:
        """Return whether any weight is quantised."""
        return bool(self.weights)


def quantized_weights(checkpoint: Checkpoint) -> Quantized:
    """Return the quantised weights of a checkpoint, in the order of their first parts.

    Reads names, dtypes, shapes and the configuration of the model, but no values. A companion needs a tensor of codes:
    ``weight_scale`` of an F32 ``weight`` is a parameter.
    """
    return _find(checkpoint)


def _find(infos: Mapping[str, TensorInfo]) -> Quantized:
    anchors = [info for info in infos.values() if info.dtype in _ROWS or info.dtype not in DTYPES]
    if not anchors:
        return Quantized()
    order = {key: number for number, key in enumerate(infos)}
    weights: list[QuantizedWeight] = []
    used: set[str] = set()
    for info in anchors:
        if info.key in used:
            continue
        if info.dtype not in DTYPES and info.kind == "quantized":
            weights.append(QuantizedWeight(info.key, f"GGUF {info.dtype}", (info.key,), info.key, _GGUF))
            continue
        for scheme, stem in _candidates(info):
            parts = _parts(scheme, stem, info, infos)
            if parts is not None:
                used.update(parts)
                parts = tuple(sorted(parts, key=order.__getitem__))
                weights.append(
                    QuantizedWeight(stem + scheme.weight, scheme.name, parts, stem + scheme.coded, scheme.way_out)
                )
                break
    return Quantized(tuple(weights))


_GGUF = "gguf dequantises it: gguf.quants.dequantize, or from_pretrained(..., gguf_file=...) of transformers"
_ROWS: Mapping[str, Sequence[tuple[Scheme, str]]] = {
    dtype: [(scheme, ending) for scheme in SCHEMES if dtype in scheme.anchor.dtypes for ending in scheme.anchor.endings]
    for dtype in {dtype for scheme in SCHEMES for dtype in scheme.anchor.dtypes}
}


def _candidates(info: TensorInfo) -> Iterator[tuple[Scheme, str]]:
    """Yield each scheme that can have this tensor as its anchor, with the stem of the keys."""
    for scheme, ending in _ROWS.get(info.dtype, ()):
        if info.key.endswith(ending):
            stem = info.key[: len(info.key) - len(ending)]
            if not ending[:1].isalpha() or not stem or stem[-1] == ".":
                yield scheme, stem


def _parts(scheme: Scheme, stem: str, anchor: TensorInfo, infos: Mapping[str, TensorInfo]) -> tuple[str, ...] | None:
    """Return the keys of all parts, or None if a part that the scheme needs is not there."""
    coded = infos.get(stem + scheme.coded)
    if coded is None:
        return None
    found = [anchor.key]
    for part in scheme.needed:
        keys = _keys(part, stem, coded, infos)
        if not keys:
            return None
        found += keys
    for part in scheme.optional:
        found += _keys(part, stem, coded, infos)
    return tuple(dict.fromkeys(found))


def _keys(part: Part, stem: str, coded: TensorInfo, infos: Mapping[str, TensorInfo]) -> list[str]:
    keys = []
    for ending in part.endings:
        info = infos.get(stem + ending)
        if info is not None and info.dtype in part.dtypes and (part.fits is None or part.fits(coded.shape, info.shape)):
            keys.append(info.key)
    return keys
