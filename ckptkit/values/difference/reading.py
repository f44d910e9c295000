"""Plan how two payloads are read side by side: long ones in pieces of the same elements, short ones together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from ckptkit.core.checkpoint.payload import Payload, part_of, read_into
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, PayloadReader, is_seekable
from ckptkit.values.difference.numbers import BLOCK, has_numbers
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Pair", "Piece", "expected_pieces", "read_block", "read_together", "tasks"]

_PIECE: Final = 1 << 21  # bytes of a side; what a thread reads stays in its cache
_SMALL: Final = 1 << 17  # bytes; shorter payloads are read together
_MAX_TOGETHER: Final = 1024  # pairs


@dataclass(slots=True, eq=False)
class Pair:
    """Two tensors with the same number of elements, at least one, and their dtypes.

    ``code`` is the dtype in which they are compared: usually that of the expected one. A tensor whose dtype has no
    numbers (``has_numbers``) is one of bytes, which are then its elements.
    """

    number: int
    expected: Payload
    found: Payload
    code: str
    expected_code: str
    found_code: str
    elements: int

    @property
    def is_cast(self) -> bool:
        """Whether a side has another dtype than the one in which both are compared."""
        return not self.code == self.expected_code == self.found_code


class Piece(NamedTuple):
    """Some elements of a pair, and where their bytes are on both sides: a payload, or the bytes themselves."""

    pair: Pair
    start: int
    stop: int
    sides: tuple[Payload | bytearray, ...]
    nbytes: tuple[int, ...]


def tasks(pairs: Iterable[Pair]) -> Iterator[Piece | list[Pair]]:
    """Yield all elements of all pairs: long pairs in pieces, and lists of short pairs that are read together.

    A payload that is not ``is_seekable`` is read by this iterator.
    """
    short: list[Pair] = []
    room = 2 * _PIECE
    for pair in pairs:
        nbytes = pair.expected.nbytes + pair.found.nbytes
        if nbytes >= 2 * _SMALL:
            yield from _pieces(pair)
            continue
        if short and (nbytes > room or len(short) >= _MAX_TOGETHER):
            yield short
            short, room = [], 2 * _PIECE
        if not isinstance(pair.expected, Extent):
            pair.expected = _Held(pair.expected)
        if not isinstance(pair.found, Extent):
            pair.found = _Held(pair.found)
        short.append(pair)
        room -= nbytes
    if short:
        yield short


class _Held:
    """The bytes of a short payload, in memory."""

    __slots__ = ("_data", "nbytes")

    def __init__(self, payload: Payload) -> None:
        self.nbytes = payload.nbytes
        self._data = bytearray(self.nbytes)
        read_into(payload, memoryview(self._data))

    def chunks(self) -> Iterator[bytearray]:
        yield self._data


def expected_pieces(pair: Pair, starts: Iterable[int]) -> Iterator[Piece]:
    """Yield the pieces of a long pair that begin at ``starts``; only their expected side can be read."""
    wanted = frozenset(starts)
    return (piece for piece in _pieces(pair, only_expected=True) if piece.start in wanted)


def read_block(piece: Piece, side: int, start: int, stop: int, workers: Workers) -> memoryview:
    """Return the bytes of some elements of a piece of a long pair, counted from its first, on one side."""
    count = piece.stop - piece.start
    first, end = piece.nbytes[side] * start // count, piece.nbytes[side] * stop // count
    source = piece.sides[side]
    if isinstance(source, bytearray):
        return memoryview(source)[first:end]
    buffer: npt.NDArray[np.uint8] = workers.buffer(("expected bytes", "found bytes")[side], "u1", end - first)
    read_into(part_of(source, first, end - first), buffer.data)
    return buffer.data


def read_together(payloads: Iterable[Payload], buffer: memoryview) -> None:
    """Fill ``buffer`` with the bytes of all payloads; adjacent ranges of one file are read together."""
    start = end = following = 0
    pending: Extent | None = None
    for payload in payloads:
        nbytes = payload.nbytes
        if pending is not None:
            if isinstance(payload, Extent) and payload.offset == following and payload.file is pending.file:
                end += nbytes
                following += nbytes
                continue
            pending.file.read_into(buffer[start:end], pending.offset)
        start, end, pending = end, end + nbytes, None
        if isinstance(payload, Extent):
            pending, following = payload, payload.offset + nbytes
        else:
            read_into(payload, buffer[start:end])
    if pending is not None:
        pending.file.read_into(buffer[start:end], pending.offset)


def _pieces(pair: Pair, *, only_expected: bool = False) -> Iterator[Piece]:
    """Yield a long pair in pieces of whole blocks of elements."""
    bits = [DTYPES[code].bits if has_numbers(code) else 8 for code in (pair.expected_code, pair.found_code)]
    size = max(_PIECE * 8 // max(bits) // BLOCK, 1) * BLOCK
    payloads = [pair.expected] if only_expected else [pair.expected, pair.found]
    readers = [None if is_seekable(payload) else PayloadReader(payload) for payload in payloads]
    for start in range(0, pair.elements, size):
        stop = min(start + size, pair.elements)
        sides: list[Payload | bytearray] = []
        nbytes: list[int] = []
        for payload, reader, width in zip(payloads, readers, bits, strict=False):
            first, end = start * width // 8, stop * width // 8
            nbytes.append(end - first)
            if reader is None:
                sides.append(part_of(payload, first, end - first))
            else:
                buffer = bytearray(end - first)
                reader.read_into(memoryview(buffer))
                sides.append(buffer)
        yield Piece(pair, start, stop, tuple(sides), tuple(nbytes))
