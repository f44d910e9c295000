"""Find the tensors that together are one quantised weight: codes, scales, zero points and other companions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.frozen import FrozenDict
from ckptkit.core.gc_pause import pause_gc
from ckptkit.quantized.configuration import read_configuration

__all__ = ["ANCHOR_DTYPES", "Quantized", "QuantizedWeight", "quantized_weights"]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One quantised weight, which a checkpoint stores as codes and companions.

    Attributes:
        key: The name of the weight, such as ``"layers.0.q_proj.weight"``. No tensor need have this key.
        scheme: The name of the scheme for messages and JSON, such as ``"fp8"`` or ``"GPTQ int4"``.
        parts: The keys of all tensors of the weight in the order of the file, the tensor of codes included.
        coded: The key of the tensor that holds the codes.
        way_out: How to get a plain weight, as a sentence for hints.
        missing: The keys of the parts that the scheme needs and the checkpoint does not have; usually empty.
        family: The family of decoders that the scheme belongs to, or empty if ckptkit cannot decode it.
        roles: The key of the part that has each role for the decoder.
    """

    key: str
    scheme: str
    parts: tuple[str, ...]
    coded: str
    way_out: str
    missing: tuple[str, ...] = ()
    family: str = ""
    roles: tuple[tuple[str, str], ...] = ()

    @property
    def ways_out(self) -> str:
        """The ways to get a plain weight, the first here if ckptkit can decode the scheme, as a sentence for hints."""
        return f"--dequantize reads it as numbers; or {self.way_out}" if self.family else self.way_out

    def renamed_key(self, coded: str) -> str | None:
        """Return the key that the weight has if its codes have the key ``coded``, or None if the endings differ."""
        shared = 0
        while shared < min(len(self.key), len(self.coded)) and self.key[shared] == self.coded[shared]:
            shared += 1
        ending = self.coded[shared:]
        return coded.removesuffix(ending) + self.key[shared:] if coded.endswith(ending) else None


@dataclass(frozen=True, slots=True)
class Quantized:
    """The quantised weights of a checkpoint, false if there are none; ``by_key`` has the weight of each part."""

    weights: tuple[QuantizedWeight, ...] = ()
    by_key: Mapping[str, QuantizedWeight] = field(init=False)

    def __post_init__(self) -> None:
        """Fill ``by_key``."""
        parts = {key: weight for weight in self.weights for key in weight.parts}
        object.__setattr__(self, "by_key", FrozenDict(parts))

    def __bool__(self) -> bool:
        """Return whether any weight is quantised."""
        return bool(self.weights)


# The dtypes that anchors of the table have: a checkpoint without them is not searched, and the table is not loaded.
ANCHOR_DTYPES = frozenset(
    {"U8", "I8", "I16", "U16", "I32", "U32", "F4", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
_DTYPE_OF, _KIND_OF = attrgetter("dtype"), attrgetter("kind")


def quantized_weights(checkpoint: Checkpoint) -> Quantized:
    """Return the quantised weights of a checkpoint, in the order of their first parts.

    Reads names, dtypes, shapes and the configuration files of the model, but no values. A companion needs a tensor of
    codes: ``weight_scale`` of an F32 ``weight`` is a parameter. A weight that lacks parts is listed with its
    ``missing`` keys if the configuration or the other weights show that it is quantised.
    """
    dtypes, kinds = set(map(_DTYPE_OF, checkpoint.values())), set(map(_KIND_OF, checkpoint.values()))
    is_plain = ANCHOR_DTYPES.isdisjoint(dtypes) and kinds <= {"dense"}
    if is_plain and not read_configuration(checkpoint, has_codes=False).methods:
        return Quantized()
    from ckptkit.quantized.search import find_weights

    with pause_gc():
        order = {key: number for number, key in enumerate(checkpoint)}
        weights = [
            QuantizedWeight(
                found.key,
                found.name,
                tuple(sorted(found.parts, key=order.__getitem__)),
                found.stem + found.scheme.coded,
                found.scheme.way_out,
                found.missing,
                found.scheme.coding.family if found.scheme.coding else "",
                found.roles,
            )
            for found in find_weights(checkpoint)
        ]
        return Quantized(tuple(sorted(weights, key=lambda weight: order[weight.parts[0]])))
