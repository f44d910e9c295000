"""Stores of the tests: filesystems of fsspec that keep uploads back in several ways, count calls, and fail at one."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

__all__ = ["AtCloseStore", "PartsStore", "ShownStore", "is_as_told", "register_stores"]

_TOLD = re.compile(r"(?:in \S+|), (?:and )?(.+?) (is|are|may be) (new or old|new|the old ones?|gone)(?=[,;])")


def is_as_told(text: str, url: str, now: dict[str, bytes], old: dict[str, bytes], new: dict[str, bytes]) -> bool:
    """Return whether a folder has only files of one output, or the sentence in ``text`` is true of each file.

    ``now``, ``old`` and ``new`` are the files of the folder by their names.
    """
    if f"in {url}," not in text:
        return now == old or (now == new and (f"{url} has all its new files" in text))
    states: dict[str, str] = {}
    for names, _, state in _TOLD.findall(text[text.index(f"in {url},") :]):
        states |= dict.fromkeys(re.split(", | and ", names.removeprefix("and ")), state)
    assert states.keys() >= now.keys() - (now.keys() & old.keys() - new.keys()), (states, now.keys())
    assert states.keys() >= {name for name in old if now.get(name) != old[name]}, states
    assert "run it again with --force" in text
    for name, state in states.items():
        here = now.get(name)
        assert here in {
            "new": (new.get(name),), "gone": (None,), "new or old": (old.get(name), new.get(name)),
        }.get(state, (old.get(name),)), (name, state)  # fmt: skip
        assert state == "gone" or here is not None, (name, state)
    return True


class PartsStore(MemoryFileSystem):  # type: ignore[misc]
    """A store that keeps the parts of a file until ``commit``, as S3 does."""

    protocol = "parts"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    unfinished: ClassVar[set[str]] = set()
    count = 0
    fails_at = 0
    interrupts_at = 0
    loses_answers = False  # each file gets its name, and an error comes in place of the answer
    watch: ClassVar[Callable[[], None] | None] = None
    lock = threading.Lock()

    @classmethod
    def called(cls) -> None:
        """Count a call, and fail at the chosen one."""
        with cls.lock:
            cls.count += 1
            count = cls.count
            if cls.watch is not None:
                cls.watch()
        if count == cls.interrupts_at:
            os.kill(os.getpid(), signal.SIGINT)
        if count == cls.fails_at:
            raise OSError(errno.EIO, "the store failed")

    @classmethod
    def answered(cls) -> None:
        """Fail where answers are lost."""
        if cls.loses_answers:
            raise OSError(errno.ECONNRESET, "the answer was lost")

    @classmethod
    def reset(cls, content: dict[str, bytes], fails_at: int = 0) -> None:
        """Begin with these files, and let one call fail."""
        cls.watch, cls.fails_at, cls.interrupts_at, cls.loses_answers = None, 0, 0, False
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.unfinished.clear()
        for path, data in content.items():
            cls().show(path, data)
        cls.count, cls.fails_at = 0, fails_at

    @classmethod
    def content(cls) -> dict[str, bytes]:
        """Return the files that are visible."""
        return {path: file.getvalue() for path, file in cls.store.items()}

    def info(self, path: str, **options: Any) -> Any:
        self.called()
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self.called()
        return super().ls(path, detail, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.called()
        return super().cat_file(path, *arguments, **options)

    def rm_file(self, path: str) -> None:
        self.called()
        super().rm_file(path)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.called()
        self.show(self._strip_protocol(path), value)

    def show(self, path: str, data: bytes) -> None:
        """Make a file visible."""
        self.store[path] = MemoryFile(self, path, data)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix(f"{cls.protocol}://").strip("/")

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, block_size, **options)
        return self.file_type(self, self._strip_protocol(path), mode, block_size or 100, autocommit=False)


class PartsFile(AbstractBufferedFile):  # type: ignore[misc]
    fs: PartsStore

    def _initiate_upload(self) -> None:
        self.fs.called()
        self.fs.unfinished.add(self.path)
        self.parts = b""

    def _upload_chunk(self, final: bool = False) -> bool:  # noqa: ARG002
        self.fs.called()
        self.parts += self.buffer.getvalue()
        return True

    def commit(self) -> None:
        self.fs.called()
        self.fs.show(self.path, self.parts)
        self.fs.unfinished.discard(self.path)
        self.fs.answered()

    def discard(self) -> None:
        self.fs.called()
        self.fs.unfinished.discard(self.path)


class AtCloseFile(AbstractBufferedFile):  # type: ignore[misc]
    fs: PartsStore
    parts = b""

    def _upload_chunk(self, final: bool = False) -> bool:
        self.fs.called()
        self.parts += self.buffer.getvalue()
        if final:
            self.fs.show(self.path, self.parts)
            self.fs.answered()
        return True


class ShownFile(io.RawIOBase):
    def __init__(self, fs: PartsStore, path: str, *_: Any, **__: Any) -> None:
        self.fs, self.path = fs, path
        fs.called()
        fs.show(path, b"")

    def write(self, data: Any) -> int:
        self.fs.called()
        self.fs.show(self.path, self.fs.store[self.path].getvalue() + bytes(data))
        return len(data)


class AtCloseStore(PartsStore):
    """A store in which a file appears when it is closed, as in Azure's and on the hub."""

    protocol = "atclose"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    unfinished: ClassVar[set[str]] = set()
    file_type = AtCloseFile


class ShownStore(PartsStore):
    """A store in which a file is visible, and empty, when it is opened."""

    protocol = "shown"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    unfinished: ClassVar[set[str]] = set()
    file_type = ShownFile

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        self.called()
        self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))
        self.answered()


PartsStore.file_type = PartsFile


def register_stores() -> None:
    """Let fsspec find the stores by their schemes."""
    for kind in (PartsStore, AtCloseStore, ShownStore):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)
