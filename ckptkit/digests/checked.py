"""Tensors that are hashed while they are written, and refused where they do not have the digest that was recorded."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.core.checkpoint.payload import Sink, part_of, read_into
from ckptkit.core.crc32 import joined_crc32
from ckptkit.core.files.payloads import Extent, announce, is_seekable
from ckptkit.digests.hashing import hash_function, hash_tensors, header_of
from ckptkit.errors import CkptkitError
from ckptkit.values.computed import ThreadedPayload
from ckptkit.values.workers import Workers

__all__ = ["CheckedPayload"]

_ALGORITHM: Final = "sha256"


@dataclass(frozen=True, slots=True)
class CheckedPayload(ThreadedPayload):
    """A payload that is hashed in the same pass in which it is read.

    With the last bytes, ``refusal`` is raised unless the SHA-256 of the tensor, as ``digest`` hashes it, is
    ``digits``. ``extents`` are the ranges of files that are read. The threads are those of ``workers``, which may be
    shared.
    """

    info: TensorInfo
    source: Payload
    digits: str
    refusal: Callable[[], CkptkitError]
    extents: tuple[Payload, ...]
    workers: Workers = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the tensor."""
        return self.info.nbytes

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """Yield the bytes; the last piece only if all of them have the digest."""
        found = hash_function(_ALGORITHM)(header_of(self.info.dtype, self.info.shape))
        done = 0
        for chunk in self.source.chunks():
            found.update(chunk)
            done += len(chunk)
            if done >= self.nbytes:
                self.check(found.hexdigest())
            yield chunk

    def check(self, found: str) -> None:
        """Raise the refusal unless the hash of the tensor is the one that was recorded."""
        if found != self.digits:
            raise self.refusal()

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        """Write all bytes from ``offset`` of ``out`` in all threads, as ``SelfWriting`` says."""
        return (yield from _write([self], out, offset, checksum=checksum))

    def joins(self, other: Payload) -> bool:
        """Return whether both are written together, so that each thread can hash a tensor of its own."""
        return isinstance(other, CheckedPayload)

    def join(self, others: Sequence[Payload]) -> Payload:
        """Return one payload of this tensor and ``others``."""
        return _Joined((self, *(other for other in others if isinstance(other, CheckedPayload))))


@dataclass(frozen=True, slots=True)
class _Joined(ThreadedPayload):
    """Payloads that lie one after the other."""

    parts: Sequence[CheckedPayload]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        for part in self.parts:
            yield from part.chunks()

    def write_to(self, out: Sink, offset: int, *, checksum: bool = False) -> Generator[int, None, int]:
        # A store takes bytes in order, and sends the bytes of an input in the order in which they were announced.
        is_in_order = getattr(out, "in_order", False) or any(map(_is_remote, self.parts))
        if not is_in_order:
            return (yield from _write(self.parts, out, offset, checksum=checksum))
        announce(extent for part in self.parts for extent in part.extents)
        crc = 0
        for part in self.parts:
            found = yield from _write([part], out, offset, checksum=checksum)
            crc = joined_crc32(crc, found, part.nbytes) if checksum else 0
            offset += part.nbytes
        return crc


def _is_remote(part: CheckedPayload) -> bool:
    return any(isinstance(extent, Extent) and extent.file.is_remote for extent in part.extents)


def _write(parts: Sequence[CheckedPayload], out: Sink, offset: int, *, checksum: bool) -> Generator[int, None, int]:
    """Write payloads that lie one after the other, in any order, and return their CRC-32 with ``checksum``."""
    by_key = {part.info.key: part for part in parts}
    written = []
    for part in parts:
        written.append((part.info, _Written(part.source, out, offset, {} if checksum else None)))
        offset += part.nbytes
    for hashed, nbytes in hash_tensors(written, _ALGORITHM, parts[0].workers):
        for key, digits in hashed:
            by_key[key].check(digits)
        if nbytes:
            yield nbytes
    crc = 0
    for _, one in written if checksum else ():
        for _, (found, count) in sorted((one.crcs or {}).items()):
            crc = joined_crc32(crc, found, count)
    return crc


@dataclass(frozen=True, slots=True)
class _Written:
    """A payload that writes each piece from ``place`` of ``out`` when it is read, and keeps the CRC-32 of the piece."""

    source: Payload
    out: Sink
    place: int
    crcs: dict[int, tuple[int, int]] | None

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def is_seekable(self) -> bool:
        return is_seekable(self.source)

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        done = 0
        for chunk in self.source.chunks():
            self.take(chunk, done)
            done += len(chunk)
            yield chunk

    def slice(self, start: int, nbytes: int) -> _WrittenPart:
        return _WrittenPart(self, start, nbytes)

    def take(self, data: bytes | bytearray | memoryview, start: int) -> None:
        self.out.write(data, self.place + start)
        if self.crcs is not None:
            self.crcs[start] = zlib.crc32(data), len(data)


@dataclass(frozen=True, slots=True)
class _WrittenPart:
    whole: _Written
    start: int
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(self.nbytes))
        self.readinto(buffer)
        yield buffer

    def readinto(self, buffer: memoryview) -> None:
        read_into(part_of(self.whole.source, self.start, self.nbytes), buffer)
        self.whole.take(buffer, self.start)
