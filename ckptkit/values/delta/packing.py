"""Pack what changed in each of many tensors, in all threads and in bounded memory."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.checkpoint.payload import Payload
from ckptkit.core.progress import Progress
from ckptkit.values.delta.blocks import BLOCK, pack_block
from ckptkit.values.delta.coding import Compression
from ckptkit.values.delta.resized import resized, zeros
from ckptkit.values.delta.spool import Spool
from ckptkit.values.difference.reading import Pair, Piece, read_block, read_together, tasks
from ckptkit.values.workers import Workers, pieces

__all__ = ["ROW", "Change", "Packed", "pack_changes"]

ROW: Final = struct.Struct("<II")  # of each block: its CRC-32 when it is unpacked, and the bytes that are packed
_BYTES: Final = "U8"


class Change(NamedTuple):
    """A tensor that may have changed: its description, and its bytes before and after.

    ``base`` is None for a tensor that is new, or had another dtype. It may have another number of bytes than
    ``new``: then it is cut, or has zeros behind it.
    """

    info: TensorInfo
    base: Payload | None
    new: Payload


@dataclass(frozen=True, slots=True)
class Packed:
    """The packed bytes of one tensor, a payload: a row for each block, then the blocks, which are in the spool."""

    rows: bytes
    spool: Spool = field(repr=False)
    start: int
    size: int

    @property
    def nbytes(self) -> int:
        """Number of packed bytes."""
        return len(self.rows) + self.size

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes; the spool must be open."""
        blocks = self.spool.chunks(self.start, self.size)
        if self.rows:
            yield self.rows + next(blocks, b"")
        yield from blocks


def pack_changes(
    changes: Iterable[Change],
    spool: Spool,
    workers: Workers,
    compression: Compression = "zlib",
    progress: Progress | None = None,
) -> Iterator[tuple[Change, Packed | None]]:
    """Yield each change with its packed bytes, or with None where the bytes are the same before and after.

    A tensor without ``base``, or with one of another size, is always packed. The order is that of the changes, but
    short tensors may come later. The packed bytes are written to ``spool``, and are the same with any number of
    threads. ``progress`` is called with the number of bytes that were read. Raises what reading raises.
    """
    known: dict[int, Change] = {}
    started: dict[int, _Started] = {}

    def pairs() -> Iterator[Pair]:
        for number, change in enumerate(changes):
            known[number] = change
            nbytes = change.new.nbytes
            base = zeros(nbytes) if change.base is None else resized(change.base, nbytes)
            yield Pair(number, base, change.new, _BYTES, _BYTES, _BYTES, nbytes)

    def work(task: Piece | list[Pair]) -> tuple[Piece | list[Pair], list[list[tuple[int, bytes]]]]:
        if isinstance(task, list):
            return task, _pack_together(task, known, compression, workers)
        return task, [_pack_piece(task, known[task.pair.number], compression, workers)]

    for task, made in workers.each(work, tasks(pairs())):
        items = [(pair, pair.elements) for pair in task] if isinstance(task, list) else [(task.pair, task.stop)]
        for (pair, stop), blocks in zip(items, made, strict=True):
            one = started.setdefault(pair.number, _Started(spool.size))
            for crc, packed in blocks:
                one.rows.append(ROW.pack(crc, len(packed)))
                spool.append(packed)
            if stop == pair.elements:
                del started[pair.number]
                change = known.pop(pair.number)
                size = spool.size - one.start
                is_equal = change.base is not None and change.base.nbytes == change.new.nbytes and not size
                yield change, None if is_equal else Packed(b"".join(one.rows), spool, one.start, size)
        if progress is not None:
            nbytes = sum(task.nbytes) if isinstance(task, Piece) else 2 * sum(pair.elements for pair in task)
            progress(nbytes)


@dataclass(slots=True)
class _Started:
    """What is packed of a tensor so far."""

    start: int
    rows: list[bytes] = field(default_factory=list)


def _pack_piece(piece: Piece, change: Change, compression: Compression, workers: Workers) -> list[tuple[int, bytes]]:
    blocks = []
    for start, stop in pieces(piece.stop - piece.start, BLOCK):
        base = None if change.base is None else read_block(piece, 0, start, stop, workers)
        new = read_block(piece, 1, start, stop, workers)
        blocks.append(_pack(base, new, change.info.dtype, compression, workers))
    return blocks


def _pack_together(
    pairs: list[Pair], known: dict[int, Change], compression: Compression, workers: Workers
) -> list[list[tuple[int, bytes]]]:
    nbytes = sum(pair.elements for pair in pairs)
    sides = [workers.buffer(name, "u1", nbytes).data for name in ("expected bytes", "found bytes")]
    read_together([pair.expected for pair in pairs], sides[0])
    read_together([pair.found for pair in pairs], sides[1])
    result, first = [], 0
    for pair in pairs:
        change, end = known[pair.number], first + pair.elements
        base = None if change.base is None else sides[0][first:end]
        result.append(
            [_pack(base, sides[1][first:end], change.info.dtype, compression, workers)] if end > first else []
        )
        first = end
    return result


def _pack(
    base: memoryview | None, new: memoryview, dtype: str, compression: Compression, workers: Workers
) -> tuple[int, bytes]:
    return zlib.crc32(new), pack_block(base, new, dtype, compression, workers)
