"""Read a checkpoint with many files, and keep only the most recently used files open."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ckptkit.core.files import LocalFile
from ckptkit.errors import ChangedError, CkptkitError

__all__ = ["FilePool", "PooledFile", "Section"]

_MOST_OPEN = 128  # a thousand ranks save a thousand files, which is about as many as a process may open


class FilePool:
    """The files of one directory by name. Each file is opened at the first request."""

    def __init__(self, directory: str) -> None:
        """Take the path of the directory, and open no file yet."""
        self.directory = directory
        self.files: dict[str, PooledFile] = {}
        self._recent: dict[PooledFile, None] = {}
        self._closed = False
        self.lock = threading.Lock()  # held while a file is read, so that no other thread closes it meanwhile

    def get(self, name: str) -> PooledFile:
        """Return the file of this name. Raises ``PathError`` where it is missing or not a regular file."""
        if name not in self.files:
            self.files[name] = PooledFile(os.path.join(self.directory, name), self)
        return self.files[name]

    def use(self, file: PooledFile) -> bool:
        """Mark ``file`` as the most recently used, and return whether ``file`` may be open.

        If too many files are open, the least recently used file is closed.
        """
        self._recent.pop(file, None)
        if self._closed:
            return False
        self._recent[file] = None
        if len(self._recent) > _MOST_OPEN:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            oldest.close()
        return True

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` where one of the files changed since it was first opened."""
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
                error.path = self.directory
            raise

    def close(self) -> None:
        """Close every file. Reading a closed file is an error."""
        self._closed = True
        self._recent.clear()
        for file in self.files.values():
            file.close()


class PooledFile(LocalFile):
    """A file that its pool may close at any time. Reading a closed file opens the file again."""

    def __init__(self, path: str, pool: FilePool) -> None:
        """Open ``path`` for the first time."""
        super().__init__(path)
        self._pool = pool
        pool.use(self)

    def fileno(self) -> int:
        """Return the file descriptor, which is valid until the pool closes the file."""
        with self._pool.lock:
            self._ensure_open()
            return super().fileno()

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes."""
        with self._pool.lock:
            self._ensure_open()
            return super().read(offset, count)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        with self._pool.lock:
            self._ensure_open()
            super().read_into(buffer, offset)

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` if the size or the modification time changed since the file was first opened."""
        self._ensure_open()
        super().check_unchanged(by_path=by_path)

    def _ensure_open(self) -> None:
        if not self._pool.use(self) or self._fd >= 0:
            return
        seen = self._seen
        super().__init__(self.path)
        if self._seen != seen:
            self.close()
            raise ChangedError("the file changed while it was read", path=self.path)


class Section(LocalFile):
    """A range of a file that a reader can use like a whole file."""

    def __init__(self, file: LocalFile, offset: int, size: int) -> None:
        """Take ``size`` bytes of ``file`` from ``offset``; the caller has checked that the range is in the file."""
        # LocalFile.__init__ is not called, since there is nothing to open.
        self.path = file.path
        self.size = size
        self.file = file
        self.offset = offset

    def fileno(self) -> int:
        """Raise ``ValueError``: the kernel would count from the start of the whole file."""
        raise ValueError("a section of a file has no descriptor")

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes of the section."""
        return self.file.read(self.offset + offset, count)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` of the section."""
        self.file.read_into(buffer, self.offset + offset)

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` where the whole file changed."""
        self.file.check_unchanged(by_path=by_path)

    def close(self) -> None:
        """Do nothing: the owner of the whole file closes it."""
