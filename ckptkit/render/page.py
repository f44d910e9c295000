"""A report as a page: lines, tables and listings, set as text for a terminal or as Markdown for an issue.

In Markdown whatever may come from a file stands in a code span or a code block, where nothing is a link, a mention,
markup or HTML; only the words of ckptkit itself are prose.
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
    "Line",
    "Listing",
    "Page",
    "Row",
    "Table",
    "as_markdown",
    "as_text",
    "code",
    "collapse",
    "spelled",
]


_TICKS = re.compile(r"`+")
_NUMBER = re.compile(r"-?[0-9][0-9.,e+-]*( ?[%a-zA-Z]{1,2})?")
_MARKUP = re.compile(r"[\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w)|^[-+#=]")


class Code(str):
    """Printable text that is quoted from somewhere: a name, a path, a message about them."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence: words of our own as ``str``, everything else as ``Code``; ``under`` belongs to the line above it."""

    parts: tuple[str | Code, ...]
    under: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of printable cells below headers; the columns named in ``right`` are set flush right."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Listing:
    """Printable lines whose indentation counts."""

    lines: tuple[str, ...]


Block = Line | Table | Listing
Page = Sequence[Block]


def code(name: str) -> Code:
    """Return a name made printable and marked as quoted."""
    return Code(printable(name))


def as_text(page: Page) -> list[str]:
    """Return the lines of a page for a terminal: an empty one before and after each table and listing."""
    lines: list[str] = []
    for number, block in enumerate(page):
        if number and not (isinstance(block, Line) and isinstance(page[number - 1], Line)):
            lines.append("")
        if isinstance(block, Line):
            lines.append("  " * block.under + "".join(block.parts))
        elif isinstance(block, Listing):
            lines += block.lines
        else:
            lines += _aligned(block.rows, block, "plain")
    return lines


def as_markdown(page: Page) -> list[str]:
    """Return the lines of a page in GitHub's Markdown."""
    lines: list[str] = []
    for kind, blocks in groupby(page, type):
        for part in [list(blocks)] if kind is Line else [[block] for block in blocks]:
            lines += ["", *_markdown(part)] if lines else _markdown(part)
    return lines


def _markdown(blocks: Sequence[Block]) -> list[str]:
    first = blocks[0]
    if isinstance(first, Listing):
        fence = "`" * max(3, _longest_ticks(first.lines) + 1)
        return [fence, *first.lines, fence]
    if isinstance(first, Table):
        plain = [header in first.right for header in first.headers]
        rows = [[_cell(cell, number=number) for cell, number in zip(row, plain, strict=True)] for row in first.rows]
        return _aligned(rows, first, "pipe")
    lines = [block for block in blocks if isinstance(block, Line) and "".join(block.parts)]
    bullet = "- " if len(lines) > 1 else ""
    return ["  " * line.under + bullet + "".join(map(_span, line.parts)) for line in lines]


def _aligned(rows: Iterable[Sequence[str]], table: Table, form: str) -> list[str]:
    from tabulate import tabulate

    rows = list(rows)
    align = ["right" if header in table.right else "left" for header in table.headers] if rows else None
    text = tabulate(rows, table.headers, tablefmt=form, disable_numparse=True, colalign=align)
    return [line.rstrip() for line in text.split("\n")]


def _cell(cell: str, *, number: bool) -> str:
    # The table is cut into cells first, and takes the backslash away again: in a code span too.
    return cell if number and _NUMBER.fullmatch(cell) else _fenced(cell).replace("|", "\\|")


def _span(part: str | Code) -> str:
    return _fenced(part) if isinstance(part, Code) else _MARKUP.sub(r"\\\g<0>", part)


def _fenced(text: str) -> str:
    if not text:
        return ""
    ticks = "`" * (_longest_ticks([text]) + 1)
    # A space at each end is taken away again, so that text may begin and end with a backtick.
    pad = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _longest_ticks(lines: Iterable[str]) -> int:
    return max((len(run) for line in lines for run in _TICKS.findall(line)), default=0)


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
