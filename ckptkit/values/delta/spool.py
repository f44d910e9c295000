"""A temporary file for bytes, the number of which is known only when all of them are made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Final

from ckptkit.core.closing import Closing

__all__ = ["CountingSpool", "Spool"]

_CHUNK: Final = 1 << 20


class Spool(Closing):
    """A file without a name, which is appended to and then read. Close it, or use it as a context manager."""

    def __init__(self, directory: str | None = None) -> None:
        """Make the file in ``directory``, by default where the system has its temporary files."""
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - closed with the spool
        self.size = 0
        self._waiting: list[bytes] = []  # the last bytes, which are not in the file yet
        self._waiting_size = 0

    def append(self, data: bytes) -> None:
        """Write ``data`` behind all other bytes."""
        self._waiting.append(data)
        self._waiting_size += len(data)
        self.size += len(data)
        if self._waiting_size >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        view, start = memoryview(b"".join(self._waiting)), self.size - self._waiting_size
        while view:
            count = os.pwrite(self._file.fileno(), view, start)
            start += count
            view = view[count:]
        self._waiting, self._waiting_size = [], 0

    def chunks(self, start: int, nbytes: int) -> Iterator[bytes]:
        """Yield ``nbytes`` bytes from byte ``start``."""
        if self._waiting_size:
            self._flush()
        end = start + nbytes
        while start < end:
            data = os.pread(self._file.fileno(), min(_CHUNK, end - start), start)
            if not data:
                raise OSError("a temporary file became shorter")
            start += len(data)
            yield data

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class CountingSpool(Spool):
    """A spool without a file, which only counts the bytes; they cannot be read."""

    def __init__(self) -> None:
        """Start with no bytes."""
        self.size = 0

    def append(self, data: bytes) -> None:
        """Count the bytes of ``data``."""
        self.size += len(data)

    def close(self) -> None:
        """Do nothing."""
