"""Read a checkpoint with many files, and keep only the most recently used files open."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ckptkit.core.files.local import LocalFile, LocalFolder
from ckptkit.core.files.places import join
from ckptkit.core.files.source import ByteSource, Folder
from ckptkit.errors import ChangedError, CkptkitError

__all__ = ["FilePool", "PooledFile"]

_MOST_OPEN = 64  # a thousand ranks save a thousand files, and some systems let a process open 256


class FilePool:
    """The files of one folder by name. Each file is opened at the first request.

    Files of this machine are closed and opened again, since the system limits their number. Files of stores stay open.
    """

    def __init__(self, folder: Folder) -> None:
        """Take the folder, and open no file yet."""
        self.folder = folder
        self.files: dict[str, ByteSource] = {}
        self._recent: dict[PooledFile, None] = {}
        self._in_use: Counter[PooledFile] = Counter()
        self._closed = False
        self._lock = threading.Lock()  # held while files are opened and closed, not while they are read

    def get(self, name: str) -> ByteSource:
        """Return the file of this name. Raises ``PathError`` where it is missing or not a regular file."""
        if name not in self.files:
            folder = self.folder
            self.files[name] = PooledFile(folder, name, self) if isinstance(folder, LocalFolder) else folder.open(name)
        return self.files[name]

    @contextmanager
    def using(self, file: PooledFile) -> Iterator[None]:
        """Keep ``file`` open in the block, and mark it as the most recently used; it stays closed in a closed pool.

        If too many files are open, the least recently used ones that no thread uses are closed.
        """
        with self._lock:
            if not self._closed:
                file.open_again()
                self._recent.pop(file, None)
                self._recent[file] = None
            self._in_use[file] += 1
            self._close_oldest()
        try:
            yield
        finally:
            with self._lock:
                self._in_use[file] -= 1
                if not self._in_use[file]:
                    del self._in_use[file]
                    if self._closed:
                        file.close()

    def _close_oldest(self) -> None:
        if len(self._recent) > _MOST_OPEN:
            idle = [file for file in self._recent if file not in self._in_use]
            for file in idle[: len(self._recent) - _MOST_OPEN]:
                del self._recent[file]
                file.close()

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` where one of the files changed since it was first opened."""
        if by_path:
            for file in self.files.values():
                file.will_check()
        for file in self.files.values():
            file.check_unchanged(by_path=by_path)

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close every file if the block raises; an error of ckptkit without a path gets the path of the directory."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, CkptkitError) and error.path is None:
                error.path = self.folder.path
            raise

    def close(self) -> None:
        """Close every file, one that a thread reads when it is read. Reading a closed file is an error."""
        with self._lock:
            self._closed = True
            self._recent.clear()
            for file in self.files.values():
                if file not in self._in_use:
                    file.close()


class PooledFile(LocalFile):
    """A file that its pool may close at any time. Reading a closed file opens the file again."""

    def __init__(self, folder: LocalFolder, name: str, pool: FilePool) -> None:
        """Open the file of this name for the first time."""
        place = folder.place_of(name)
        super().__init__(place, join(folder.path, name))
        self._absolute = os.path.abspath(place)  # the process may change its directory before the file is opened again
        self._pool = pool
        with pool.using(self):
            pass

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Yield the file descriptor; the pool does not close the file in the ``with`` block."""
        with self._pool.using(self), super().descriptor() as descriptor:
            yield descriptor

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes."""
        with self._pool.using(self):
            return super().read(offset, count)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        with self._pool.using(self):
            super().read_into(buffer, offset)

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` if the size or the modification time changed since the file was first opened."""
        with self._pool.using(self):
            super().check_unchanged(by_path=by_path)

    def open_again(self) -> None:
        """Open the file if it is closed. Raises ``ChangedError`` if it is not the file that was opened first."""
        if self._fd >= 0:
            return
        size, seen = self.size, self._seen
        try:
            super().__init__(self._absolute, self.path)
            now = self._seen
        finally:
            self.size, self._seen = size, seen
        if now != seen:
            self.close()
            raise ChangedError("the file changed while it was read", path=self.path)
