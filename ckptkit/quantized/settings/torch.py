"""Find the scales and zero points of a tensor that torch itself quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from ckptkit.quantized.known import Known

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_affine"]


def of_affine(known: Known) -> Mapping[str, Setting]:
    """Return the scales and zero points, and the dim of their slices; nothing where the reader does not know them."""
    if known.affine is None:
        return {}
    _, scales, zeros, axis = known.affine
    return {"scales": cast("tuple[int, ...]", scales), "zeros": zeros, "axis": axis}
