"""The bytes of a tensor, which are read only on request: as chunks, as a part, or straight into memory."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckptkit.errors import FormatError

__all__ = [
    "HeldBytes",
    "Joining",
    "Part",
    "Payload",
    "SelfWriting",
    "Sink",
    "joining",
    "part_of",
    "read_into",
    "self_writing",
]


class Payload(Protocol):
    """The bytes of one tensor: contiguous, row-major, little-endian, and read only by ``chunks``."""

    @property
    def nbytes(self) -> int:
        """Return the exact number of bytes that ``chunks`` yields in total."""
        ...

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the bytes in order, in pieces of bounded size; each piece is valid until the next."""
        ...


class Sink(Protocol):
    """A file that is written at offsets. Several threads may write at once, each into a range of its own."""

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``."""
        ...


class SelfWriting(Payload, Protocol):
    """A payload that writes its bytes itself, such as one that computes them in several threads."""

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out``, and yield the number of bytes of each step.

        Returns the CRC-32 of the bytes with ``checksum``, else 0. All threads have ended when it returns or raises.
        """
        ...


class Joining(Payload, Protocol):
    """A payload that can be read together with its neighbours, such as a small tensor that is cast as they are."""

    def joins(self, other: Payload) -> bool:
        """Return whether this payload and ``other``, which comes before it, can be one payload."""
        ...

    def join(self, others: Sequence[Payload]) -> Payload:
        """Return this payload and ``others``, which come after it, as one."""
        ...


def read_into(payload: Payload, buffer: memoryview) -> None:
    """Fill ``buffer``, which has one item for each byte of the payload, without another copy where that is possible.

    A payload with a method ``readinto(buffer)`` fills the buffer itself. The chunks of any other payload are copied.
    Raises ``FormatError`` where the chunks have another number of bytes.
    """
    direct = getattr(payload, "readinto", None)
    if direct is not None:
        direct(buffer)
        return
    done = 0
    for chunk in payload.chunks():
        if len(chunk) > len(buffer) - done:
            raise FormatError(f"more than the {len(buffer):,} bytes of the tensor are stored")
        buffer[done : done + len(chunk)] = chunk
        done += len(chunk)
    if done < len(buffer):
        raise FormatError(f"only {done:,} of the {len(buffer):,} bytes of the tensor are stored")


def joining(payload: Payload) -> Joining | None:
    """Return the payload if it has the methods of ``Joining``, else None; ``isinstance`` is much slower."""
    return payload if hasattr(payload, "join") else None  # type: ignore[return-value]


def self_writing(payload: Payload) -> SelfWriting | None:
    """Return the payload if it has the method of ``SelfWriting``, else None; ``isinstance`` is much slower."""
    return payload if hasattr(payload, "write_to") else None  # type: ignore[return-value]


def part_of(payload: Payload, start: int, nbytes: int) -> Payload:
    """Return the ``nbytes`` bytes of a payload from its byte ``start``.

    A payload with a method ``slice(start, nbytes)`` reads only these bytes. Any other is read up to their end.
    """
    take = getattr(payload, "slice", None)
    part: Payload = Part(payload, start, nbytes) if take is None else take(start, nbytes)
    return part


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Bytes in memory as a payload."""

    data: bytes | bytearray

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return len(self.data)

    @property
    def is_seekable(self) -> bool:
        """Whether a range is read without the bytes before it: it is."""
        return True

    def chunks(self) -> Iterator[memoryview]:
        """Yield all bytes."""
        yield memoryview(self.data)

    def slice(self, start: int, nbytes: int) -> Payload:
        """Return some of the bytes."""
        return HeldBytes(self.data[start : start + nbytes])


@dataclass(frozen=True, slots=True)
class Part:
    """A range of the bytes of a payload that can be read only from its beginning."""

    source: Payload
    start: int
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes of the range; the bytes before them are read too, and the bytes after them are not."""
        skip, left = self.start, self.nbytes
        if not left:
            return
        for chunk in self.source.chunks():
            part = memoryview(chunk)[skip : skip + left]
            skip -= min(skip, len(chunk))
            left -= len(part)
            if part:
                yield part
            if not left:
                return
