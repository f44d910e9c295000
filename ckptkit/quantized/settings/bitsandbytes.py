"""Find what decoders of bitsandbytes need: the state of 4-bit weights, and the layout of int8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ckptkit.quantized.known import Known, small_part

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_four_bits", "of_int8"]

_LAYOUTS: Final = ("row", "col32", "col_turing", "col_ampere")
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "blocksize": (int,), "dtype": (str,), "nested_blocksize": (int,), "nested_offset": (float, int),
}  # fmt: skip


def of_four_bits(known: Known) -> Mapping[str, Setting]:
    """Return what the JSON in the quant_state says. Raises ``BrokenPartError`` for anything else than such JSON."""
    from ckptkit.values.dequantize.model import BrokenPartError

    try:
        state = json.loads(small_part(known, "quant_state").decode())
    except (ValueError, RecursionError):
        raise BrokenPartError("quant_state", "is not valid JSON") from None
    shape = state.get("shape") if isinstance(state, dict) else None
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise BrokenPartError("quant_state", f"has a shape of {str(shape)[:80]}, and not a list of sizes")
    found: dict[str, Setting] = {"shape": tuple(shape)}
    for name, kinds in _KINDS.items():
        value = state.get(name)
        if value is not None and type(value) not in kinds:
            raise BrokenPartError("quant_state", f"has a {name} of {str(value)[:80]}")
        if value is not None:
            found[name] = value
    return found


def of_int8(known: Known) -> Mapping[str, Setting]:
    """Return nothing. Raises ``UnknownFormError`` for a layout other than rows, which depends on the GPU."""
    from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError

    if "weight_format" not in known.parts:
        return {}
    number = int.from_bytes(small_part(known, "weight_format")[:1], "little")
    if number >= len(_LAYOUTS):
        raise BrokenPartError("weight_format", f"is {number}, and the formats are 0 to {len(_LAYOUTS) - 1}")
    if number:
        raise UnknownFormError(f"in the layout {_LAYOUTS[number]} of a GPU")
    return {}
