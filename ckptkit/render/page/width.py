"""Fit a page into the width of a terminal: sentences and names are wrapped, and a table that is too wide is listed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise, zip_longest

from ckptkit.errors import COMMAND, OPTION
from ckptkit.render.page import BESIDE_HEADER, Block, Hint, Line, Listing, Page, Table

__all__ = ["fitted"]

_GAP = 2  # spaces between two columns
_NARROWEST = 16  # names and sentences in a narrower column are hard to read
_MOST_LINES = 4  # of one row: names that are broken more often are hard to read
_INDENT = 2
_BREAKS = ("./", "_-=,")  # a name is broken after one of these, the first kind if possible


def _unnamed(pattern: re.Pattern[str]) -> str:
    return re.sub(r"\(\?P<\w+>", "(?:", pattern.pattern)


_OPTIONS = f"(?:{_unnamed(OPTION)})(?: (?:{_unnamed(OPTION)}))*"
_COMMAND = re.compile(f"(?:{_unnamed(COMMAND)}|{_OPTIONS})[,;]?")


def fitted(page: Page, width: int | None) -> Page:
    """Return the page with lines of at most ``width`` characters, without leaving out any text; None: unchanged."""
    return page if width is None else [fit for block in page for fit in _fit(block, width)]


def _fit(block: Block, width: int) -> Iterator[Block]:
    if isinstance(block, Table):
        yield _fit_table(block, width)
    elif isinstance(block, Line) and any(isinstance(part, Hint) for part in block.parts):
        yield from _fit_hint(block, width)
    elif isinstance(block, Line) and len("".join(block.parts)) + _INDENT * block.indented > width:
        for number, text in enumerate(_wrapped("".join(block.parts), width - _INDENT)):
            yield Line((text,), indented=block.indented or number > 0)
    else:
        yield block


def _fit_hint(line: Line, width: int) -> Iterator[Line]:
    """Yield a hint with each command on an unbroken line of its own, which can be copied; also options with a value.

    Only the words between them are wrapped.
    """
    text = "".join(line.parts)
    if len(text) + _INDENT * line.indented <= width:
        yield line
        return
    commands = [match.span() for match in _COMMAND.finditer(text) if " " in match[0]]
    ends = [0, *chain.from_iterable(commands), len(text)]
    number = 0
    for at, (start, end) in enumerate(pairwise(ends)):
        piece = text[start:end].strip()
        for part in [piece] if at % 2 else _wrapped(piece, width - _INDENT) if piece else []:
            yield Line((part,), indented=line.indented or number > 0)
            number += 1


def _fit_table(table: Table, width: int) -> Table | Listing:
    if not table.rows:
        return table
    headers = [len(header) + BESIDE_HEADER for header in table.headers]
    columns = zip(*table.rows, strict=True)
    widths = [max(header, *map(len, column)) for header, column in zip(headers, columns, strict=True)]
    least = [min(size, max(_NARROWEST, header)) for size, header in zip(widths, headers, strict=True)]
    gaps = _GAP * (len(widths) - 1)
    if sum(least) + gaps > width:
        return Listing(tuple(_listed(table, width)))
    for _ in range(sum(widths) + gaps - width):
        widest = max(range(len(widths)), key=lambda at: widths[at] - least[at])
        widths[widest] -= 1
    rows = [list(_row_lines(row, widths)) for row in table.rows]
    if max(map(len, rows)) > _MOST_LINES:
        return Listing(tuple(_listed(table, width)))
    return replace(table, rows=tuple(chain.from_iterable(rows)))


def _row_lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    cells = (_wrapped(cell, size) if len(cell) > size else [cell] for cell, size in zip(row, widths, strict=True))
    yield from zip_longest(*cells, fillvalue="")


def _listed(table: Table, width: int) -> Iterator[str]:
    """Yield the rows one below the other: the name, with the mark before it, and each other cell with its header."""
    named = next((at for at, header in enumerate(table.headers) if header), 0)
    yield table.headers[named]
    for row in table.rows:
        yield from _indented(" ".join(filter(None, row[: named + 1])), 1, width)
        for header, cell in zip(table.headers[named + 1 :], row[named + 1 :], strict=True):
            if cell:
                yield from _indented(f"{header}: {cell}", 2, width)


def _indented(text: str, level: int, width: int) -> Iterator[str]:
    """Yield the lines of a text at a level; the lines after the first are one level deeper."""
    for number, line in enumerate(_wrapped(text, width - _INDENT * (level + 1))):
        yield f"{' ' * _INDENT * (level + (number > 0))}{line}"


def _wrapped(text: str, size: int) -> list[str]:
    """Return lines of at most ``size`` characters: broken at spaces, and a long name after a dot or another sign."""
    size = max(size, 1)
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}" if lines[-1] else word
        if len(line) > size and lines[-1]:
            lines.append("")
            line = word
        while len(line) > size:
            places = (max(line.rfind(sign, 0, size) for sign in signs) + 1 for signs in _BREAKS)
            cut = next(filter(None, places), size)
            lines[-1:] = [line[:cut], ""]
            line = line[cut:]
        lines[-1] = line
    return lines
