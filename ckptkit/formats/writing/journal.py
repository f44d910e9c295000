"""The journal of an output directory: which of its files are finished, for a run that goes on after this one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

__all__ = ["FinishedFile", "Journal"]

_SCHEMA = "ckptkit.journal/1"
_LARGEST = 1 << 28  # bytes


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """A file that was complete and on the disk before it was recorded.

    ``digest`` is the algorithm and the hash of all its bytes, such as ``"sha256:9f86..."``. ``about`` is what else the
    run has to know of the file, as JSON values.
    """

    name: str
    nbytes: int
    digest: str
    about: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """A file of JSON lines: first what decides the bytes of the files, then one line for each finished file.

    Only one process has it open at a time: it holds a lock that ends with the process. A line counts once it is
    complete, and is on the disk when ``add`` returns. So a line that a crash cut off is as if it was never written.
    """

    def __init__(self, fd: int, *, is_locked: bool = True) -> None:
        """Take an open file; see ``create`` and ``open``."""
        self.made_of: Mapping[str, str] = {}  # empty until the first line
        self.finished: dict[str, FinishedFile] = {}
        self.is_locked = is_locked  # else another process could work here too, so nothing may be recorded
        self._fd = fd
        self._end = 0

    @classmethod
    def create(cls, path: str) -> Self:
        """Return a new, empty journal. Raises ``OSError`` where it cannot be made."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        return cls(fd, is_locked=_is_locked(fd))

    @classmethod
    def open(cls, path: str) -> Self | None:
        """Return the journal of a process that ended, or None where there is none that can be read and locked.

        Raises ``BlockingIOError`` where another process has it open.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        journal = cls(fd)
        try:
            is_read = journal._read(path)
        except BaseException:
            journal.close()
            raise
        if is_read:
            return journal
        journal.close()
        return None

    def _read(self, path: str) -> bool:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_size > _LARGEST:
            return False
        if not _is_locked(self._fd) or not _is_at(path, status):  # the process that held the lock has removed it
            return False
        lines = os.pread(self._fd, status.st_size, 0).splitlines(keepends=True)
        first: Mapping[str, Any] = _parsed(lines[0]) if lines else {"schema": _SCHEMA}
        if first.get("schema") != _SCHEMA:
            return False
        if isinstance(first.get("made_of"), dict):
            self.made_of = first["made_of"]
            self._end = len(lines[0])
        for line in lines[1:]:
            file = _file(_parsed(line))
            if file is None:
                break
            self.finished[file.name] = file
            self._end += len(line)
        return True

    def begin(self, made_of: Mapping[str, str]) -> None:
        """Write the first line. Raises ``OSError`` where the disk cannot hold it."""
        self._write({"schema": _SCHEMA, "made_of": dict(made_of)})
        self.made_of = made_of

    def add(self, file: FinishedFile) -> None:
        """Record a finished file, after ``begin``. Raises ``OSError`` where the disk cannot hold the line."""
        self._write({"name": file.name, "bytes": file.nbytes, "digest": file.digest, "about": dict(file.about)})
        self.finished[file.name] = file

    def _write(self, document: Mapping[str, object]) -> None:
        line = json.dumps(document).encode() + b"\n"
        os.ftruncate(self._fd, self._end)  # a line that a crash cut off
        done = 0
        while done < len(line):
            done += os.pwrite(self._fd, line[done:], self._end + done)
        os.fsync(self._fd)
        self._end += done

    def close(self) -> None:
        """End the lock. Closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # each line is on the disk already
                os.close(fd)


def _is_locked(fd: int) -> bool:
    """Lock a file for this process, and return whether its file system can. Raises ``BlockingIOError``."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _is_at(path: str, status: os.stat_result) -> bool:
    try:
        now = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(now, status)


def _file(document: Mapping[str, Any]) -> FinishedFile | None:
    name, nbytes, digest, about = (document.get(key) for key in ("name", "bytes", "digest", "about"))
    is_valid = isinstance(name, str) and isinstance(nbytes, int) and isinstance(digest, str) and isinstance(about, dict)
    return FinishedFile(name, nbytes, digest, about) if is_valid else None  # type: ignore[arg-type]


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the document of a complete line, else an empty one."""
    if not line.endswith(b"\n"):
        return {}
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
