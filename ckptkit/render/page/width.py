"""Fit a page into the width of a terminal: no row of a table takes two lines.

A narrow terminal gets fewer columns of a table, and names without their middle. Sentences are wrapped at spaces, and no
word of them is broken, so that paths, names and commands can be copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise

from ckptkit.core.text import plural
from ckptkit.errors import COMMAND, OPTION
from ckptkit.render.page import BESIDE_HEADER, Block, Hint, Line, Page, Table
from ckptkit.render.page.display import are_plain, display_width, start_of
from ckptkit.render.page.shortening import shortened

__all__ = ["fitted"]

_GAP = 2  # spaces between two columns
_INDENT = 2
_COMFORTABLE = 24  # columns that give way are left out before cells other than names become shorter
_LEAST = (16, 8)  # columns that do not give way are left out before they become shorter
# A name or a sentence. A number, a dtype with a shape, a bar or a digest is never cut.
_CUTTABLE = re.compile(r"[a-z].*[ ._/]|[ ._/].*[a-z]")


def _unnamed(pattern: re.Pattern[str]) -> str:
    return re.sub(r"\(\?P<\w+>", "(?:", pattern.pattern)


_OPTIONS = f"(?:{_unnamed(OPTION)})(?: (?:{_unnamed(OPTION)}))*"
_COMMAND = re.compile(f"(?:{_unnamed(COMMAND)}|{_OPTIONS})[,;]?")


def fitted(page: Page, width: int | None) -> Page:
    """Return the page for a terminal with ``width`` columns; None: unchanged.

    A line below the last table that does not show everything says so.
    """
    if width is None:
        return page
    blocks: list[Block] = []
    hidden, cut, last = 0, False, 0
    gone: set[str] = set()  # columns of the last table; a line that explains one of them is left out too
    for block in page:
        if isinstance(block, Table) and block.is_shown:
            table = _fit_table(block, width)
            blocks.append(table)
            gone = set(block.headers) - set(table.headers) - {""} if len(table.headers) < len(block.headers) else set()
            if table is not block:
                hidden += len(block.headers) - len(table.headers)
                cut = cut or not _has_whole_cells(table, block)
                last = len(blocks)
        elif not (isinstance(block, Line) and block.parts and block.parts[0].partition(":")[0] in gone):
            blocks += _fit(block, width)
    if last:
        what = [f"{plural(hidden, 'column')} hidden"] * bool(hidden) + ["cells shortened"] * cut
        blocks[last:last] = _fit(Line((f"{', '.join(what)}; --wide shows all",)), width)
    return blocks


def _fit(block: Block, width: int) -> Iterator[Block]:
    if not isinstance(block, Line) or display_width("".join(block.parts)) + _INDENT * block.indented <= width:
        yield block
    elif any(isinstance(part, Hint) for part in block.parts):
        yield from _fit_hint(block, width)
    else:
        for number, text in enumerate(_wrapped("".join(block.parts), width - _INDENT)):
            yield Line((text,), indented=block.indented or number > 0)


def _fit_hint(line: Line, width: int) -> Iterator[Line]:
    """Yield a hint with each command on an unbroken line of its own, which can be copied; also options with a value.

    Only the words between them are wrapped.
    """
    text = "".join(line.parts)
    commands = [match.span() for match in _COMMAND.finditer(text) if " " in match[0]]
    ends = [0, *chain.from_iterable(commands), len(text)]
    number = 0
    for at, (start, end) in enumerate(pairwise(ends)):
        piece = text[start:end].strip()
        for part in [piece] if at % 2 else _wrapped(piece, width - _INDENT) if piece else []:
            yield Line((part,), indented=line.indented or number > 0)
            number += 1


def _wrapped(text: str, size: int) -> list[str]:
    """Return lines of at most ``size`` columns, broken at single spaces; a longer word has a line of its own."""
    lines: list[str] = []
    for word in re.split(r"(?<! ) (?! )", text):
        if lines and display_width(lines[-1]) + 1 + display_width(word) <= size:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _fit_table(table: Table, width: int) -> Table:
    """Return the table itself if it fits, else one with the widest columns that fit."""
    last = (table.headers[-1], *(row[-1] for row in table.rows))
    natural = [
        max(display_width(header) + BESIDE_HEADER, *map(len if are_plain(column) else display_width, column))
        for header, column in zip(table.headers, zip(*table.rows, strict=True), strict=True)
    ]
    # A header at the end of a line has no spaces behind it.
    spaces = 0 if table.headers[-1] in table.right else natural[-1] - max(map(display_width, last))
    if sum(natural) - spaces + _GAP * (len(natural) - 1) <= width:
        return table
    named = next((at for at, header in enumerate(table.headers) if header), 0)
    first = dict.fromkeys(table.headers.index(header) for header in table.gives_way if header in table.headers)
    others = [at for at in reversed(range(named + 1, len(natural))) if at not in first]
    steps = [(at, (table.name_width, _COMFORTABLE)) for at in first] + [(at, _LEAST) for at in others]
    shown = list(range(len(natural)))
    for leaving, sizes in [*((at, sizes) for at, sizes in steps if at != named), (None, _LEAST)]:
        least = [_least(table, at, natural[at], sizes[at != named]) for at in shown]
        room = width - _GAP * (len(shown) - 1)
        if sum(least) <= room:
            fit = _narrowed(table, shown, _sizes([natural[at] for at in shown], least, room))
            if leaving is None or len(set(fit.rows)) == len({tuple(row[at] for at in shown) for row in table.rows}):
                return fit
        if leaving is not None:
            shown.remove(leaving)
    return _narrowed(table, shown, _sizes([natural[at] for at in shown], [0] * len(shown), room))


def _least(table: Table, at: int, natural: int, size: int) -> int:
    """Return the width below which a column is not narrowed."""
    if table.headers[at] in table.right or not any(_CUTTABLE.search(row[at]) for row in table.rows):
        return natural
    return min(natural, max(display_width(table.headers[at]) + BESIDE_HEADER, size))


def _sizes(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Return the widths of columns that together take ``room``: the widest ones are narrowed first."""
    sizes = list(natural)
    for _ in range(sum(sizes) - room):
        able = [at for at in range(len(sizes)) if sizes[at] > least[at]] or range(len(sizes))
        sizes[max(able, key=sizes.__getitem__)] -= 1
    return sizes


def _narrowed(table: Table, shown: Sequence[int], sizes: Sequence[int]) -> Table:
    columns = list(zip(*table.rows, strict=True))
    cells = [shortened(columns[at], size) for at, size in zip(shown, sizes, strict=True)]
    headers = [start_of(table.headers[at], max(size - BESIDE_HEADER, 0)) for at, size in zip(shown, sizes, strict=True)]
    right = frozenset(header for header, at in zip(headers, shown, strict=True) if table.headers[at] in table.right)
    return replace(table, headers=tuple(headers), rows=tuple(zip(*cells, strict=True)), right=right)


def _has_whole_cells(fit: Table, table: Table) -> bool:
    columns = dict(zip(table.headers, zip(*table.rows, strict=True), strict=True))
    return all(
        columns.get(header) == cells for header, cells in zip(fit.headers, zip(*fit.rows, strict=True), strict=True)
    )
