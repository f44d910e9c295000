"""Unpack codes of 1 to 8 bits from the bytes of rows, as float32 numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["codes_in_words", "dense_range", "look_up", "transposed", "unpack_dense", "unpack_integers", "unpack_words"]

_WORD = 32
_LINE = 16  # words in a line of the cache


def codes_in_words(count: int, bits: int, *, is_dense: bool = True) -> int:
    """Return how many words of 32 bits hold ``count`` codes; unless they are dense, no code crosses two words."""
    return -(-count * bits // _WORD) if is_dense else -(-count // (_WORD // bits))


def transposed(words: npt.NDArray[np.uint32], first: int, last: int, workers: Workers) -> npt.NDArray[np.uint32]:
    """Return the columns from ``first`` to ``last`` as rows, in a buffer of this thread."""
    import numpy as np

    height, count = len(words), last - first
    # Numbers that are a power of two apart share few places of the cache: the rows of this copy are not.
    apart = count + _LINE
    slab = workers.buffer("slab", np.uint32, height * apart).reshape(height, apart)[:, :count]
    np.copyto(slab, words[:, first:last])
    made: npt.NDArray[np.uint32] = workers.buffer("words", np.uint32, count * height).reshape(count, height)
    np.copyto(made, slab.T)
    return made


def dense_range(begin: int, bits: int, start: int, stop: int) -> tuple[int, int]:
    """Return the first byte and the number of bytes of the dense codes from ``start`` to ``stop`` of a row.

    The row begins at the byte ``begin``, and ``start`` is a multiple of 8.
    """
    low = start * bits // 8
    return begin + low, -(-stop * bits // 8) - low


@functools.cache
def _table(book: tuple[float, ...], high_first: bool) -> npt.NDArray[Any]:
    """Return the codes in each byte as one item of 8 or 16 bytes: two or four numbers of the book."""
    import numpy as np

    bits = len(book).bit_length() - 1
    places = range(0, 8, bits)
    numbers = np.array(book, np.float32)
    codes = np.arange(256)
    columns = [numbers[codes >> place & len(book) - 1] for place in (reversed(places) if high_first else places)]
    table = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint64 if bits == 4 else np.complex128)
    table.flags.writeable = False
    return table.ravel()


def look_up(
    packed: npt.NDArray[np.uint8], book: Sequence[float], out: npt.NDArray[np.float32], *, high_first: bool
) -> None:
    """Fill the flat array ``out`` with the numbers of a book of 4 or 16 numbers that the codes in ``packed`` name.

    Each byte has whole codes, and ``out`` has a number for each of them.
    """
    import numpy as np

    table = _table(tuple(map(float, book)), high_first)
    np.take(table, packed, out=out.view(table.dtype), mode="wrap")


def unpack_dense(
    packed: npt.NDArray[np.uint8], bits: int, offset: int, out: npt.NDArray[np.float32], workers: Workers
) -> None:
    """Fill ``out`` with the codes of each row, less ``offset``.

    ``packed`` has the bytes of each row. The codes follow each other from the lowest bit of the first byte without
    gaps, so a code can cross two bytes or words.
    """
    import numpy as np

    rows, columns = out.shape
    if bits == 8:
        np.subtract(packed[:, :columns], np.float32(offset), out=out, dtype=np.float32)
        return
    if bits in (2, 4):
        each = 8 // bits
        used = packed[:, : -(-columns // each)]
        whole = out
        if used.shape[1] * each != columns:
            whole = workers.buffer("unpacked", np.float32, rows * used.shape[1] * each).reshape(rows, -1)
        book = [code - offset for code in range(1 << bits)]
        look_up(np.ascontiguousarray(used).reshape(-1), book, whole.reshape(-1), high_first=False)
        if whole is not out:
            np.copyto(out, whole[:, :columns])
        return
    runs = -(-columns // 8)  # 8 codes are whole bytes
    joined = workers.buffer("joined", np.uint64, rows * runs).reshape(rows, runs)
    joined[:] = 0
    shifted = workers.buffer("shifted", np.uint64, rows * runs).reshape(rows, runs)
    for byte in range(bits):
        part = packed[:, byte::bits][:, :runs]
        np.left_shift(part, np.uint64(8 * byte), out=shifted[:, : part.shape[1]], dtype=np.uint64)
        joined[:, : part.shape[1]] |= shifted[:, : part.shape[1]]
    _spread(joined, bits, 8, offset, out, shifted)


def unpack_words(
    words: npt.NDArray[np.uint32], bits: int, offset: int, out: npt.NDArray[np.float32], workers: Workers
) -> None:
    """Fill ``out`` with the codes of each row of words, less ``offset``; each word has whole codes and then a gap."""
    import numpy as np

    shifted = workers.buffer("shifted", np.uint32, words.size).reshape(words.shape)
    _spread(words, bits, _WORD // bits, offset, out, shifted)


def _spread(  # noqa: PLR0917
    joined: npt.NDArray[Any],
    bits: int,
    each: int,
    offset: int,
    out: npt.NDArray[np.float32],
    shifted: npt.NDArray[Any],
) -> None:
    import numpy as np

    for place in range(min(each, out.shape[1])):
        target = out[:, place::each]
        np.right_shift(joined, joined.dtype.type(bits * place), out=shifted)
        np.bitwise_and(shifted, joined.dtype.type((1 << bits) - 1), out=shifted)
        np.subtract(shifted[:, : target.shape[1]], np.float32(offset), out=target, dtype=np.float32)


def unpack_integers(words: npt.NDArray[np.uint32], bits: int, columns: int) -> npt.NDArray[np.float32]:
    """Return the dense codes of each row of words as a new array."""
    import numpy as np

    made = np.empty((len(words), columns), np.float32)
    packed = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    unpack_dense(packed, bits, 0, made, Workers(1))
    return made
