"""Staging places: the directory beside an output directory in which its files are made until all are complete."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple, Self

from ckptkit.core.text import printable
from ckptkit.formats.writing.journal import FinishedFile, Journal
from ckptkit.formats.writing.traces import note_kept, note_removed, note_temporary
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["Leftover", "Staging", "find_leftovers", "temporary_path"]

_LONGEST_NAME = 200  # bytes of the final name that the temporary name repeats; file systems allow 255 bytes in total
_TEMPORARY = lazy_pattern(r"\.ckptkit-\d+-[0-9a-f]{8}\.tmp")
_JOURNAL = "journal"
_FILES = "files"
_WORK = "work-"


def temporary_path(target: str) -> str:
    """Return a temporary path in the directory of the target, with the name of the target, ckptkit and the process."""
    return f"{_start_of_names(target)}.ckptkit-{os.getpid()}-{os.urandom(4).hex()}.tmp"


def _start_of_names(target: str) -> str:
    parent, name = os.path.split(target)
    return os.path.join(parent, os.fsencode(name)[:_LONGEST_NAME].decode("utf-8", "ignore"))


class Staging:
    """A directory with a journal, and with the directory ``files``, which becomes the output.

    The journal is locked as long as a process works here. After a process was killed, the place stays, and its finished
    files can be used. With ``keeps_finished``, that holds after an error too.
    """

    def __init__(self, path: str, journal: Journal | None = None) -> None:
        """Take the path, and the journal of a place that is there already."""
        self.path = path
        self.files = os.path.join(path, _FILES)
        self.keeps_finished = False
        self._journal = journal
        self._work = ""

    @classmethod
    def new(cls, target: str) -> Self:
        """Return a new place for the output at this real path; nothing is written yet."""
        return cls(temporary_path(target))

    @property
    def journal(self) -> Journal:
        """The journal, which is there once the place has begun."""
        assert self._journal is not None  # noqa: S101 - see begin
        return self._journal

    @property
    def finished(self) -> list[FinishedFile]:
        """The recorded files that are there with their recorded size; their bytes were not compared."""
        files = () if self._journal is None else self._journal.finished.values()
        return [file for file in files if self._size(file.name) == file.nbytes]

    def _size(self, name: str) -> int | None:
        path = os.path.join(self.files, name)
        if os.path.dirname(name) or os.path.islink(path) or not os.path.isfile(path):
            return None
        return os.path.getsize(path)

    def begin(self) -> None:
        """Make the place, or empty it of all but its finished files. Raises ``OSError``."""
        note_temporary(self.path)
        note_temporary(self.files)
        if self._journal is None:
            os.mkdir(self.path)
            self._journal = Journal.create(os.path.join(self.path, _JOURNAL))
        else:
            self._remove_unfinished()
        if not os.path.isdir(self.files):
            os.mkdir(self.files)

    def begin_work(self) -> str:
        """Return a new directory in the place, where other processes make files before they move them to ``files``.

        Raises ``OSError``.
        """
        work = os.path.join(self.path, f"{_WORK}{os.urandom(4).hex()}")
        os.mkdir(work)
        self._work = work
        return work

    def end_work(self) -> None:
        """Take that directory away: a process that still works there cannot give a file its name any more."""
        import shutil

        work, self._work = self._work, ""
        if work:
            ended = f"{work}.ended"
            with contextlib.suppress(OSError):
                os.rename(work, ended)  # nobody makes a file in it while it is removed
                shutil.rmtree(ended)

    def _remove_unfinished(self) -> None:
        import shutil

        for left in os.scandir(self.path):
            if left.name.startswith(_WORK):
                shutil.rmtree(left.path, ignore_errors=True)
        kept = {file.name for file in self.finished}
        for entry in os.scandir(self.files) if os.path.isdir(self.files) else ():
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name not in kept:
                os.unlink(entry.path)

    def end(self) -> list[str]:
        """Remove the place, and return its path if that fails."""
        import shutil

        self.end_work()
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        if os.path.lexists(self.path):
            return [self.path]
        note_removed(self.files)
        note_removed(self.path)
        return []

    def end_after_error(self) -> tuple[str, list[str]]:
        """Keep the place if it must keep its finished files and has any, else remove it.

        Returns a sentence about what is kept, which may be empty, and the path of what could not be removed.
        """
        count = len(self.finished) if self.keeps_finished else 0
        if not count:
            return "", self.end()
        self.end_work()
        self.close()
        files = "1 finished shard is" if count == 1 else f"{count:,} finished shards are"
        kept = f"{files} kept in {printable(self.path)}"
        note_kept(kept)
        return kept, []

    def close(self) -> None:
        """End the lock."""
        if self._journal is not None:
            self._journal.close()


class Leftover(NamedTuple):
    """A staging place that was there before this run; it is not locked, because another process works in it."""

    staging: Staging
    is_in_use: bool


def find_leftovers(target: str) -> Iterator[Leftover]:
    """Yield the staging places of the output at this real path. Each that is not in use is locked: close it.

    Directories of other users do not count.
    """
    parent, start = os.path.split(_start_of_names(target))
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        return
    for name in names:
        if not name.startswith(start) or not _TEMPORARY.fullmatch(name[len(start) :]):
            continue
        path = os.path.join(parent, name)
        try:
            status = os.lstat(path)
        except OSError:
            continue
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            continue
        try:
            journal = Journal.open(os.path.join(path, _JOURNAL))
        except BlockingIOError:
            yield Leftover(Staging(path), is_in_use=True)
            continue
        if journal is not None:
            yield Leftover(Staging(path, journal), is_in_use=False)
