"""The door to the outputs of every command: files and folders of this machine, or of a store if the path is a URL."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ckptkit.core.files.places import is_url
from ckptkit.formats.writing.atomic import AtomicFile, atomic_directory
from ckptkit.formats.writing.output_file import OutputFile, OutputFolder
from ckptkit.formats.writing.staging import Staging
from ckptkit.formats.writing.state import Target

__all__ = ["output_file", "output_folder", "small_file", "write_small_file", "writes_in_order"]


def writes_in_order(path: str) -> bool:
    """Return whether the bytes of an output at this path are sent from first to last, and none is changed later."""
    return is_url(path)


def output_file(target: Target, size: int, block: int = 0, *, by_kernel: bool = True) -> OutputFile:
    """Return a file of ``size`` bytes for a target that ``prepare_target`` has checked.

    ``block`` and ``by_kernel`` are as in ``OffsetWriter``.
    """
    if is_url(target.path):
        from ckptkit.formats.writing.stores.file import StoreFile

        return StoreFile(target, size)
    return AtomicFile(target, size, block, by_kernel=by_kernel)


@contextlib.contextmanager
def output_folder(
    target: Target, *, replaced: frozenset[str], last: str, left: list[str], staging: Staging | None = None
) -> Iterator[OutputFolder]:
    """Yield a folder that gets its files together, for a target that ``prepare_directory`` has checked.

    ``replaced`` has the names of old files that do not stay. ``last`` is the file that names the others, such as an
    index. ``left`` gets the path of what could not be removed. ``staging`` is where the files are made on this machine;
    by default the place is new.
    """
    if is_url(target.path):
        from ckptkit.formats.writing.stores.folder import StoreFolder

        with StoreFolder(target, replaced, last, left) as folder:
            yield folder
        return
    place = staging or Staging.new(target.path)
    with atomic_directory(target, place, replaced=replaced, left=left) as directory:
        yield _Directory(directory)


class _Directory:
    """A temporary directory of this machine."""

    def __init__(self, path: str) -> None:
        self._path = path

    def file(self, name: str, size: int, block: int = 0, *, by_kernel: bool = True) -> OutputFile:
        return AtomicFile(os.path.join(self._path, name), size, block, by_kernel=by_kernel)

    def place(self) -> str:
        return self._path

    def complete(self) -> str:
        return self._path


@contextlib.contextmanager
def small_file(target: Target, data: bytes) -> Iterator[None]:
    """Write ``data`` to a file that gets the name of the target if the block succeeds."""
    with output_file(target, len(data)) as file:
        file.write(data, 0)
        yield


def write_small_file(target: Target, data: bytes) -> None:
    """Write ``data`` to a target that ``prepare_target`` has checked, completely or not at all."""
    with small_file(target, data):
        pass
