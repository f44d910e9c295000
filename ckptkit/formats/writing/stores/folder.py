"""A folder in a store, whose files get their names one after the other: the index, which names the others, last."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from ckptkit.core.files.places import join
from ckptkit.errors import CkptkitError
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.state import PathState, Target, changed_meanwhile, created_meanwhile, name_leftover
from ckptkit.formats.writing.stores.asking import Store, is_same_state, store_errors
from ckptkit.formats.writing.stores.file import SentFile, StoreFile, name_lost
from ckptkit.formats.writing.stores.transfers import is_temporary

__all__ = ["StoreFolder"]

_WEIGHTS = (".safetensors", ".distcp")
_INDEXES = (".index.json", ".metadata")


class StoreFolder:
    """New files of a folder. All are sent first; then they get their names, and at the end old files are removed.

    If a new file has the name of an old one, the old index is removed before: no reader finds an index that names files
    of two checkpoints. After an error, the new files are removed. The old index is written back if all the files that
    it names are still there.
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
        self._removed: set[str] = set()
        self._is_replacing = False

    def __enter__(self) -> Self:
        """Begin; nothing is asked."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the threads, or remove the new files after an error."""
        if kind is None:
            for file in self._files.values():
                file.end()
            return
        left = self._remove_new()
        if isinstance(error, CkptkitError):
            name_leftover(error, left)
            lost = sorted(self._lost())
            if lost:
                name_lost(error, join(self._target.path, lost[0]))
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
            file.commit()

    def complete(self) -> str:
        """Give all files their names, the index last, remove old files, and return the URL of the folder."""
        self._begin_replacing()
        for name in sorted(self._files, key=lambda name: name == self._last):  # otherwise in the order of writing
            if not self._files[name].is_committed:
                self._files[name].commit()
        self._remove_old()
        return self._target.path

    def _begin_replacing(self) -> None:
        """Compare the folder with its state when the output was chosen; remove the old index if it would be wrong."""
        if self._is_replacing:
            return
        with store_errors(self._target.path):
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
            for name in self._old_indexes:
                self._store.remove(name)

    def _wrong_indexes(self) -> list[str]:
        """Return the old indexes, if a file that they can name is replaced."""
        weights = [name for name in self._files if name in self._target.before.entries and name.endswith(_WEIGHTS)]
        return [name for name in self._replaced if name.endswith(_INDEXES)] if weights else []

    def _lost(self) -> set[str]:
        """Return the old files that are gone: new files got their names, or they were removed."""
        return self._removed.union(name for name, file in self._files.items() if file.is_old_lost)

    def _remove_old(self) -> None:
        old = self._replaced.difference(self._files, self._old_indexes)
        for name in sorted(old, key=lambda name: (not name.endswith(_INDEXES), name)):
            self._removed.add(name)
            try:
                self._store.remove(name)
            except Exception:  # noqa: BLE001 - the libraries have no common class of errors
                self._left.append(join(self._target.path, name))

    def _remove_new(self) -> list[str]:
        left: list[str] = []
        for name in sorted(self._files, key=lambda name: name != self._last):  # the index first
            left += self._files[name].remove()
        if not self._lost():
            for name, data in self._old_indexes.items():
                try:
                    self._store.write(name, data)
                except Exception:  # noqa: BLE001
                    left.append(join(self._target.path, name))
        return left
