"""The header of a GGUF file: walked once, with every count and length measured against the file before it is believed.

Vocabularies of hundreds of thousands of strings stand in it, so what is not shown is stepped over and never built.
"""

from __future__ import annotations

import math
import struct
from typing import Final, NamedTuple

from ckptkit.core.checkpoint import Entry
from ckptkit.core.files import LocalFile
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError

__all__ = ["Cursor", "Metadata", "read_metadata"]

_WINDOW = 1 << 20
_LONGEST_NAME = 65_535
_LONGEST_SHOWN = 2000
_MOST_SHOWN = 16
_MOST_KEYS = 100_000
_MOST_ITEMS = 5_000_000  # strings and arrays inside arrays, which are stepped over one by one
_DEEPEST = 8
_SMALLEST_PAIR = 13  # an empty key, its type, and a value of one byte
_SCALARS: Final = {
    0: ("uint8", struct.Struct("<B")),
    1: ("int8", struct.Struct("<b")),
    2: ("uint16", struct.Struct("<H")),
    3: ("int16", struct.Struct("<h")),
    4: ("uint32", struct.Struct("<I")),
    5: ("int32", struct.Struct("<i")),
    6: ("float32", struct.Struct("<f")),
    7: ("bool", struct.Struct("<?")),
    10: ("uint64", struct.Struct("<Q")),
    11: ("int64", struct.Struct("<q")),
    12: ("float64", struct.Struct("<d")),
}
_STRING, _ARRAY = 8, 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Cursor:
    """A place in a file that only moves forward; reads through a window and raises ``FormatError`` at the end."""

    def __init__(self, file: LocalFile, start: int) -> None:
        """Begin at byte ``start``."""
        self._file = file
        self._base = start  # where the window begins in the file
        self._window = b""
        self._at = 0
        self.items_left = _MOST_ITEMS

    @property
    def position(self) -> int:
        """The byte that is read next."""
        return self._base + self._at

    @property
    def left(self) -> int:
        """Bytes from here to the end of the file."""
        return self._file.size - self.position

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if self._at + count > len(self._window):
            self._refill(count)
        data = self._window[self._at : self._at + count]
        self._at += count
        return data

    def skip(self, count: int) -> None:
        """Step over ``count`` bytes without reading them."""
        if count > self.left:
            raise _cut_off()
        self._at += count

    def skip_strings(self, count: int) -> None:
        """Step over ``count`` strings, each behind its length."""
        unpack = _U64.unpack_from
        while count:
            self._refill(8)
            window, at = self._window, self._at
            last = len(window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self._at = at
            if self.left < 0:
                raise _cut_off()

    def _refill(self, count: int) -> None:
        if count > self.left:
            raise _cut_off()
        if self._at + count > len(self._window):
            self._base, self._at = self.position, 0
            self._window = self._file.read(self._base, min(max(count, _WINDOW), self._file.size - self._base))

    def u32(self) -> int:
        """Return the next four bytes as an unsigned number."""
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """Return the next eight bytes as an unsigned number."""
        return int(_U64.unpack(self.take(8))[0])

    def name(self, what: str) -> str:
        """Return the next string, which is a name; ``what`` says of what."""
        size = self.u64()
        if size > min(_LONGEST_NAME, self.left):
            raise FormatError(f"{what} is said to have {size:,} bytes: damaged or truncated")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{what} is not UTF-8 at its byte {error.start}") from None


def _cut_off() -> FormatError:
    return FormatError("the header goes on behind the end of the file: truncated?", hint="download or copy it again")


class Metadata(NamedTuple):
    """The keys and values of a GGUF file, and the one that says how its tensors are aligned."""

    entries: list[Entry]
    alignment: int


def read_metadata(cursor: Cursor, count: int) -> Metadata:
    """Return the next ``count`` keys and values; long strings and arrays only as what they are.

    Raises ``FormatError`` where one reaches beyond the file, has an unknown type or comes twice.
    """
    if count > min(_MOST_KEYS, cursor.left // _SMALLEST_PAIR):
        raise FormatError(f"claims {plural(count, 'metadata key')}, more than it has room for")
    entries: dict[str, Entry] = {}
    alignment = 32
    for number in range(1, count + 1):
        key = cursor.name(f"the name of metadata key {number}")
        if key in entries:
            raise FormatError(f"two metadata keys are called {quoted(key)}")
        kind = cursor.u32()
        value = _value(cursor, kind, key)
        entries[key] = Entry(key, _kind_name(kind, key), value, outside=True)
        if key == "general.alignment":
            if kind != 4 or not isinstance(value, int) or value.bit_count() != 1:
                raise FormatError(f"{quoted(key)} is {value}, and no power of two")
            alignment = value
    return Metadata(list(entries.values()), alignment)


def _kind_name(kind: int, key: str) -> str:
    if kind in _SCALARS:
        return _SCALARS[kind][0]
    if kind not in (_STRING, _ARRAY):
        raise FormatError(f"metadata key {quoted(key)} has a value of the unknown type {kind}")
    return "string" if kind == _STRING else "array"


def _value(cursor: Cursor, kind: int, key: str) -> object:
    if kind == _STRING:
        return _string(cursor)
    if kind == _ARRAY:
        return _array(cursor, key)
    _kind_name(kind, key)
    layout = _SCALARS[kind][1]
    (value,) = layout.unpack(cursor.take(layout.size))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity


def _string(cursor: Cursor) -> str:
    size = cursor.u64()
    if size > _LONGEST_SHOWN:
        cursor.skip(size)
        return f"a string of {plural(size, 'byte')}"
    try:
        return cursor.take(size).decode("utf-8")
    except UnicodeDecodeError:
        return f"{plural(size, 'byte')} that are not UTF-8"


def _array(cursor: Cursor, key: str) -> object:
    kind, count = cursor.u32(), cursor.u64()
    name = _kind_name(kind, key)
    if count <= _MOST_SHOWN and kind != _ARRAY:
        return [_value(cursor, kind, key) for _ in range(count)]
    _skip_items(cursor, kind, count, key, 1)
    return f"array of {plural(count, name)}"


def _skip_items(cursor: Cursor, kind: int, count: int, key: str, depth: int) -> None:
    name = _kind_name(kind, key)
    if kind in _SCALARS:
        cursor.skip(count * _SCALARS[kind][1].size)
        return
    least = 8 if kind == _STRING else 12
    if count * least > cursor.left:
        raise FormatError(f"metadata key {quoted(key)} claims {plural(count, name)}, more than the file has room for")
    cursor.items_left -= count
    if cursor.items_left < 0:
        raise FormatError(f"its metadata holds more than {_MOST_ITEMS:,} strings in arrays")
    if kind == _STRING:
        cursor.skip_strings(count)
        return
    if depth == _DEEPEST:
        raise FormatError(f"metadata key {quoted(key)} is nested too deeply: more than {_DEEPEST} arrays")
    for _ in range(count):
        _skip_items(cursor, cursor.u32(), cursor.u64(), key, depth + 1)
