"""Quantised weights that are decoded while they are read: blocks of rows, by all threads, rounded once."""

from __future__ import annotations

import threading
import weakref
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.checkpoint.payload import Payload, Sink, part_of, read_into
from ckptkit.core.crc32 import joined_crc32
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.values.casting import cast_bytes
from ckptkit.values.dequantize.model import BrokenPartError, Decoder
from ckptkit.values.losses import Losses, count_losses
from ckptkit.values.workers import PIECE, Workers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["DequantizedPayload", "broken_part"]

_WORKING: Final = "F32"
_MOST_HELD: Final = 64 << 20  # bytes of parts that are read whole: memory does not grow with the checkpoint
_ALWAYS_HELD: Final = 2  # weights: both sides of a comparison


def broken_part(weight: str, decoder_parts: Mapping[str, TensorInfo], error: BrokenPartError) -> FormatError:
    """Return the error that names the weight and the part that is broken."""
    info = decoder_parts.get(error.role)
    subject = f"the {error.role} of {quoted(weight)}" if info is None else quoted(info.key)
    if info is None or info.key == weight:
        return FormatError(f"{subject} cannot be dequantised: it {error.reason}")
    return FormatError(f"{quoted(weight)} cannot be dequantised: {subject} {error.reason}")


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Held:
    """The parts that are read by rows, and what the decoder keeps of the others, made when it is asked for."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    made: tuple[Mapping[str, Payload], Any] | None = None


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
                    found.made = None  # threads that decode with it have a reference of their own


_RECENT: Final = _Recent()


@dataclass(frozen=True, slots=True)
class DequantizedPayload:
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

    @property
    def nbytes(self) -> int:
        """Number of bytes of the weight."""
        return self.out.nbytes

    @property
    def is_seekable(self) -> bool:
        """Whether a range is read without the bytes before it: it is."""
        return True

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in pieces, all of them computed in this thread."""
        own = Workers(1)  # a piece is valid until the next one, also where a caller reads two payloads in turn
        found = Losses()
        for first, last in self._blocks():
            made, losses = self._decoded(first, last, own)
            found = found.plus(losses)
            yield made
        self._keep(found)

    def readinto(self, buffer: memoryview) -> None:
        """Fill ``buffer``, which has ``nbytes`` items, in all threads."""
        for _ in self.write_to(_Memory(buffer), 0):
            pass

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out`` in all threads, as ``SelfWriting`` says."""
        width = self.decoder.grid[1] * DTYPES[self.out.dtype].bits // 8

        def work(block: tuple[int, int]) -> tuple[int, Losses, int]:
            made, losses = self._decoded(*block, self.workers)
            out.write(made, offset + block[0] * width)
            return len(made), losses, zlib.crc32(made) if checksum else 0

        crc, found = 0, Losses()
        for count, losses, part in self.workers.each(work, self._blocks()):
            found = found.plus(losses)
            if checksum:
                crc = joined_crc32(crc, part, count)
            yield count
        self._keep(found)
        return crc

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return some of the bytes, for which only their rows are decoded."""
        return _Slice(self, start, nbytes)

    def try_all(self) -> None:
        """Decode all rows, and forget them. Raises ``BrokenPartError`` instead of the error that names the weight."""
        streamed, held = self._prepared()

        def work(block: tuple[int, int]) -> None:
            self._numbers(*block, streamed, held, self.workers)

        for _ in self.workers.each(work, self._blocks()):
            pass

    def find_losses(self) -> None:
        """Compute all bytes only for their losses."""
        for _ in self.write_to(_Nowhere(), 0):
            pass

    def read_range(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from byte ``start`` on."""
        rows, columns = self.decoder.grid
        width = columns * DTYPES[self.out.dtype].bits // 8
        if not len(buffer):
            return
        multiple = self.decoder.multiple
        first = start // width // multiple * multiple
        stop = start + len(buffer)
        for low, high in self._blocks(first, min(-(-stop // width), rows)):
            made, _ = self._decoded(low, high, self.workers)
            begin, end = max(start, low * width), min(stop, high * width)
            buffer[begin - start : end - start] = made[begin - low * width : end - low * width]

    def _blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        rows, columns = self.decoder.grid
        multiple = self.decoder.multiple
        step = max(PIECE // max(columns, 1) // multiple, 1) * multiple
        end = rows if last is None else last
        for start in range(first, end if columns else first, step):
            yield start, min(start + step, end)

    def _decoded(self, first: int, last: int, workers: Workers) -> tuple[memoryview, Losses]:
        """Return the bytes of some rows in a buffer of this thread, and the losses of their rounding."""
        import numpy as np

        streamed, held = self._prepared()
        try:
            numbers = self._numbers(first, last, streamed, held, workers)
        except BrokenPartError as error:
            raise broken_part(self.out.key, self.decoder.parts, error) from None
        found: memoryview = numbers.view(np.uint8).data
        if self.out.dtype == _WORKING:
            return found, Losses()
        made = cast_bytes(found, _WORKING, self.out.dtype, workers)
        losses = Losses()
        if self.losses is not None:
            losses = count_losses(found, made, _WORKING, self.out.dtype, workers)
        return made, losses

    def _numbers(
        self, first: int, last: int, streamed: Mapping[str, Payload], held: Any, workers: Workers
    ) -> npt.NDArray[np.float32]:
        """Return the numbers of some rows in a buffer of this thread. Raises ``BrokenPartError``."""
        import numpy as np

        decoder = self.decoder
        numbers: npt.NDArray[np.float32] = workers.buffer("decoded", np.float32, (last - first) * decoder.grid[1])
        data: dict[str, memoryview] = {}
        for role in decoder.streamed if streamed else ():
            if role in streamed:
                data[role] = workers.read(role, streamed[role], *decoder.range_of(role, first, last))
        with np.errstate(all="ignore"):
            decoder.decode(first, last, data, held, numbers.reshape(last - first, decoder.grid[1]), workers)
        return numbers

    def _prepared(self) -> tuple[Mapping[str, Payload], Any]:
        """Return the parts that are read by rows, and what the decoder keeps of the others."""
        held = self._held
        with held.lock:
            made = held.made
            if made is None:
                decoder = self.decoder
                whole = {
                    role: memoryview(_bytes_of(source))
                    for role, source in self.sources.items()
                    if role not in decoder.streamed
                }
                try:
                    value = decoder.prepare(whole)
                except BrokenPartError as error:
                    raise broken_part(self.out.key, decoder.parts, error) from None
                streamed = {
                    role: source if hasattr(source, "slice") else _InMemory(_bytes_of(source))
                    for role, source in self.sources.items()
                    if role in decoder.streamed
                }
                made = held.made = (streamed, value)
                in_memory = (source.nbytes for source in streamed.values() if isinstance(source, _InMemory))
                _RECENT.add(held, sum(map(len, whole.values())) + sum(in_memory))
            return made

    def _keep(self, losses: Losses) -> None:
        if self.losses is not None:
            key = self.out.key
            self.losses[key] = losses.of(key, _WORKING, self.out.dtype, self.out.elements)


def _bytes_of(source: Payload) -> bytearray:
    data = bytearray(source.nbytes)
    read_into(source, memoryview(data))
    return data


@dataclass(frozen=True, slots=True)
class _Slice:
    whole: DequantizedPayload
    start: int
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        for start in range(0, self.nbytes, PIECE):
            data = memoryview(bytearray(min(PIECE, self.nbytes - start)))
            self.whole.read_range(self.start + start, data)
            yield data

    def readinto(self, buffer: memoryview) -> None:
        self.whole.read_range(self.start, buffer)

    def slice(self, start: int, nbytes: int) -> Payload:
        return part_of(self.whole, self.start + start, nbytes)


@dataclass(frozen=True, slots=True)
class _InMemory:
    """The bytes of a payload that can be read only from its beginning."""

    data: bytearray

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.data)

    def slice(self, start: int, nbytes: int) -> Payload:
        return _InMemory(self.data[start : start + nbytes])


@dataclass(frozen=True, slots=True)
class _Memory:
    buffer: memoryview

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self.buffer[offset : offset + len(data)] = data


class _Nowhere:
    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Forget the bytes."""
