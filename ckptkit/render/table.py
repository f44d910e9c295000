"""Rows of a table about keys, with names that stay exact; keys that differ in an index alone on one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from ckptkit.core.text import printable

__all__ = ["Row", "collapse", "spelled"]

# An index as torch writes it; "0012" and "1_000" are names.
_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")
_MOST_INDICES = 16  # no model nests deeper, and the work grows with their square
_LONGEST_KEY = 400  # longer ones are cut, and only as a whole
_LIKE_A_COUNT = re.compile(r" ×(?=[0-9,]+$)")  # what else only the count of joined keys looks like


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: a key, and what is said of it."""

    key: str
    cells: tuple[str, ...]


def spelled(rows: Iterable[Row], *, expand: bool) -> list[tuple[str, ...]]:
    """Return finished cells, one line a key, or with the keys joined that differ in indices alone."""
    return [(printable(row.key), *row.cells) for row in rows] if expand else collapse(rows)


def collapse(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return finished cells, with rows that say the same of keys that differ in indices alone joined into one.

    ``layers.{0..11}.attn.q.weight ×12`` stands for exactly the twelve keys it spells: holes are shown
    (``{0..3,7}``), and several indices are joined only where every combination is there.
    """
    groups: dict[tuple[_Shape, tuple[str, ...]], list[tuple[int, ...]]] = {}
    order: list[tuple[_Shape, tuple[str, ...]]] = []
    for row in rows:
        shape: _Shape = tuple(None if _INDEX.fullmatch(segment) else segment for segment in row.key.split("."))
        indices = tuple(int(segment) for segment in row.key.split(".") if _INDEX.fullmatch(segment))
        if len(indices) > _MOST_INDICES or len(row.key) > _LONGEST_KEY:
            shape, indices = (row.key,), ()
        if (shape, row.cells) not in groups:
            order.append((shape, row.cells))
        groups.setdefault((shape, row.cells), []).append(indices)
    return [(_spelled(shape, sets), *cells) for shape, cells in order for sets in _products(groups[shape, cells])]


_Shape = tuple[str | None, ...]  # the segments of a key, None where an index is
_Sets = tuple[tuple[int, ...], ...]


def _products(members: Iterable[tuple[int, ...]]) -> list[_Sets]:
    """Return products of index sets that together are exactly the members."""
    products: list[_Sets] = [tuple((index,) for index in member) for member in members]
    width = len(products[0])
    for place in reversed(range(width)):

        def rest(product: _Sets, place: int = place) -> _Sets:
            return (*product[:place], *product[place + 1 :])

        joined: list[_Sets] = []
        for _, same in groupby(sorted(products, key=rest), key=rest):
            group = list(same)
            union = tuple(sorted({index for product in group for index in product[place]}))
            joined.append((*group[0][:place], union, *group[0][place + 1 :]))
        products = joined
    return sorted(products)


def _spelled(shape: _Shape, sets: _Sets) -> str:
    count = math.prod(map(len, sets))
    rest = iter(sets)
    if count == 1:
        text = ".".join(str(next(rest)[0]) if segment is None else printable(segment) for segment in shape)
        return _LIKE_A_COUNT.sub(r" \\xd7", text)
    segments = (_ranges(next(rest)) if segment is None else _without_braces(segment) for segment in shape)
    return f"{'.'.join(segments)} ×{count}"


def _without_braces(segment: str) -> str:
    return printable(segment).replace("{", "\\x7b").replace("}", "\\x7d")


def _ranges(indices: tuple[int, ...]) -> str:
    if len(indices) == 1:
        return str(indices[0])
    parts = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(f"{values[0]}..{values[-1]}" if len(values) > 2 else ",".join(map(str, values)))
    return "{" + ",".join(parts) + "}"
