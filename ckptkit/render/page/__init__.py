"""Reports as pages: lines, tables and listings, formatted as text for a terminal or as Markdown for an issue.

In Markdown, every text that may come from a file is a code span or a code block. No such text can become a link, a
mention, markup or HTML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ckptkit.core.text import printable

__all__ = [
    "Block",
    "Code",
    "Hint",
    "Line",
    "Listing",
    "Message",
    "Page",
    "Row",
    "Table",
    "as_code",
    "as_markdown",
    "as_text",
    "join_rows",
    "table_rows",
]


class Code(str):
    """Printable text that ckptkit did not write: a name, a path, or a message that quotes them."""

    __slots__ = ()


class Hint(Code):
    """What to do about a finding, with the commands and options of ``ckpt``."""

    __slots__ = ()


class Message(Code):
    """What ckptkit says about a result, with the options of ``ckpt`` and quoted names."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence: words of ckptkit are ``str``, the rest is ``Code``. An ``indented`` line explains the line above."""

    parts: tuple[str | Code, ...]
    indented: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of printable cells below headers; the columns named in ``right`` are aligned to the right."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Listing:
    """Printable lines that keep their indentation."""

    lines: tuple[str, ...]


Block = Line | Table | Listing
Page = Sequence[Block]


def as_code(name: str) -> Code:
    """Return a name as printable ``Code``."""
    return Code(printable(name))


def as_text(page: Page) -> list[str]:
    """Return the lines of a page for a terminal, with an empty line before and after each table and listing."""
    lines: list[str] = []
    for number, block in enumerate(page):
        if number and not (isinstance(block, Line) and isinstance(page[number - 1], Line)):
            lines.append("")
        if isinstance(block, Line):
            lines.append("  " * block.indented + "".join(block.parts))
        elif isinstance(block, Listing):
            lines += block.lines
        else:
            lines += _table_lines(block.rows, block, "plain")
    return lines


def as_markdown(page: Page) -> list[str]:
    """Return the lines of a page in GitHub's Markdown."""
    lines: list[str] = []
    for kind, blocks in groupby(page, type):
        for part in [list(blocks)] if kind is Line else [[block] for block in blocks]:
            lines += ["", *_markdown(part)] if lines else _markdown(part)
    return lines


_BACKTICKS = re.compile(r"`+")
_NUMBER = re.compile(r"(?:< )?-?[0-9][0-9.,e+-]*( ?[%a-zA-Z]{1,2})?")
_MARKUP = re.compile(r"[\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w)|^[-+#=]")


def _markdown(blocks: Sequence[Block]) -> list[str]:
    """Return the Markdown of one table, one listing, or a run of lines."""
    first = blocks[0]
    if isinstance(first, Listing):
        fence = "`" * max(3, _longest_backticks(first.lines) + 1)
        return [fence, *first.lines, fence]
    if isinstance(first, Table):
        numeric = [header in first.right for header in first.headers]
        rows = [[_cell(cell, number=number) for cell, number in zip(row, numeric, strict=True)] for row in first.rows]
        return _table_lines(rows, first, "pipe")
    lines = [block for block in blocks if isinstance(block, Line) and "".join(block.parts)]
    bullet = "- " if len(lines) > 1 else ""
    return ["  " * line.indented + bullet + "".join(map(_span, line.parts)) for line in lines]


def _table_lines(rows: Iterable[Sequence[str]], table: Table, style: str) -> list[str]:
    from tabulate import tabulate

    rows = list(rows)
    align = ["right" if header in table.right else "left" for header in table.headers] if rows else None
    text = tabulate(rows, table.headers, tablefmt=style, disable_numparse=True, colalign=align)
    return [line.rstrip() for line in text.split("\n")]


def _cell(cell: str, *, number: bool) -> str:
    # GitHub splits a table into cells before it reads code spans, so a pipe needs a backslash in a code span too.
    return cell if number and _NUMBER.fullmatch(cell) else _code_span(cell).replace("|", "\\|")


def _span(part: str | Code) -> str:
    return _code_span(part) if isinstance(part, Code) else _MARKUP.sub(r"\\\g<0>", part)


def _code_span(text: str) -> str:
    if not text:
        return ""
    ticks = "`" * (_longest_backticks([text]) + 1)
    # Markdown removes one space at each end of a code span, so that its text may begin and end with a backtick.
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _longest_backticks(lines: Iterable[str]) -> int:
    return max((len(run) for line in lines for run in _BACKTICKS.findall(line)), default=0)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: a key, and the other cells."""

    key: str
    cells: tuple[str, ...]


def table_rows(rows: Iterable[Row], *, expand: bool) -> list[tuple[str, ...]]:
    """Return printable cells: one row per key if ``expand``, else with similar keys joined as by ``join_rows``."""
    return [(printable(row.key), *row.cells) for row in rows] if expand else join_rows(rows)


_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")  # an index as torch writes it; "0012" and "1_000" are names
_MOST_INDICES = 16  # no model nests deeper, and the work grows with the square of the number
_LONGEST_KEY = 400  # longer keys are not joined; they are shortened when printed
_LIKE_A_COUNT = re.compile(r" ×(?=[0-9,]+$)")  # the end of a key that looks like the count of joined keys

_KeyShape = tuple[str | None, ...]  # the segments of a key, with None for each index
_IndexSets = tuple[tuple[int, ...], ...]  # for each index of a key, the numbers that it takes


def join_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return printable cells, with rows joined that have equal cells and keys that differ in indices only.

    ``layers.{0..11}.attn.q.weight ×12`` stands for exactly the twelve keys that it spells. Missing indices are shown
    (``{0..3,7}``). Several indices are joined only if every combination exists.
    """
    groups: dict[tuple[_KeyShape, tuple[str, ...]], list[tuple[int, ...]]] = {}
    for row in rows:
        segments = row.key.split(".")
        shape: _KeyShape = tuple(None if _INDEX.fullmatch(segment) else segment for segment in segments)
        indices = tuple(int(segment) for segment in segments if _INDEX.fullmatch(segment))
        if len(indices) > _MOST_INDICES or len(row.key) > _LONGEST_KEY:
            shape, indices = (row.key,), ()
        groups.setdefault((shape, row.cells), []).append(indices)
    return [(_joined_key(shape, sets), *cells) for (shape, cells), found in groups.items() for sets in _products(found)]


def _products(members: Iterable[tuple[int, ...]]) -> list[_IndexSets]:
    """Return products of index sets that together are exactly the members."""
    products: list[_IndexSets] = [tuple((index,) for index in member) for member in members]
    width = len(products[0])
    for place in reversed(range(width)):

        def others(product: _IndexSets, place: int = place) -> _IndexSets:
            return (*product[:place], *product[place + 1 :])

        joined: list[_IndexSets] = []
        for _, equal in groupby(sorted(products, key=others), key=others):
            group = list(equal)
            union = tuple(sorted({index for product in group for index in product[place]}))
            joined.append((*group[0][:place], union, *group[0][place + 1 :]))
        products = joined
    return sorted(products)


def _joined_key(shape: _KeyShape, sets: _IndexSets) -> str:
    count = math.prod(map(len, sets))
    remaining = iter(sets)
    if count == 1:
        text = ".".join(str(next(remaining)[0]) if segment is None else printable(segment) for segment in shape)
        return _LIKE_A_COUNT.sub(r" \\xd7", text)
    segments = (_ranges(next(remaining)) if segment is None else _without_braces(segment) for segment in shape)
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
