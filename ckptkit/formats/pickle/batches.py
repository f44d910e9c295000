"""Read a batch of numbers and short strings at once: Python's pickler appends up to 1,000 items between two opcodes."""

from __future__ import annotations

import operator
import re
import struct
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Final, cast

__all__ = ["APPENDS", "Batch", "are_new_numbers", "find_batch", "is_text", "items_in"]

APPENDS: Final = 0x65
_TEXT: Final = 0x58
_FEWEST = 32  # items; fewer are read as fast one by one
_LONGEST_TEXT = 63  # bytes
_LONGEST_SMALL = 5 + 31  # bytes of the opcode of a string that takes no more memory than two numbers
_WINDOW = 1 << 20  # bytes of a pickle that are looked at for one batch, so that it never builds too much
_TEXTS = b"|".join(re.escape(struct.pack("<I", size)) + b".{%d}" % size for size in range(_LONGEST_TEXT + 1))
_LONGS = b"|".join(re.escape(bytes([size])) + b".{%d}" % size for size in range(9))
_NUMBER = rb"[N\x88\x89]|K.|M..|J.{4}|G.{8}|\x8a(?:" + _LONGS + rb")"  # or None, True, False
_STRING = rb"X(?:" + _TEXTS + rb")"
_ITEM = _NUMBER + rb"|" + _STRING
_PUT = rb"q.|r.{4}"  # gives the item before it a number in the memo
_ITEMS: Final = re.compile(rb"(" + _ITEM + rb")(" + _PUT + rb")?", re.DOTALL)
_ITEMS_ALONE: Final = re.compile(_ITEM, re.DOTALL)
_BATCH: Final = re.compile(rb"(?:(?:" + _ITEM + rb")(?:" + _PUT + rb")?){%d,}+[eu]" % _FEWEST, re.DOTALL)
_BATCH_OF_NUMBERS: Final = re.compile(rb"(?:" + _NUMBER + rb"){%d,}+[eu]" % _FEWEST, re.DOTALL)
# The items of a dict from strings to numbers.
_NAMED_NUMBERS: Final = re.compile(rb"(" + _STRING + rb")(" + _PUT + rb"|)(" + _NUMBER + rb")", re.DOTALL)
_BATCH_OF_NAMED: Final = re.compile(
    rb"(?:" + _STRING + rb"(?:" + _PUT + rb")?(?:" + _NUMBER + rb")){%d,}+u" % (_FEWEST // 2), re.DOTALL
)
_NUMBERS: Final = {
    b"J": struct.Struct("<xi"),
    b"G": struct.Struct(">xd"),
    b"M": struct.Struct("<xH"),
    b"K": struct.Struct("<xB"),
}
_KIND: Final = operator.itemgetter(0)
_LONG_PUT: Final = 5  # bytes
_SMALL_INTEGERS: Final = (-5, 256)  # the first and the last that Python has once for all places
_CONSTANTS: Final = {b"N": None, b"\x88": True, b"\x89": False}


class Batch:
    """The items of one batch, each as its opcode, the PUTs behind them, and the opcode that takes them.

    ``puts`` has an entry for each item, or none at all where the batch has no PUT.
    """

    __slots__ = ("_pattern", "end", "items", "opcode", "puts")

    def __init__(self, data: bytes, start: int, end: int, pattern: re.Pattern[bytes]) -> None:
        """Take the range of a pickle from the first item to the opcode behind the last one, which ``pattern`` found."""
        self.end = end
        self.opcode = data[end - 1]
        self.puts: list[bytes] = []
        self._pattern = pattern
        if pattern is _BATCH_OF_NUMBERS:
            self.items = items_in(data, start, end - 1)
        elif pattern is _BATCH_OF_NAMED:
            self.items = list(chain.from_iterable(_NAMED_NUMBERS.findall(data, start, end - 1)))
            puts = self.items[1::3]
            del self.items[1::3]
            if any(puts):
                self.puts = [b""] * len(self.items)
                self.puts[::2] = puts
        else:
            found = _ITEMS.findall(data, start, end - 1)
            self.items = [item for item, _ in found]
            puts = [put for _, put in found]
            if any(puts):
                self.puts = puts

    @property
    def small(self) -> int:
        """Number of items that take at most 80 bytes of memory: numbers, and strings of up to 31 bytes."""
        if self._pattern is _BATCH_OF_NUMBERS or max(map(len, self.items)) <= _LONGEST_SMALL:
            return len(self.items)
        return sum(size <= _LONGEST_SMALL for size in map(len, self.items))

    @property
    def opcodes(self) -> int:
        """Number of opcodes: one for each item, and one for each PUT."""
        return len(self.items) + len(self.puts) - self.puts.count(b"")

    def values(self) -> list[object]:
        """Return the values of the items. Raises ``UnicodeDecodeError`` for bytes that are not text."""
        if self.opcode == APPENDS:
            return _values_of(self.items)
        values: list[object] = [None] * len(self.items)
        values[::2] = _values_of(self.items[::2])
        values[1::2] = _values_of(self.items[1::2])
        return values

    def has_counted_puts(self, first: int) -> bool:
        """Return whether exactly the strings have numbers in the memo, which count from ``first``."""
        if self._pattern is _BATCH_OF_NAMED:
            if not all(self.puts[::2]):
                return False
        elif list(map(bool, self.puts)) != list(map(_TEXT.__eq__, map(_KIND, self.items))):
            return False
        puts, count = b"".join(self.puts), len(self.puts) - self.puts.count(b"")
        if len(puts) == _LONG_PUT * count and puts[::_LONG_PUT] == b"r" * count:
            numbers = struct.unpack("<" + "xI" * count, puts)
        else:
            numbers = tuple(int.from_bytes(put[1:], "little") for put in self.puts if put)
        return numbers == tuple(range(first, first + count))


def find_batch(data: bytes, start: int) -> Batch | None:
    """Return the batch that begins at byte ``start``, or None for a short one and one with other items."""
    for pattern in (_BATCH_OF_NUMBERS, _BATCH_OF_NAMED, _BATCH):
        found = pattern.match(data, start, start + _WINDOW)
        if found is not None:
            return Batch(data, start, found.end(), pattern)
    return None


def items_in(opcodes: bytes, start: int = 0, end: int = sys.maxsize) -> list[bytes]:
    """Return the opcode of each item of opcodes without a PUT."""
    return _ITEMS_ALONE.findall(opcodes, start, end)


def is_text(item: bytes) -> bool:
    """Return whether an item is a string."""
    return item[0] == _TEXT


def are_new_numbers(values: Sequence[object]) -> bool:
    """Return whether each value is a float, or each an integer that takes memory of its own."""
    kinds = set(map(type, values))
    if kinds == {int}:
        integers = cast("Sequence[int]", values)
        return min(integers) > _SMALL_INTEGERS[1] or max(integers) < _SMALL_INTEGERS[0]
    return kinds == {float}


def _values_of(items: Sequence[bytes]) -> list[object]:
    kinds = set(map(_KIND, items))
    if kinds == {_TEXT}:
        return _texts_of([item[5:] for item in items])
    layout = _NUMBERS.get(items[0][:1]) if len(kinds) == 1 else None
    if layout is not None:
        return [value for (value,) in layout.iter_unpack(b"".join(items))]
    return [item[5:].decode("utf-8", "surrogatepass") if item[0] == _TEXT else _number(item) for item in items]


def _texts_of(raw: Sequence[bytes]) -> list[object]:
    """Return each string; all are decoded at once where no string has a line break and each is text."""
    try:
        texts: list[object] = [*b"\n".join(raw).decode("utf-8", "surrogatepass").split("\n")]
    except UnicodeDecodeError:
        texts = []
    return texts if len(texts) == len(raw) else [one.decode("utf-8", "surrogatepass") for one in raw]


def _number(item: bytes) -> object:
    kind = item[:1]
    layout = _NUMBERS.get(kind)
    if layout is not None:
        return layout.unpack(item)[0]
    return _CONSTANTS[kind] if kind in _CONSTANTS else int.from_bytes(item[2:], "little", signed=True)
