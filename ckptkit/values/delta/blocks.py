"""A block of a tensor: what changed in it, packed as planes of bytes, and the block made of it again.

The packed bytes of a tensor begin with a row for each block of 1 MiB: the CRC-32 of the new bytes, and the number of
packed bytes, both of 4 bytes. The packed blocks follow. A block of no bytes is that of the base, or zeros without one.

The first byte of a packed block says how it is packed. 0 means the new bytes themselves, and 1 their XOR with the base.
2 means the steps from the numbers of the base to the new ones (``steps.py``). 4 is added where the numbers are sorted
by the exponents of the base. 8 is added where a plane of bits comes first, which says which numbers are not zero: then
only those follow. A plane has a byte of each number, the lowest first. It begins with a byte for the method (0: as it
is, 1: one value, 2: deflate, 3: zstd) and 4 bytes for its size. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from ckptkit.core.dtypes import DTYPES
from ckptkit.core.torch_bridge import same_memory
from ckptkit.errors import FormatError
from ckptkit.values.arrays import real_code
from ckptkit.values.delta.coding import Compression, compress, decompress
from ckptkit.values.delta.steps import Array, add_steps, by_exponent, steps_between
from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BLOCK", "most_packed", "pack_block", "unpack_block"]

BLOCK: Final = 1 << 20  # bytes of the tensor; a multiple of the size of every dtype
_TINY: Final = 64  # bytes of a block that is stored as it is
# How a block is packed, its first byte: the new bytes themselves, or the XOR or the steps between base and new numbers.
_WHOLE, _XOR, _STEPS = range(3)
_SORTED: Final = 4  # added where the numbers are in the order of ``by_exponent``
_SPARSE: Final = 8  # added where the first plane has a bit for each number, and the others only numbers that are not 0
_SPARSE_FROM: Final = 0.6  # zeros per number and byte of it, from which a bit for each number saves more than it takes
_PLANE: Final = struct.Struct("<BI")  # how a plane is stored, and in how many bytes


def most_packed(nbytes: int) -> int:
    """Return the most bytes that a packed block of ``nbytes`` bytes has."""
    return nbytes + 1


def pack_block(
    base: memoryview | None, new: memoryview, dtype: str, compression: Compression, workers: Workers
) -> bytes:
    """Return what changed in a block, or no bytes where both sides are equal; ``base`` is None for zeros."""
    import numpy as np

    if base is not None and _are_equal(base, new):
        return b""
    whole = bytes((_WHOLE,)) + new
    if len(new) <= _TINY:
        return whole
    layout = FLOAT_FORMATS.get(real_code(dtype))
    bits = _bits_dtype(dtype)
    numbers = np.frombuffer(new, bits)
    before = None if base is None else np.frombuffer(base, bits)
    steps = steps_between(before, numbers, layout, workers)
    if layout is not None:
        order = None if before is None else by_exponent(before, layout, workers)
        packed = _pack_numbers(steps, order, _STEPS, compression, workers, can_repeat=base is None)
    else:
        packed = _pack_numbers(steps, None, _STEPS, compression, workers, can_repeat=True)
        if before is not None:  # of codes that share a number, each changes alone
            np.bitwise_xor(before, numbers, out=steps)
        else:
            steps = numbers
        packed = min(packed, _pack_numbers(steps, None, _XOR, compression, workers, can_repeat=True), key=len)
    return min(packed, whole, key=len)


def unpack_block(base: memoryview | None, packed: memoryview, dtype: str, nbytes: int, workers: Workers) -> memoryview:
    """Return the ``nbytes`` new bytes of a block in a buffer of this thread, or elsewhere where nothing is computed.

    Raises ``FormatError`` for damaged bytes.
    """
    import numpy as np

    if not len(packed):
        return memoryview(bytes(nbytes)) if base is None else base
    form, body = packed[0], packed[1:]
    if form == _WHOLE:
        if len(body) != nbytes:
            raise FormatError("a block that is stored as it is has another size")
        return body
    kind, is_sorted, is_sparse = form & 3, bool(form & _SORTED), bool(form & _SPARSE)
    layout = FLOAT_FORMATS.get(real_code(dtype))
    if (
        kind not in (_XOR, _STEPS)
        or form > _STEPS + _SORTED + _SPARSE
        or (is_sorted and (layout is None or base is None))
    ):
        raise FormatError(f"a block is packed in the unknown form {form}")
    bits = _bits_dtype(dtype)
    before = None if base is None else np.frombuffer(base, bits)
    numbers = _unpack_numbers(body, nbytes // bits.itemsize, bits, workers, is_sparse=is_sparse)
    if is_sorted and layout is not None and before is not None:
        ordered, numbers = numbers, workers.buffer("in order", bits, len(numbers))
        numbers[by_exponent(before, layout, workers)] = ordered
    made = workers.buffer("patched", bits, len(numbers))
    if kind == _STEPS:
        add_steps(before, numbers, layout, made, workers)
    elif before is not None:
        np.bitwise_xor(numbers, before, out=made)
    else:
        made[:] = numbers
    return memoryview(made.view(np.uint8).data)


def _bits_dtype(dtype: str) -> np.dtype[np.unsignedinteger[np.typing.NBitBase]]:
    """Return the unsigned integers that the numbers of a block are; bytes if numbers share a byte."""
    import numpy as np

    return np.dtype(f"u{DTYPES[dtype].part_bytes}")


def _are_equal(base: memoryview, new: memoryview) -> bool:
    import numpy as np

    if len(new) <= _TINY:
        return bytes(base) == bytes(new)
    one, other = (np.frombuffer(side, np.uint8).ctypes.data for side in (base, new))
    return same_memory(one, other, len(new))


def _pack_numbers(
    numbers: Array, order: Array | None, form: int, compression: Compression, workers: Workers, *, can_repeat: bool
) -> bytes:
    """Return the form and all planes of the numbers, the lowest bytes first."""
    import numpy as np

    if order is not None:
        form |= _SORTED
        numbers = np.take(numbers, order, out=workers.buffer("sorted", numbers.dtype, len(numbers)), mode="clip")
    parts = [b""]
    zeros = len(numbers) - int(np.count_nonzero(numbers))
    if zeros * numbers.itemsize > _SPARSE_FROM * len(numbers):
        form |= _SPARSE
        is_other = numbers != 0
        _add_plane(parts, np.packbits(is_other), compression, can_repeat=can_repeat)
        numbers = numbers[is_other]
    plane = workers.buffer("plane", "u1", len(numbers))
    for place in range(numbers.itemsize):
        np.right_shift(numbers, 8 * place, out=plane, casting="unsafe")
        _add_plane(parts, plane, compression, can_repeat=can_repeat)
    parts[0] = bytes((form,))
    return b"".join(parts)


def _add_plane(parts: list[bytes], plane: Array, compression: Compression, *, can_repeat: bool) -> None:
    method, packed = compress(plane, compression, can_repeat=can_repeat)
    parts += [_PLANE.pack(method, len(packed)), packed]


def _unpack_numbers(
    packed: memoryview,
    count: int,
    bits: np.dtype[np.unsignedinteger[np.typing.NBitBase]],
    workers: Workers,
    *,
    is_sparse: bool,
) -> Array:
    """Return ``count`` numbers in a buffer of this thread."""
    import numpy as np

    numbers: Array = workers.buffer("steps", bits, count)
    planes = _Planes(packed)
    if is_sparse:
        flags = np.unpackbits(planes.following(-(-count // 8)))
        if flags[count:].any():
            raise FormatError("a packed block has more numbers than its tensor")
        is_other = flags[:count].view(np.bool_)
        others = workers.buffer("others", bits, int(np.count_nonzero(is_other)))
        _join_planes(planes, others, workers)
        numbers[:] = 0
        numbers[is_other] = others
    else:
        _join_planes(planes, numbers, workers)
    planes.finish()
    return numbers


def _join_planes(planes: _Planes, numbers: Array, workers: Workers) -> None:
    import numpy as np

    wide = workers.buffer("base ranks", numbers.dtype, len(numbers))
    for place in range(numbers.itemsize):
        plane = planes.following(len(numbers))
        if not place:
            numbers[:] = plane
            continue
        wide[:] = plane
        np.left_shift(wide, 8 * place, out=wide)
        np.bitwise_or(numbers, wide, out=numbers)


class _Planes:
    """The planes of a packed block, one after the other."""

    def __init__(self, packed: memoryview) -> None:
        self._packed = packed
        self._start = 0

    def following(self, nbytes: int) -> Array:
        """Return the next plane, which has ``nbytes`` bytes."""
        if self._start + _PLANE.size > len(self._packed):
            raise FormatError("a packed block ends early")
        method, count = _PLANE.unpack_from(self._packed, self._start)
        start = self._start + _PLANE.size
        self._start = start + count
        if self._start > len(self._packed):
            raise FormatError("a packed block ends early")
        return decompress(method, self._packed[start : self._start], nbytes)

    def finish(self) -> None:
        """Raise ``FormatError`` where bytes are left."""
        if self._start != len(self._packed):
            raise FormatError("a packed block has more bytes than its planes")
