"""The bytes of a tensor that is longer or shorter: cut, or with zeros behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ckptkit.core.checkpoint.payload import Payload, part_of, read_into
from ckptkit.core.files.payloads import is_seekable

__all__ = ["resized", "zeros"]

_CHUNK: Final = 1 << 20


def resized(payload: Payload, nbytes: int) -> Payload:
    """Return a payload of ``nbytes`` bytes: the first ones of ``payload``, and zeros where it has fewer."""
    return payload if payload.nbytes == nbytes else _Resized(payload, nbytes)


def zeros(nbytes: int) -> Payload:
    """Return a payload of ``nbytes`` zeros."""
    return _Resized(None, nbytes)


@dataclass(frozen=True, slots=True)
class _Resized:
    source: Payload | None
    nbytes: int

    @property
    def is_seekable(self) -> bool:
        return self.source is None or is_seekable(self.source)

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        left = self.nbytes
        for chunk in () if self.source is None else self.source.chunks():
            part = memoryview(chunk)[:left]
            left -= len(part)
            yield part
            if not left:
                return
        while left:
            count = min(left, _CHUNK)
            left -= count
            yield bytes(count)

    def readinto(self, buffer: memoryview) -> None:
        have = 0 if self.source is None else min(self.source.nbytes, self.nbytes)
        if self.source is not None and have:
            read_into(self.source if have == self.source.nbytes else part_of(self.source, 0, have), buffer[:have])
        for start in range(have, self.nbytes, _CHUNK):
            stop = min(start + _CHUNK, self.nbytes)
            buffer[start:stop] = bytes(stop - start)

    def slice(self, start: int, nbytes: int) -> Payload:
        have = 0 if self.source is None else min(max(self.source.nbytes - start, 0), nbytes)
        return _Resized(part_of(self.source, start, have) if self.source is not None and have else None, nbytes)
