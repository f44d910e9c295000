"""A block of a tensor as planes of bytes: what changed in it, packed, and the block made of it again."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from ckptkit.core.dtypes import DTYPES
from ckptkit.errors import FormatError
from ckptkit.values.delta.coding import Compression, compress, decompress
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["BLOCK", "most_packed", "pack_block", "plane_count", "unpack_block"]

BLOCK: Final = 1 << 20  # bytes of the tensor; a multiple of the size of every dtype
_PLANE: Final = struct.Struct("<BI")  # how a plane is stored, and in how many bytes


def plane_count(dtype: str) -> int:
    """Return the number of planes: the bytes of one number; 1 for numbers that share a byte or have no known size."""
    known = DTYPES.get(dtype)
    return 1 if known is None else known.part_bytes


def most_packed(nbytes: int, planes: int) -> int:
    """Return the most bytes that a packed block of ``nbytes`` bytes has."""
    return nbytes + planes * _PLANE.size


def pack_block(
    base: memoryview | None, new: memoryview, planes: int, compression: Compression, workers: Workers
) -> bytes:
    """Return what changed in a block, or no bytes where both sides are equal; ``base`` is None for zeros."""
    import numpy as np

    data: npt.NDArray[Any] = np.frombuffer(new, np.uint8)
    if base is not None:
        difference = workers.buffer("difference", "u1", len(data))
        np.bitwise_xor(data, np.frombuffer(base, np.uint8), out=difference)
        if not difference.any():
            return b""
        data = difference
    parts = []
    for plane in data.reshape(-1, planes).T:
        method, packed = compress(plane.tobytes(), compression)
        parts += [_PLANE.pack(method, len(packed)), packed]
    return b"".join(parts)


def unpack_block(base: memoryview | None, packed: memoryview, planes: int, nbytes: int, workers: Workers) -> memoryview:
    """Return the new bytes of a block in a buffer of this thread. Raises ``FormatError`` for damaged bytes."""
    import numpy as np

    made: npt.NDArray[Any] = workers.buffer("patched", "u1", nbytes)
    if not len(packed):
        made[:] = 0
    else:
        start = 0
        for plane in made.reshape(-1, planes).T:
            if start + _PLANE.size > len(packed):
                raise FormatError("a packed block ends early")
            method, count = _PLANE.unpack_from(packed, start)
            start += _PLANE.size
            plane[:] = np.frombuffer(decompress(method, packed[start : start + count], len(plane)), np.uint8)
            start += count
        if start != len(packed):
            raise FormatError("a packed block has other bytes than its planes")
    if base is not None:
        np.bitwise_xor(made, np.frombuffer(base, np.uint8), out=made)
    return made.data
