"""Find what decoders need and headers do not say: the sizes of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ckptkit.quantized.known import Known, weights_of_groups

if TYPE_CHECKING:
    from ckptkit.values.dequantize.model import Setting

__all__ = ["of_scaled"]


def of_scaled(known: Known) -> Mapping[str, Setting]:
    """Return the size of a block that fits the scales, else the first one, if the configuration names any.

    Nothing is returned for scales that are not of blocks.
    """
    if "scales" not in known.parts or len(known.parts["scales"].shape) < 2:
        return {}
    shape, counts = known.parts["codes"].shape[-2:], known.parts["scales"].shape[-2:]
    blocks = [block for section in known.sections for block in _blocks(section)]
    fitting = (block for block in blocks if all(map(_fits, shape, counts, block)))
    found = next(fitting, blocks[0] if blocks else None)
    return {} if found is None else {"block": found}


def _fits(size: int, count: int, block: int) -> bool:
    return count in (1, size, -(-size // block))


def _blocks(section: Mapping[str, object]) -> Iterator[tuple[int, int]]:
    """Yield the rows and columns of each kind of block that a section names."""
    named = list(weights_of_groups(section))
    sizes = [section.get("weight_block_size"), *(weights.get("block_structure") for weights in named)]
    for block in (*sizes, *([1, weights.get("group_size")] for weights in named)):
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            yield block[0], block[1]
