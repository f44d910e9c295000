"""The bytes of tensors as they are stored, also of those that are listed and not read, such as the blocks of GGUF."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.checkpoint.payload import Payload

if TYPE_CHECKING:
    from ckptkit.core.checkpoint import Checkpoint

__all__ = ["StoredBytes", "has_stored_bytes", "is_in_blocks"]


def is_in_blocks(info: TensorInfo) -> bool:
    """Return whether a tensor is stored in blocks whose bytes can be read, and not its numbers."""
    return info.kind == "quantized" and info.stored_bytes > 0


def has_stored_bytes(info: TensorInfo) -> bool:
    """Return whether the bytes of a tensor can be read: those of its elements, or of its blocks."""
    return info.kind == "dense" or is_in_blocks(info)


class StoredBytes:
    """The payloads of the tensors of a checkpoint that ``has_stored_bytes``."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read nothing yet."""
        self._checkpoint = checkpoint
        self._blocks: dict[str, Payload] | None = None

    def payload(self, key: str) -> Payload:
        """Return the bytes of the tensor, as they are stored. Raises as ``Checkpoint.payload``."""
        from ckptkit.core.checkpoint import affine_of

        affine = affine_of(self._checkpoint, key) if self._checkpoint[key].kind == "quantized" else None
        if affine is not None:
            return affine.codes
        if not is_in_blocks(self._checkpoint[key]):
            return self._checkpoint.payload(key)
        if self._blocks is None:
            records = self._checkpoint.records()
            self._blocks = {name: record.payload for record in records for name in record.keys}
        return self._blocks[key]
