"""Find what decoders of HQQ need: values that HQQ stores as tensors beside the codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptkit.quantized.known import Known, integers_of, small_part

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_hqq"]


def of_hqq(known: Known) -> Mapping[str, Setting]:
    """Return the shape, the packing and the axis. Raises ``UnknownFormError`` for scales that are quantised too."""
    from ckptkit.values.dequantize.model import BrokenPartError, UnknownFormError

    for role in ("quant_scale", "quant_zero"):
        if role in known.parts and any(small_part(known, role)):
            raise UnknownFormError("with scales or zero points that are quantised too")
    missing = next((role for role in ("shape", "packing", "axis") if role not in known.parts), None)
    if missing is not None:
        raise BrokenPartError(missing, "is missing")
    axis = integers_of(known, "axis")
    found: dict[str, Setting] = {"shape": integers_of(known, "shape"), "packing": _text(known, "packing")}
    if len(axis) == 1:
        found["axis"] = axis[0]
    if "compute_dtype" in known.parts:
        found["dtype"] = _text(known, "compute_dtype")
    return found


def _text(known: Known, role: str) -> str:
    return small_part(known, role)[:80].decode("ascii", "replace")
