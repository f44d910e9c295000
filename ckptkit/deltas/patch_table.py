"""A table of the JSON in a patch, each value of which is checked before it is used."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptkit.core.checkpoint import MOST_TENSORS
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import quoted
from ckptkit.digests.hashing import HEX_DIGITS
from ckptkit.errors import FormatError

__all__ = ["Look", "Table"]

Look = tuple[str, tuple[int, ...]]  # a dtype and a shape
_MOST_DIMENSIONS: Final = 1024
_DIGITS: Final = HEX_DIGITS["sha256"]
_LARGEST_SIZE: Final = 2**63  # torch uses signed 64-bit sizes


@dataclass(frozen=True, slots=True)
class Table:
    """A table, and what errors call it. Every method raises ``FormatError`` for a value of another kind."""

    values: Mapping[str, Any]
    where: str

    def part(self, name: str) -> Table:
        """Return a table in this table."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name)
        return Table(value, self.where)

    def text(self, name: str) -> str:
        """Return a text."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.wrong(name)
        return value

    def texts(self, name: str) -> list[str]:
        """Return a list of different texts."""
        values = self._list(name)
        if not all(isinstance(value, str) for value in values) or len(set(values)) != len(values):
            raise self.wrong(name)
        return values

    def texts_by_name(self, name: str) -> dict[str, str]:
        """Return a table of texts."""
        value = self.values.get(name)
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise self.wrong(name)
        return value

    def number(self, name: str, end: int) -> int:
        """Return an integer from 0 to ``end``, exclusive."""
        return self._numbers(name, [self.values.get(name)], end)[0]

    def numbers(self, name: str, end: int) -> list[int]:
        """Return a list of integers from 0 to ``end``, exclusive."""
        return self._numbers(name, self._list(name), end)

    def numbers_by_name(self, name: str) -> dict[str, int]:
        """Return a table of integers from 0."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name)
        self._numbers(name, list(value.values()), _LARGEST_SIZE)
        return value

    def groups(self, name: str, end: int) -> list[list[int]]:
        """Return lists of integers from 0 to ``end``, exclusive; no integer is in two of them, or twice in one."""
        groups = [self._numbers(name, group, end) for group in self._list(name)]
        every = [number for group in groups for number in group]
        if len(set(every)) != len(every):
            raise self.wrong(name)
        return groups

    def moves(self, name: str, end: int, base_end: int) -> list[tuple[int, int]]:
        """Return pairs of a number below ``end`` and one below ``base_end``."""
        pairs = []
        for pair in self._list(name):
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.wrong(name)
            pairs.append((self._numbers(name, pair[:1], end)[0], self._numbers(name, pair[1:], base_end)[0]))
        return pairs

    def keys(self, name: str, base: Sequence[str]) -> list[str]:
        """Return different keys: texts, or numbers of keys of the base; null means all of these."""
        if self.values.get(name, "") is None:
            return list(base)
        keys = []
        for value in self._list(name):
            if isinstance(value, str):
                keys.append(value)
            else:
                keys.append(base[self._numbers(name, [value], len(base))[0]])
        if len(set(keys)) != len(keys):
            raise self.wrong(name)
        return keys

    def digests(self, name: str, count: int) -> list[str]:
        """Return ``count`` digests, which one text has in base 64."""
        try:
            digits = base64.b64decode(self.text(name), validate=True).hex()
        except (binascii.Error, ValueError):
            raise self.wrong(name) from None
        if len(digits) != count * _DIGITS:
            raise self.wrong(name)
        return [digits[at : at + _DIGITS] for at in range(0, len(digits), _DIGITS)]

    def looks(self, name: str) -> list[Look]:
        """Return dtypes and shapes, which tensors can have."""
        looks = []
        for value in self._list(name):
            if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
                raise self.wrong(name)
            code, shape = value[0], tuple(self._numbers(name, value[1], _LARGEST_SIZE))
            if code not in DTYPES or len(shape) > _MOST_DIMENSIONS:
                raise self.wrong(name)
            if math.prod(size or 1 for size in shape) * DTYPES[code].bits >= 8 * _LARGEST_SIZE:
                raise self.wrong(name)
            looks.append((code, shape))
        return looks

    def wrong(self, name: str) -> FormatError:
        """Return the error for a value that is missing, or of another kind."""
        return FormatError(f"{self.where} has no valid {quoted(name)}")

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) > MOST_TENSORS:
            raise self.wrong(name)
        return value

    def _numbers(self, name: str, values: object, end: int) -> list[int]:
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < end for value in values):
            raise self.wrong(name)
        return values
