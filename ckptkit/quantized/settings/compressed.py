"""Find what decoders of compressed-tensors need: the shape of the weight, and how its codes are packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from ckptkit.quantized.known import Known, integers_of, weights_of_groups

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_packed_rows"]

_WORD: Final = 32
_MOST_BITS: Final = 8


def of_packed_rows(known: Known) -> Mapping[str, Setting]:
    """Return the shape, the number of bits, and whether codes cross words.

    Raises ``BrokenPartError`` where no number of bits fits the parts, or several do.
    """
    from ckptkit.values.dequantize.model import BrokenPartError

    codes = known.parts["codes"]
    if "shape" not in known.parts:
        raise BrokenPartError("shape", "is missing")
    shape = integers_of(known, "shape")
    if len(shape) < 2 or min(shape) < 1:
        raise BrokenPartError("shape", f"has the values {list(shape)}, which are not the shape of a weight")
    named = set(_weights(known, "num_bits"))
    possible = [
        (bits, is_dense)
        for bits in range(1, _MOST_BITS + 1)
        if not named or bits in named
        for is_dense in ((True,) if _WORD % bits == 0 else (True, False))
        if codes.shape[-1:] == (-(-shape[-1] * bits // _WORD) if is_dense else -(-shape[-1] // (_WORD // bits)),)
    ]
    if len(possible) != 1:
        many = f"{len(possible)} ways of packing" if possible else "no way of packing"
        raise BrokenPartError("codes", f"is {codes}: {many} codes of a weight of {list(shape)} gives that")
    bits, is_dense = possible[0]
    found: dict[str, Setting] = {"bits": bits, "shape": shape, "dense": is_dense}
    groups = known.parts["scales"].shape[-1:] or (1,)
    sizes = {size for size in _weights(known, "group_size") if size > 0 and -(-shape[-1] // size) == groups[0]}
    if groups[0] > 1 and len(sizes) == 1:
        found["group_size"] = sizes.pop()
    return found


def _weights(known: Known, name: str) -> Iterator[int]:
    """Yield what the groups of the configuration say about weights."""
    for section in known.sections:
        for weights in weights_of_groups(section):
            value = weights.get(name)
            if type(value) is int:
                yield value
