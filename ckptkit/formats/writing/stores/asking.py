"""What is at a URL of a store, and the few calls that change it; every error of a store is one sentence."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from ckptkit.core.files.remote import forget
from ckptkit.core.files.remote.failures import NoBucketError, TransientError, explain
from ckptkit.core.files.remote.store import ObjectState, state_of
from ckptkit.core.files.remote.stores import filesystem
from ckptkit.core.files.remote.traffic import Meter, meter_of
from ckptkit.core.files.remote.urls import host_of
from ckptkit.errors import OutputError

__all__ = ["WAY_OUT", "Store", "is_same_state", "store_errors"]


WAY_OUT = "write to a path of this machine, and upload it with the tool of the store"


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn every error of a store into an ``OutputError`` about the URL; nothing of it shows a credential."""
    try:
        yield
    except OutputError:
        raise
    except (NotImplementedError, io.UnsupportedOperation):
        raise OutputError("the store does not let files be written", hint=WAY_OUT, path=url) from None
    except Exception as error:
        failure = explain(error, url, failure="cannot be written")
        if isinstance(failure, TransientError):
            raise OutputError(failure.reason, hint="run the command again later", path=url) from None
        if failure is error and failure.path != url:  # of an input
            raise
        raise OutputError(failure.reason, hint=failure.hint, path=url) from None


def is_same_state(first: Hashable, second: Hashable) -> bool:
    """Return whether two answers of a store are about one version of a file; None is no file."""
    if isinstance(first, ObjectState) and isinstance(second, ObjectState):
        return not first.is_other(second)
    return first == second


class Store:
    """The file or folder at a URL, without credentials in its name."""

    def __init__(self, url: str) -> None:
        """Find the filesystem; nothing is asked. Raises ``PathError`` where its library is missing."""
        self.url = url
        self.filesystem, self.path = filesystem(url, writing=True)
        self.meter: Meter = meter_of(host_of(url))

    def file_state(self) -> Hashable:
        """Return what tells the present version of the file from others, or None where there is no file.

        A folder is the string ``"folder"``.
        """
        self.filesystem.invalidate_cache()
        try:
            with self.meter.request():
                info = self.filesystem.info(self.path)
        except FileNotFoundError as error:
            self._refuse_without_bucket(error)
            return None
        return "folder" if info["type"] == "directory" else state_of(info)

    def entries(self) -> Mapping[str, Hashable] | None:
        """Return the state of each file and folder in the folder, or None where there is no folder.

        A path that names a file has the one entry ``""``.
        """
        self.filesystem.invalidate_cache()
        try:
            with self.meter.request():
                found: list[dict[str, Any]] = self.filesystem.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._refuse_without_bucket(error)
            return None
        start = self.path.rstrip("/") + "/"
        entries: dict[str, Hashable] = {}
        for info in found:
            name = "/" + info["name"].lstrip("/") if start.startswith("/") else info["name"]
            is_folder = info["type"] == "directory"
            if name.rstrip("/") + "/" != start:  # some stores list the folder itself
                entries[name.removeprefix(start).rstrip("/")] = "folder" if is_folder else state_of(info)
            elif not is_folder and info["size"]:
                return {"": state_of(info)}
        return entries

    def _refuse_without_bucket(self, error: OSError) -> None:
        if isinstance(failure := explain(error, self.url), NoBucketError):
            raise failure from None

    def remove(self, name: str = "") -> None:
        """Remove the file, or the file of this name in the folder. A missing file is not an error."""
        with contextlib.suppress(FileNotFoundError), self.meter.request():
            self.filesystem.rm_file(self._path(name))
        forget(self.url)

    def read(self, name: str) -> bytes:
        """Return all bytes of a small file in the folder."""
        with self.meter.request():
            data: bytes = self.filesystem.cat_file(self._path(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a small file in the folder."""
        with self.meter.request():
            self.filesystem.pipe_file(self._path(name), data)
        forget(self.url)

    def _path(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path
