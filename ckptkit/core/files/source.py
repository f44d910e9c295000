"""What readers ask of a file and of a folder, whether it is on this disk or in a store."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

__all__ = ["ByteSource", "Folder", "FolderNames", "Section"]


class ByteSource(Protocol):
    """A file that is open for reading. Several threads may read it at once."""

    @property
    def path(self) -> str:
        """What messages show: a path of this disk, or a URL without credentials."""
        ...

    @property
    def size(self) -> int:
        """The number of bytes, as it was when the file was opened."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether a read is a request, so that reading many small ranges one by one is slow."""
        ...

    @property
    def identity(self) -> Hashable:
        """A value that is equal for one file under two names, and different for two files."""
        ...

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes from ``offset``.

        Raises ``ChangedError`` where the file is shorter now or another one, and ``PathError`` where it cannot be read.
        """
        ...

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes from ``offset``. Raises the same errors as ``read``."""
        ...

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Take a hint: these ranges, as offset and number of bytes, are read next, in this order.

        A store fetches them ahead, those that are near each other together. Nothing is raised: an error comes when the
        bytes are read. The ranges may overlap, may be empty, and may never be read. A disk does nothing.
        """
        ...

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` if the file changed since it was opened.

        With ``by_path``, also raise it if the path names another file now. A removed file is not an error.
        """
        ...

    def will_check(self) -> None:
        """Take a hint: ``check_unchanged(by_path=True)`` is called next. A store is asked now; a disk does nothing."""
        ...

    def close(self) -> None:
        """Close the file. Closing twice is allowed; reading a closed file raises ``PathError``."""
        ...


class FolderNames(NamedTuple):
    """The names in a folder, in alphabetical order. A link to a folder counts as a folder."""

    files: tuple[str, ...]
    folders: tuple[str, ...]
    is_listed: bool = True  # False for a server that does not list folders: names must be tried, others may be missing

    @property
    def all(self) -> tuple[str, ...]:
        """The names of files and folders."""
        return (*self.files, *self.folders)


class Folder(Protocol):
    """A folder whose names can be listed and opened. A name may be a path below the folder, with ``/`` in it."""

    @property
    def path(self) -> str:
        """What messages show: a path of this disk, or a URL without credentials and without a slash at the end."""
        ...

    def names(self, most: int) -> FolderNames:
        """Return the names in the folder: at most ``most``, and one more if there are more.

        A store asks once, and keeps the answer, also for ``has_file``, ``has_folder`` and ``open``. A server that does
        not list answers with ``is_listed=False``. Raises ``PathError`` where the folder does not exist or is forbidden.
        """
        ...

    def has_file(self, name: str) -> bool:
        """Return whether the folder has a file of this name; a store that lists answers by its listing."""
        ...

    def knows(self, name: str) -> bool:
        """Return whether ``has_file`` of this name needs no request of its own, since a listing answers it."""
        ...

    def has_folder(self, name: str) -> bool:
        """Return whether the folder has a folder of this name."""
        ...

    def has_link(self, name: str) -> bool:
        """Return whether the name is a symbolic link, which a store never has."""
        ...

    def open(self, name: str) -> ByteSource:
        """Return the open file of this name. Raises ``PathError`` where it is missing or cannot be read."""
        ...

    def folder(self, name: str) -> Folder:
        """Return the folder of this name inside this folder. Nothing is asked, so it need not exist."""
        ...

    def will_open(self, names: Sequence[str]) -> None:
        """Take a hint: all these files are opened and their first bytes read next.

        A store begins to ask for the size and the first bytes of all of them, in one round, and does not wait for the
        answers. Nothing is raised: an error comes when the file is opened. A name may be there twice, or not exist. A
        disk does nothing.
        """
        ...

    def will_list(self, names: Sequence[str]) -> None:
        """Take a hint: the names in all these folders of this folder are asked for next. It is as ``will_open``."""
        ...


class Section:
    """A range of a file that a reader can use like a whole file."""

    def __init__(self, file: ByteSource, offset: int, size: int) -> None:
        """Take ``size`` bytes of ``file`` from ``offset``; the caller has checked that the range is in the file."""
        self.path = file.path
        self.size = size
        self.file = file
        self.offset = offset
        self.is_remote = file.is_remote

    @property
    def identity(self) -> tuple[Hashable, int]:
        """The file and the start of the section in it."""
        return self.file.identity, self.offset

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes of the section."""
        return self.file.read(self.offset + offset, count)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` of the section."""
        self.file.read_into(buffer, self.offset + offset)

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Give the hint to the whole file."""
        self.file.will_read([(self.offset + start, count) for start, count in ranges])

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise ``ChangedError`` where the whole file changed."""
        self.file.check_unchanged(by_path=by_path)

    def will_check(self) -> None:
        """Give the hint to the whole file."""
        self.file.will_check()

    def close(self) -> None:
        """Do nothing: the owner of the whole file closes it."""
