"""Where a payload that computes its bytes writes them, if that is not a file."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MemorySink", "NullSink"]


@dataclass(frozen=True, slots=True)
class MemorySink:
    """Memory of the caller, with one item for each byte."""

    buffer: memoryview

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Copy the bytes to ``offset``."""
        self.buffer[offset : offset + len(data)] = data


class NullSink:
    """Nothing: the bytes are computed only for their losses."""

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Forget the bytes."""
