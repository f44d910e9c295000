"""Write the opcodes of a pickle. No object is pickled: the caller says which opcodes make it."""

from __future__ import annotations

import struct
from collections.abc import Iterable

__all__ = ["PickleWriter"]


class PickleWriter:
    """Write opcodes of protocol 2 to ``out``, which begins with the protocol.

    Names of code and constants are written once, and then recalled from the memo.
    """

    def __init__(self) -> None:
        """Begin a pickle."""
        self.out = bytearray(b"\x80\x02")
        self._memo: dict[tuple[str, ...], int] = {}

    def name(self, module: str, name: str) -> None:
        """Push a class or a function."""
        if not self._recall((module, name)):
            self.out += f"c{module}\n{name}\n".encode("ascii")
            self._remember((module, name))

    def constant(self, text: str) -> None:
        """Push a string that is needed often."""
        if not self._recall((text,)):
            self.text(text)
            self._remember((text,))

    def text(self, text: str) -> None:
        """Push a string."""
        raw = text.encode("utf-8", "surrogatepass")
        self.out += b"X" + struct.pack("<I", len(raw)) + raw

    def integer(self, value: int) -> None:
        """Push an integer that is not negative."""
        if 0 <= value < 256:
            self.out += struct.pack("<cB", b"K", value)
        elif 0 <= value < 2**31:
            self.out += struct.pack("<ci", b"J", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += struct.pack("<cB", b"\x8a", len(raw)) + raw

    def integers(self, values: Iterable[int]) -> None:
        """Push a tuple of integers."""
        self.out += b"("
        for value in values:
            self.integer(value)
        self.out += b"t"

    def ordered_dict(self) -> None:
        """Push an empty ``OrderedDict``."""
        self.name("collections", "OrderedDict")
        self.out += b")R"

    def instance(self, module: str, name: str) -> None:
        """Push an object of a class that is made without arguments; a state can follow."""
        self.name(module, name)
        self.out += b")\x81"

    def _recall(self, key: tuple[str, ...]) -> bool:
        if key not in self._memo:
            return False
        self.out += struct.pack("<cB", b"h", self._memo[key])
        return True

    def _remember(self, key: tuple[str, ...]) -> None:
        self._memo[key] = len(self._memo)
        self.out += struct.pack("<cB", b"q", self._memo[key])
