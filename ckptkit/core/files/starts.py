"""Where the stored bytes of a container begin, which a few bytes in front of each of them say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ckptkit.core.files.source import ByteSource

__all__ = ["LateStarts"]

_FEW = 4


class LateStarts(Mapping[str, int]):
    """The offset of stored bytes by name, for a file of a store. The bytes in front of them, which say it, are checked.

    They are read when an offset is asked for, since each is a request. After the first few, all others are asked for
    together.
    """

    def __init__(
        self,
        file: ByteSource,
        names: Mapping[str, object],
        fronts: Callable[[str], tuple[int, int]],
        check: Callable[[str, bytes], int],
    ) -> None:
        """Take the names in the order of the file.

        ``fronts`` returns the offset and the number of bytes in front of a name, and ``check`` the offset that those
        bytes give. Both may raise ``FormatError``.
        """
        self._file = file
        self._names = names
        self._fronts = fronts
        self._check = check
        self._found: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        """Return the offset of the bytes of a name. Raises what ``check`` raises."""
        start = self._found.get(name)
        if start is None:
            if len(self._found) == _FEW:
                self._file.will_read([self._fronts(other) for other in self._names if other not in self._found])
            start = self._found[name] = self._check(name, self._file.read(*self._fronts(name)))
        return start

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the order of the file."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a name; nothing is read."""
        return name in self._names
