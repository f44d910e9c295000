"""What the code that writes an output asks of its file or folder, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Protocol, Self

from ckptkit.formats.writing.copying import OffsetWriter

__all__ = ["OutputFile", "OutputFolder"]


class OutputFile(OffsetWriter, ABC):
    """A file that appears at its target, whole, when the ``with`` block ends without an error.

    ``target`` is the path that it gets.
    """

    target: str

    @abstractmethod
    def __enter__(self) -> Self:
        """Begin. Raises ``OutputError`` where the file cannot be written."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the file, or remove everything after an error."""

    @abstractmethod
    def complete(self) -> str:
        """Return a path at which the written file can be read; call it after the last byte.

        A file of this machine still has its temporary name. A store has no such names: there the file gets its name
        now, and is removed again if the block ends with an error. The path is empty for a file in a folder of a store,
        which can be read only with the folder.
        """


class OutputFolder(Protocol):
    """A folder that gets all its files together when the ``with`` block ends without an error."""

    def file(self, name: str, size: int, block: int = 0, *, by_kernel: bool = True) -> OutputFile:
        """Return a new file of the folder, which is not open yet."""
        ...

    def place(self) -> str:
        """Return a directory on the same disk as the new files, or the URL of the folder."""
        ...

    def complete(self) -> str:
        """Return a path at which the folder can be read with all its new files; call it after the last file."""
        ...
