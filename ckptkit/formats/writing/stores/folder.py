"""A folder in a store, whose files get their names one after the other: the index, which names the others, last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from ckptkit.core.files.places import join
from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.state import (
    PathState,
    Target,
    changed_meanwhile,
    created_meanwhile,
    is_wrong_output,
)
from ckptkit.formats.writing.stores.asking import Store, is_same_state, store_errors
from ckptkit.formats.writing.stores.file import SentFile, StoreFile
from ckptkit.formats.writing.stores.put_off import signals_put_off
from ckptkit.formats.writing.stores.remains import tell_what_is_left, what_is_where
from ckptkit.formats.writing.stores.transfers import is_temporary
from ckptkit.formats.writing.traces import note_replaced, note_replacing

__all__ = ["StoreFolder"]

_WEIGHTS = (".safetensors", ".distcp")
_AT_ONCE = 16
_INDEXES = (".index.json", ".metadata")


class StoreFolder:
    """New files of a folder. All are sent first; then they get their names, and at the end old files are removed.

    If a new file has the name of an old one, the old index is removed before: no reader finds an index that names files
    of two checkpoints. Signals wait while files get their names, where that is quick.

    After an error, the new files are removed, and the old index is written back. But when an old file is gone, what has
    its name stays, and a sentence says which files are new.
    """

    def __init__(self, target: Target, replaced: frozenset[str], last: str, left: list[str]) -> None:
        """Take the target, the old files that do not stay, and the name of the new index, or an empty string."""
        self._target = target
        self._store = Store(target.path)
        self._replaced = {name for name in replaced if name in target.before.entries}
        self._last = last
        self._left = left
        self._files: dict[str, SentFile] = {}
        self._old_indexes: dict[str, bytes] = {}
        self._gone: set[str] = set()  # old files that were removed
        self._is_replacing = False
        self._has_all_names = False

    def __enter__(self) -> Self:
        """Begin; nothing is asked."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the threads, and after an error remove the new files if all old ones are still there."""
        left = [] if kind is None else self._take_back(error)
        for file in self._files.values():
            file.end()
        told = "" if kind is None else self._told()
        note_replaced(self._target.path)
        tell_what_is_left(error, self._target.path, left, told)
        if isinstance(error, CkptkitError):
            error.path = error.path or self._target.given

    def file(self, name: str, size: int, block: int = 0, *, by_kernel: bool = True) -> OutputFile:  # noqa: ARG002
        """Return a new file, which gets its name in ``complete``."""
        return StoreFile(
            Target(join(self._target.path, name), name, PathState(self._target.before.entries.get(name))), size, self
        )

    def place(self) -> str:
        """Return the URL of the folder."""
        return self._target.path

    def hold(self, file: SentFile) -> None:
        """Keep a file of which all bytes were sent; one that cannot wait unseen gets its name now."""
        name = file.url.rpartition("/")[2]
        self._files[name] = file
        if not file.is_held and name != self._last:
            self._begin_replacing()
            file.commit(is_free=name in self._old_indexes)

    def complete(self) -> str:
        """Give all files their names, the index last, remove old files, and return the URL of the folder."""
        is_quick = all(file.is_quick for file in self._files.values() if not file.is_named)
        with signals_put_off() if is_quick else contextlib.nullcontext():
            self._begin_replacing()
            for name in sorted(self._files, key=lambda name: name == self._last):  # otherwise in the order of writing
                if not self._files[name].is_named:
                    self._files[name].commit(is_free=name in self._old_indexes)
            self._has_all_names = True
            with signals_put_off():
                self._remove_old()
        return self._target.path

    def _begin_replacing(self) -> None:
        """Compare the folder with its state when the output was chosen; remove the old index if it would be wrong."""
        if self._is_replacing:
            return
        with signals_put_off(), store_errors(self._target.path):
            now = self._store.entries()
            before = self._target.before
            if before.file is None:
                if any(not is_temporary(name) for name in now or ()):
                    raise created_meanwhile(self._target.given)
            elif not all(
                is_same_state((now or {}).get(name), before.entries.get(name))
                for name in self._replaced.union(self._files)
            ):
                raise changed_meanwhile("directory", self._target.given)
            for name in self._wrong_indexes():
                self._old_indexes[name] = self._store.read(name)
            self._is_replacing = True
            note_replacing(self._target.path, self._told)
            for name in self._old_indexes:
                self._gone.add(name)
                self._store.remove(name)

    def _wrong_indexes(self) -> list[str]:
        """Return the old indexes, if a file that they can name is replaced."""
        weights = [name for name in self._files if name in self._target.before.entries and name.endswith(_WEIGHTS)]
        return [name for name in self._replaced if name.endswith(_INDEXES)] if weights else []

    def _remove_old(self) -> None:
        old = self._replaced.difference(self._files, self._old_indexes)
        for name in sorted(old, key=lambda name: (not name.endswith(_INDEXES), name)):
            try:
                self._store.remove(name)
            except Exception:  # noqa: BLE001 - the libraries have no common class of errors
                self._left.append(join(self._target.path, name))
            else:
                self._gone.add(name)

    def _is_old_lost(self) -> bool:
        """Return whether an old file is gone that cannot be written back."""
        return not self._gone <= self._old_indexes.keys() or any(file.has_replaced for file in self._files.values())

    def _take_back(self, error: BaseException | None) -> list[str]:
        """End the transfers, and remove the new files where that gives the old state; return in words what is left."""
        left = _of_each(SentFile.stop, self._files.values())
        is_lost = self._is_old_lost()
        if is_lost and not (self._has_all_names and is_wrong_output(error)):
            return left
        index = [self._files[self._last]] if self._last in self._files else []
        left += _of_each(SentFile.remove, index)
        left += _of_each(SentFile.remove, [file for file in self._files.values() if file not in index])
        for name, data in () if is_lost else self._old_indexes.items():
            with contextlib.suppress(Exception):  # else the sentence names it
                self._store.write(name, data)
                self._gone.discard(name)
        return left

    def _told(self) -> str:
        """Return which files are new, old and gone, or an empty string where all old ones are there."""
        removed = {name for name, file in self._files.items() if file.is_removed}
        new = {name for name, file in self._files.items() if file.is_named} - removed
        unknown = {name for name, file in self._files.items() if file.is_named is None}
        old = self._target.before.entries.keys() & self._replaced.union(self._files)
        gone = (self._gone | (old & removed)) - new - unknown
        if not gone and not old & (new | unknown):
            return ""
        old -= new | unknown | gone
        if self._has_all_names and not old and not unknown and new == self._files.keys():
            return f"{printable(self._target.path)} has all its new files: they have replaced the old ones already"
        return what_is_where(self._target.path, new=new, old=old, gone=gone, unknown=unknown)


def _of_each(end: Callable[[SentFile], list[str]], files: Collection[SentFile]) -> list[str]:
    """Return what is left of all files, which end at the same time: a store may be away, and each call wait for it."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [remains for left in pool.map(end, files) for remains in left]
