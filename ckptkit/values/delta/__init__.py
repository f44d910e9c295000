"""What changed between two tensors of one dtype and shape, packed in few bytes, and the new tensor made of it again."""

from __future__ import annotations

from ckptkit.values.delta.coding import COMPRESSIONS, Compression, require_compression
from ckptkit.values.delta.packing import Change, Packed, pack_changes
from ckptkit.values.delta.payload import PatchedPayload
from ckptkit.values.delta.spool import CountingSpool, Spool

__all__ = [
    "COMPRESSIONS",
    "Change",
    "Compression",
    "CountingSpool",
    "Packed",
    "PatchedPayload",
    "Spool",
    "pack_changes",
    "require_compression",
]
