"""Files and folders of this machine, read with ``pread``."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final, NamedTuple

from ckptkit.core.files.source import FolderNames
from ckptkit.core.text import quoted
from ckptkit.errors import ChangedError, PathError

__all__ = ["FileState", "LocalFile", "LocalFolder", "file_state", "is_same_local"]

_REASONS = {
    errno.ENOENT: "no such file or directory",
    errno.EACCES: "permission denied",
    errno.ELOOP: "too many levels of symbolic links",
    errno.ENXIO: "not a regular file",
}


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or os.strerror(error.errno or 0).lower()


class FileState(NamedTuple):
    """The numbers that change when a file is replaced or written: device, inode, size, and modification time."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def file_state(status: os.stat_result) -> FileState:
    """Return the state of the file that ``status`` describes."""
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def is_same_local(first: str, second: str) -> bool:
    """Return whether two paths name the same file or directory; a path that does not exist is another file.

    Raises ``PathError`` where the state of one of both cannot be read.
    """
    try:
        return os.path.samefile(first, second)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise PathError(_reason(error), path=error.filename or first) from None


class LocalFile:
    """A regular file that is open for reading.

    The file is never mapped into memory. If another program truncates the file, a memory map raises SIGBUS, whereas
    ``pread`` returns fewer bytes.
    """

    is_remote: Final = False

    def __init__(self, path: str, shown: str = "") -> None:
        """Open ``path``, which messages show as ``shown``, by default as it is.

        Raises ``PathError`` where the file is missing, unreadable or not a regular file.
        """
        self.path = shown or path
        self._place = path
        try:
            # Without O_NONBLOCK, opening a FIFO without a writer never returns.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            reason = _reason(error)
            if error.errno == errno.ENOENT and os.path.islink(path):
                reason = f"a symbolic link to {quoted(os.readlink(path))}, which does not exist"
            raise PathError(reason, path=self.path) from None
        except ValueError as error:  # a NUL byte in the name
            raise PathError(str(error), path=self.path) from None
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()  # a file of a pool that is opened again lives on
            raise PathError("not a regular file", path=self.path)
        self.size = status.st_size
        self._seen = file_state(status)

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Yield the file descriptor, with which the kernel can copy the bytes; it is valid in the ``with`` block.

        Raises ``PathError`` for a closed file.
        """
        if self._fd < 0:
            raise self._error()
        yield self._fd

    def _error(self, error: OSError | None = None) -> PathError:
        if error is None or self._fd < 0:
            return PathError("the checkpoint was closed", hint="read it before it is closed", path=self.path)
        return PathError(_reason(error), path=self.path)

    @property
    def identity(self) -> tuple[int, int]:
        """The device and the inode, which every name and every link of the file has."""
        return self._seen[:2]

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes.

        Raises ``ChangedError`` where the file became shorter, and ``PathError`` where the disk cannot read it.
        """
        data = self._read(offset, count)
        if len(data) == count:
            return data
        parts = [data]
        missing = count - len(data)
        while missing:
            data = self._read(offset + count - missing, missing)
            if not data:
                raise ChangedError("the file became shorter while it was read", path=self.path)
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)

    def _read(self, offset: int, count: int) -> bytes:
        try:
            return os.pread(self._fd, count, offset)
        except OSError as error:
            raise self._error(error) from None

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset``. Raises the same errors as ``read``."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._error(error) from None
            if count == 0:
                raise ChangedError("the file became shorter while it was read", path=self.path)
            done += count

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` if the size or the modification time changed since the file was opened.

        With ``by_path``, also raise it if the path names another file now. A removed file can still be read.
        """
        if self._fd < 0:
            raise self._error()
        if file_state(os.fstat(self._fd)) != self._seen:
            raise ChangedError("the file changed while it was read", path=self.path)
        if not by_path:
            return
        try:
            now = file_state(os.stat(self._place))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise PathError(_reason(error), path=self.path) from None
        if now != self._seen:
            raise ChangedError(
                "another program replaced the file while it was read", hint="run the command again", path=self.path
            )

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Do nothing: the kernel reads ahead."""

    def will_check(self) -> None:
        """Do nothing: the state of a file is read at once."""

    def close(self) -> None:
        """Close the file. Closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: str, shown: str = "") -> None:
        """Take the path, and how messages show it; nothing is read yet, and the folder need not exist."""
        self.path = shown or path
        self._place = path

    def place_of(self, name: str) -> str:
        """Return the path by which the system knows a name in the folder."""
        return os.path.join(self._place, name)

    def names(self, most: int) -> FolderNames:
        """Return the first names: at most ``most``, and one more if there are more. Raises ``PathError``."""
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(self._place or ".") as entries:
                for entry in islice(entries, most + 1):
                    (folders if _is_folder(entry) else files).append(entry.name)
        except OSError as error:
            raise PathError(_reason(error), path=self.path) from None
        except ValueError as error:  # a NUL byte in the path
            raise PathError(str(error), path=self.path) from None
        return FolderNames(tuple(sorted(files)), tuple(sorted(folders)))

    def has_file(self, name: str) -> bool:
        """Return whether the name is a file, or a link to one."""
        return os.path.isfile(self.place_of(name))

    def knows(self, name: str) -> bool:  # noqa: ARG002 - a disk answers at once
        """Return True."""
        return True

    def has_folder(self, name: str) -> bool:
        """Return whether the name is a folder, or a link to one."""
        return os.path.isdir(self.place_of(name))

    def has_link(self, name: str) -> bool:
        """Return whether the name is a symbolic link."""
        return os.path.islink(self.place_of(name))

    def open(self, name: str) -> LocalFile:
        """Return the open file. Raises ``PathError`` where it is missing, unreadable or not a regular file."""
        return LocalFile(self.place_of(name), os.path.join(self.path, name))

    def folder(self, name: str) -> LocalFolder:
        """Return the folder of this name inside this folder."""
        return LocalFolder(self.place_of(name), os.path.join(self.path, name))

    def will_open(self, names: Sequence[str]) -> None:
        """Do nothing: a file is opened when it is read."""

    def will_list(self, names: Sequence[str]) -> None:
        """Do nothing: a folder is listed when its names are read."""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
