"""A base class for objects that are used in a ``with`` statement and closed at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

__all__ = ["Closing"]


class Closing(ABC):
    """Call ``close`` at the end of a ``with`` block, whether or not the block raises."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Release the files, threads or memory of the object."""

    def __enter__(self) -> Self:
        """Return the object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the object."""
        self.close()
