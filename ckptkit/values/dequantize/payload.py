"""Quantised weights that are decoded while they are read: blocks of rows, by all threads, rounded once."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.checkpoint.payload import HeldBytes, Payload, part_of
from ckptkit.core.files.payloads import Extent
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.values.casting import cast_bytes
from ckptkit.values.computed import BlockPayload, bytes_of
from ckptkit.values.dequantize.model import BrokenPartError, Decoder, ElementwiseDecoder
from ckptkit.values.losses import Losses, count_losses
from ckptkit.values.workers import PIECE, Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DequantizedPayload", "broken_part"]

_WORKING: Final = "F32"
_MOST_HELD: Final = 64 << 20  # bytes of parts that are read whole: memory does not grow with the checkpoint
_UNIT: Final = 1 << 12  # columns at whose multiples a part of a long row begins
_TOGETHER: Final = 2  # columns that can share a byte, which a part of a row has both of
_ALWAYS_HELD: Final = 2  # weights: both sides of a comparison


def broken_part(weight: str, decoder_parts: Mapping[str, TensorInfo], error: BrokenPartError) -> FormatError:
    """Return the error that names the weight and the part that is broken."""
    info = decoder_parts.get(error.role)
    subject = f"the {error.role} of {quoted(weight)}" if info is None else quoted(info.key)
    if info is None or info.key == weight:
        return FormatError(f"{subject} cannot be dequantised: it {error.reason}")
    return FormatError(f"{quoted(weight)} cannot be dequantised: {subject} {error.reason}")


class _Block(NamedTuple):
    """Some rows, or some columns of one row."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return (self.last - self.first) * (self.stop - self.start)


class _Made(NamedTuple):
    """The parts that are read by rows, what the decoder keeps of the others, and whether rounding can lose a number."""

    streamed: Mapping[str, Payload]
    held: Any
    can_lose: bool


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Held:
    """What is made of the parts when it is asked for."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    made: _Made | None = None
    read: tuple[str, int, int, memoryview] | None = None  # the last range of a part that several blocks are made from


class _Recent:
    """The weights that were read last. What the decoders of others keep is forgotten, and made again if need be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[weakref.ref[_Held], int]] = deque()
        self._total = 0

    def add(self, held: _Held, nbytes: int) -> None:
        with self._lock:
            self._kept.append((weakref.ref(held), nbytes))
            self._total += nbytes
            while self._total > _MOST_HELD and len(self._kept) > _ALWAYS_HELD:
                oldest, count = self._kept.popleft()
                self._total -= count
                found = oldest()
                if found is not None and found is not held:
                    found.made = found.read = None  # threads that decode with it have a reference of their own


_RECENT: Final = _Recent()


@dataclass(frozen=True, slots=True)
class DequantizedPayload(BlockPayload[_Block]):
    """A payload that decodes a quantised weight while it is read, and rounds its numbers to the dtype of ``out``.

    ``sources`` has the payload of each part by its role. Once all bytes were read, ``losses`` has the losses of the
    rounding by the key of ``out``. The threads are those of ``workers``, which may be shared.
    """

    decoder: Decoder
    sources: Mapping[str, Payload]
    out: TensorInfo
    losses: MutableMapping[str, CastLoss] | None = None
    workers: Workers = field(default_factory=Workers, repr=False, compare=False)
    _held: _Held = field(default_factory=_Held, repr=False, compare=False)

    def _refusal(self, error: BrokenPartError) -> FormatError:
        refusal, source = broken_part(self.out.key, self.decoder.parts, error), self.sources.get(error.role)
        refusal.path = source.file.path if isinstance(source, Extent) else None
        return refusal

    def try_all(self) -> None:
        """Decode all rows, and forget them. Raises ``BrokenPartError`` instead of the error that names the weight."""
        streamed, held, _ = self._prepared()

        def work(block: _Block) -> None:
            self._numbers(block, self._read(block, streamed, self.workers), held, self.workers)

        for _ in self.workers.each(work, self.blocks()):
            pass

    def first_element(self, block: _Block) -> int:
        """Return the number of elements before a block."""
        return block.first * self.decoder.grid[1] + block.start

    def blocks(self, low: int = 0, high: int | None = None) -> Iterator[_Block]:
        """Yield the blocks that have the numbers from ``low`` to ``high``: rows, or columns of a row if it is long."""
        rows, columns = self.decoder.grid
        end = rows * columns if high is None else high
        if not columns or low >= end:
            return
        if columns > PIECE and isinstance(self.decoder, ElementwiseDecoder) and self.decoder.splits_rows:
            for row in range(low // columns, -(-end // columns)):
                first = max(low - row * columns, 0) // _UNIT * _UNIT
                last = min(end - row * columns, columns)
                last = min(last + last % _TOGETHER, columns)
                for start in range(first, last, PIECE):
                    yield _Block(row, row + 1, start, min(start + PIECE, last))
            return
        multiple = self.decoder.multiple
        step = max(PIECE // columns // multiple, 1) * multiple
        start, last = low // columns // multiple * multiple, -(-end // columns)
        together = self.decoder.rows_together
        while start < last:
            stop = min(start + step, last)
            if step < together:
                stop = min(stop, (start // together + 1) * together)
            yield _Block(start, stop, 0, columns)
            start = stop

    def make(self, block: _Block, workers: Workers) -> tuple[memoryview, Losses]:
        """Return the bytes of a block in a buffer of this thread, and the losses of their rounding."""
        import numpy as np

        parts, held, can_lose = self._prepared()
        streamed = self._read(block, parts, workers)
        try:
            numbers = self._numbers(block, streamed, held, workers)
        except BrokenPartError as error:
            raise self._refusal(error) from None
        found: memoryview = numbers.view(np.uint8).data
        counts = can_lose and self.losses is not None
        if counts:
            losses = self._overflows(numbers, streamed, workers)
        else:
            losses = Losses(infinite_codes=0 if self.losses is None else self.decoder.infinite_codes(streamed))
        if self.out.dtype == _WORKING:
            return found, losses
        made = cast_bytes(found, _WORKING, self.out.dtype, workers)
        if counts:
            rounded = count_losses(found, made, _WORKING, self.out.dtype, workers)
            again = min(rounded.infinite, losses.overflowed)  # products that are infinite, and then saturate
            less = rounded._replace(overflowed=rounded.overflowed - again, infinite=rounded.infinite - again)
            losses = losses.plus(less)
        return made, losses

    def _overflows(
        self, numbers: npt.NDArray[np.float32], streamed: Mapping[str, memoryview], workers: Workers
    ) -> Losses:
        """Return how many codes stand for NaN or inf, and how many products of finite numbers float32 cannot hold."""
        import numpy as np

        finite = np.isfinite(numbers, out=workers.buffer("finite", np.bool_, numbers.size))
        count = numbers.size - int(np.count_nonzero(finite))
        if not count:
            return Losses()
        infinite = min(self.decoder.infinite_codes(streamed), count)
        overflowed = count - infinite
        return Losses(overflowed=overflowed, is_mask=not overflowed, infinite_codes=infinite)

    def _read(self, block: _Block, parts: Mapping[str, Payload], workers: Workers) -> Mapping[str, memoryview]:
        """Return the bytes of the parts that are read by rows, for a block."""
        decoder, data = self.decoder, {}
        for role in decoder.streamed:
            if role not in parts:
                continue
            if decoder.rows_together > 1:
                data[role] = self._read_once(role, parts[role], *decoder.range_of(role, block.first, block.last))
            elif isinstance(decoder, ElementwiseDecoder) and block.stop - block.start < decoder.grid[1]:
                found = decoder.range_in_row(role, block.first, block.start, block.stop)
                data[role] = workers.read(role, parts[role], *found)
            else:
                data[role] = workers.read(role, parts[role], *decoder.range_of(role, block.first, block.last))
        return data

    def _read_once(self, role: str, source: Payload, start: int, nbytes: int) -> memoryview:
        """Return a range that is read only if it is not the one that was read last."""
        held = self._held
        with held.lock:
            if held.read is None or held.read[:3] != (role, start, nbytes):
                held.read = (role, start, nbytes, memoryview(bytes_of(part_of(source, start, nbytes))))
            return held.read[3]

    def _numbers(
        self, block: _Block, streamed: Mapping[str, memoryview], held: Any, workers: Workers
    ) -> npt.NDArray[np.float32]:
        """Return the numbers of a block in a buffer of this thread. Raises ``BrokenPartError``."""
        import numpy as np

        first, last, start, stop = block
        numbers: npt.NDArray[np.float32] = workers.buffer("decoded", np.float32, block.elements)
        out = numbers.reshape(last - first, stop - start)
        with np.errstate(all="ignore"):
            if isinstance(self.decoder, ElementwiseDecoder) and stop - start < self.decoder.grid[1]:
                self.decoder.decode_columns(first, start, streamed, held, out, workers)
            else:
                self.decoder.decode(first, last, streamed, held, out, workers)
        return numbers

    def _prepared(self) -> _Made:
        """Return what is made of the parts."""
        held = self._held
        with held.lock:
            made = held.made
            if made is None:
                decoder = self.decoder
                whole = {
                    role: memoryview(bytes_of(source))
                    for role, source in self.sources.items()
                    if role not in decoder.streamed
                }
                try:
                    value = decoder.prepare(whole)
                except BrokenPartError as error:
                    raise self._refusal(error) from None
                streamed = {
                    role: source if hasattr(source, "slice") else HeldBytes(bytes_of(source))
                    for role, source in self.sources.items()
                    if role in decoder.streamed
                }
                magnitudes = decoder.magnitudes(value)
                fit = magnitudes is not None and all(map(magnitudes.fit, (_WORKING, self.out.dtype)))
                made = held.made = _Made(streamed, value, not fit)
                in_memory = (source.nbytes for source in streamed.values() if isinstance(source, HeldBytes))
                _RECENT.add(held, sum(map(len, whole.values())) + sum(in_memory))
            return made

    def keep(self, losses: Losses) -> None:
        """Store the losses of all blocks, if they are wanted."""
        if self.losses is not None:
            key = self.out.key
            found = _WORKING if self.out.dtype != _WORKING else self.decoder.parts["codes"].dtype
            self.losses[key] = losses.of(key, found, self.out.dtype, self.out.elements)
