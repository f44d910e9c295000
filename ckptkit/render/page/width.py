"""Fit a page into the width of a terminal: sentences are wrapped, and long names are shortened in the middle."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest

from ckptkit.render.page import BESIDE_HEADER, Block, Line, Page, Table

__all__ = ["fitted"]

_GAP = 2  # spaces between two columns
_NARROWEST = 10  # a shorter cell says nothing
_CUT = "…"


def fitted(page: Page, width: int | None) -> Page:
    """Return the page with lines of at most ``width``, as far as the number of columns allows; None: unchanged."""
    return page if width is None else [fit for block in page for fit in _fit(block, width)]


def _fit(block: Block, width: int) -> Iterator[Block]:
    if isinstance(block, Table):
        yield _fit_table(block, width)
    elif isinstance(block, Line) and len("".join(block.parts)) + 2 * block.indented > width:
        for number, text in enumerate(
            textwrap.wrap("".join(block.parts), max(width - 2, _NARROWEST), break_on_hyphens=False)
        ):
            yield Line((text,), indented=block.indented or number > 0)
    else:
        yield block


def _fit_table(table: Table, width: int) -> Table:
    if not table.rows:
        return table
    headers = [len(header) + BESIDE_HEADER for header in table.headers]
    columns = zip(*table.rows, strict=True)
    widths = [max(header, *map(len, column)) for header, column in zip(headers, columns, strict=True)]
    least = [min(size, max(_NARROWEST, header)) for size, header in zip(widths, headers, strict=True)]
    left = sum(widths) + _GAP * (len(widths) - 1) - width
    while left > 0:
        widest = max(range(len(widths)), key=lambda at: widths[at] - least[at])
        if widths[widest] <= least[widest]:
            break
        widths[widest] -= 1
        left -= 1
    return replace(table, rows=tuple(line for row in table.rows for line in _row_lines(row, widths)))


def _row_lines(row: tuple[str, ...], widths: list[int]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of a row: sentences are wrapped at spaces, and words that are too long are shortened."""
    cells = [
        [cell]
        if len(cell) <= size
        else [
            _shortened(line, size) for line in textwrap.wrap(cell, size, break_long_words=False, break_on_hyphens=False)
        ]
        for cell, size in zip(row, widths, strict=True)
    ]
    yield from zip_longest(*cells, fillvalue="")


def _shortened(cell: str, size: int) -> str:
    if len(cell) <= size:
        return cell
    tail = (size - len(_CUT)) // 2
    return f"{cell[: size - len(_CUT) - tail]}{_CUT}{cell[len(cell) - tail :]}"
