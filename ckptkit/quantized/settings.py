"""Find what decoders need and headers do not say: the sizes of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptkit.quantized.known import Known

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_scaled"]


def of_scaled(known: Known) -> Mapping[str, Setting]:
    """Return the size of a block, if the configuration names it and the scales are of blocks."""
    if "scales" not in known.parts or len(known.parts["scales"].shape) < 2:
        return {}
    for section in known.sections:
        sizes = section.get("weight_block_size") or _block_of_groups(section)
        if isinstance(sizes, list) and 0 < len(sizes) <= 2 and all(type(size) is int and size > 0 for size in sizes):
            return {"block": tuple(sizes)}
    return {}


def _block_of_groups(section: Mapping[str, object]) -> object:
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("block_structure"):
            return weights["block_structure"]
    return None
