"""A tensor that is made of its base and of what changed while it is read: in blocks, by all threads."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.checkpoint.payload import HeldBytes, Payload, part_of, read_into
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, is_seekable
from ckptkit.core.text import quoted
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.values.computed import BlockPayload, JoinedPayload, bytes_of
from ckptkit.values.delta.blocks import BLOCK, most_packed, unpack_block
from ckptkit.values.delta.packing import ROW
from ckptkit.values.delta.resized import resized
from ckptkit.values.losses import Losses
from ckptkit.values.workers import Workers

__all__ = ["PatchedPayload"]


class _Block(NamedTuple):
    start: int  # its first byte
    nbytes: int
    crc: int
    packed_start: int
    packed_nbytes: int


class _Inputs(NamedTuple):
    """The blocks, and the inputs, which can be read in any order."""

    blocks: Sequence[_Block]
    base: Payload | None
    packed: Payload


@dataclass(slots=True, eq=False)
class _Held:
    """What is read when it is first needed."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inputs: _Inputs | None = None


@dataclass(frozen=True, slots=True)
class PatchedPayload(BlockPayload[_Block]):
    """A payload that makes the new tensor ``out`` of its base and of the packed bytes of ``pack_changes``.

    ``base`` has the bytes of the tensor that it was packed with, and is None for a tensor that was packed without one.
    Reading raises ``FormatError`` for damaged packed bytes, and for another base than the packed bytes were made with:
    there it raises the error that ``refusal`` returns, if that is given. The threads are those of ``workers``, which
    may be shared.
    """

    base: Payload | None
    packed: Payload
    out: TensorInfo
    workers: Workers = field(default_factory=Workers, repr=False, compare=False)
    refusal: Callable[[], CkptkitError] | None = field(default=None, repr=False, compare=False)
    _held: _Held = field(default_factory=_Held, repr=False, compare=False)

    def blocks(self, low: int = 0, high: int | None = None) -> Iterator[_Block]:
        """Yield the blocks that have the elements from ``low`` to ``high``, by default all, in order."""
        bits = DTYPES[self.out.dtype].bits
        first = low * bits // 8 // BLOCK
        end = self.nbytes if high is None else (high * bits + 7) // 8
        yield from self._inputs().blocks[first : -(-end // BLOCK)]

    def first_element(self, block: _Block) -> int:
        """Return the number of elements before a block."""
        return block.start * 8 // DTYPES[self.out.dtype].bits

    def first_byte(self, block: _Block) -> int:
        """Return the number of bytes before a block, which may begin within an element of 6 bits."""
        return block.start

    def make(self, block: _Block, workers: Workers) -> tuple[memoryview, Losses]:
        """Return the bytes of a block in a buffer of this thread. Raises ``FormatError`` as the class says."""
        inputs = self._inputs()
        packed = workers.read("packed", inputs.packed, block.packed_start, block.packed_nbytes)
        base = None if inputs.base is None else workers.read("base", inputs.base, block.start, block.nbytes)
        try:
            made = unpack_block(base, packed, self.out.dtype, block.nbytes, workers)
        except FormatError as error:
            raise self._damaged(error.reason, error.hint) from None
        if zlib.crc32(made) != block.crc:
            if self.refusal is not None:
                raise self.refusal()
            raise self._damaged("a checksum differs: the patch is damaged, or its base is another one")
        return made, Losses()

    def keep(self, losses: Losses) -> None:  # noqa: ARG002 - nothing is rounded
        """Forget what was held of the inputs."""
        self._held.inputs = None

    def joins(self, other: Payload) -> bool:
        """Return whether both are small: then each is made by one thread, and several at once."""
        return isinstance(other, PatchedPayload) and max(self.nbytes, other.nbytes) <= BLOCK

    def join(self, others: Sequence[Payload]) -> Payload:
        """Return one payload of this tensor and ``others``."""
        return JoinedPayload((self, *(other for other in others if isinstance(other, PatchedPayload))))

    def _inputs(self) -> _Inputs:
        """Return the inputs and all blocks of the tensor; their sizes agree with the number of packed bytes."""
        held = self._held
        with held.lock:
            if held.inputs is None:
                base = None if self.base is None else _in_any_order(resized(self.base, self.nbytes))
                held.inputs = _Inputs(self._read_blocks(), base, _in_any_order(self.packed))
            return held.inputs

    def _read_blocks(self) -> Sequence[_Block]:
        nbytes = self.nbytes
        count = -(-nbytes // BLOCK)
        if self.packed.nbytes < count * ROW.size:
            raise self._damaged("its packed bytes end early")
        data = bytearray(count * ROW.size)
        read_into(part_of(self.packed, 0, len(data)), memoryview(data))
        rows = list(ROW.iter_unpack(data))
        ends = list(accumulate((size for _, size in rows), initial=len(data)))
        if ends[-1] != self.packed.nbytes:
            raise self._damaged(f"{self.packed.nbytes:,} packed bytes are stored in place of {ends[-1]:,}")
        blocks = []
        for number, (crc, size) in enumerate(rows):
            start = number * BLOCK
            length = min(BLOCK, nbytes - start)
            if size > most_packed(length):
                raise self._damaged("a packed block has more bytes than its numbers")
            blocks.append(_Block(start, length, crc, ends[number], size))
        return blocks

    def _damaged(self, reason: str, hint: str | None = None) -> FormatError:
        path = self.packed.file.path if isinstance(self.packed, Extent) else None
        return FormatError(f"{quoted(self.out.key)} cannot be made: {reason}", hint=hint, path=path)


def _in_any_order(payload: Payload) -> Payload:
    return payload if is_seekable(payload) else HeldBytes(bytes_of(payload))
