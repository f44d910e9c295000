"""Reports as pages: lines, tables and listings, formatted as text for a terminal or as Markdown for an issue.

In Markdown, every text that may come from a file is a code span or a code block. No such text can become a link, a
mention, markup or HTML.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, groupby, pairwise
from operator import itemgetter
from typing import Any, Final

from ckptkit.core.text import printable
from ckptkit.render.page.display import are_plain, display_width

__all__ = [
    "BESIDE_HEADER",
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
    "as_tsv",
    "join_rows",
    "name_beside",
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
    """Rows of printable cells below headers; the columns named in ``right`` are aligned to the right.

    ``gives_way`` names the columns that a narrow terminal leaves out first, the least important first. After them go
    the others from the right, and never the first that has a name. A page shows no table without rows, and none that
    is ``only_tsv``, which has for scripts what the lines of the page say to people.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    gives_way: tuple[str, ...] = ()
    only_tsv: bool = False

    @property
    def is_shown(self) -> bool:
        """Whether people see the table."""
        return bool(self.rows) and not self.only_tsv


@dataclass(frozen=True, slots=True)
class Listing:
    """Printable lines that keep their indentation."""

    lines: tuple[str, ...]


Block = Line | Table | Listing
Page = Sequence[Block]


def as_code(name: str) -> Code:
    """Return a name as printable ``Code``."""
    return Code(printable(name))


def as_text(page: Page) -> Iterator[str]:
    """Yield the lines of a page for a terminal, with an empty line before and after each table and listing."""
    page = _shown(page)
    for number, block in enumerate(page):
        if number and not (isinstance(block, Line) and isinstance(page[number - 1], Line)):
            yield ""
        if isinstance(block, Line):
            yield "  " * block.indented + "".join(block.parts)
        elif isinstance(block, Listing):
            yield from block.lines
        else:
            yield from _table_lines(block.rows, block)


def as_tsv(page: Page) -> Iterator[str]:
    """Yield the first table of a page as tab-separated values below headers, for readers of ``csv.excel_tab``.

    Printable cells have no tab and no line break. A cell with a quote is quoted. A page without a table has no lines.
    """
    import csv
    import io

    table = next((block for block in page if isinstance(block, Table)), None)
    if table is None:
        return
    line = io.StringIO()
    write = csv.writer(line, "excel-tab", lineterminator="").writerow
    for row in chain([table.headers], table.rows):
        write(map(str.strip, row))
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _shown(page: Page) -> list[Block]:
    return [block for block in page if not isinstance(block, Table) or block.is_shown]


def as_markdown(page: Page) -> Iterator[str]:
    """Yield the lines of a page in GitHub's Markdown."""
    is_first = True
    for kind, blocks in groupby(_shown(page), type):
        for part in [list(blocks)] if kind is Line else [[block] for block in blocks]:
            if not is_first:
                yield ""
            is_first = False
            yield from _markdown(part)


_BACKTICKS = re.compile(r"`+")
_NUMBER = re.compile(r"(?:< )?-?[0-9][0-9.,e+-]*( ?[%a-zA-Z]{1,2})?")
_MARKUP = re.compile(r"[\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w)|^[-+#=]")


def _markdown(blocks: Sequence[Block]) -> Iterable[str]:
    """Return the lines of Markdown of one table, one listing, or a run of lines."""
    first = blocks[0]
    if isinstance(first, Listing):
        fence = "`" * max(3, _longest_backticks(first.lines) + 1)
        return [fence, *first.lines, fence]
    if isinstance(first, Table):
        numeric = [header in first.right for header in first.headers]
        rows = [[_cell(cell, number=number) for cell, number in zip(row, numeric, strict=True)] for row in first.rows]
        return _table_lines(rows, first, github=True)
    lines = [block for block in blocks if isinstance(block, Line) and "".join(block.parts)]
    bullet = "- " if len(lines) > 1 else ""
    return ["  " * line.indented + bullet + "".join(map(_span, line.parts)) for line in lines]


BESIDE_HEADER: Final = 2  # as tabulate does, no column is narrower than its header and two spaces


def _table_lines(rows: Sequence[Sequence[str]], table: Table, *, github: bool = False) -> list[str]:
    """Return the lines of a table that has rows; one format string lays out all rows, which is fast."""
    columns = [*zip(*rows, strict=True)]
    lengths = [len if are_plain(column) else display_width for column in columns]
    widths = [
        max(display_width(header) + BESIDE_HEADER, *map(length, column))
        for header, length, column in zip(table.headers, lengths, columns, strict=True)
    ]
    sides = [">" if header in table.right else "<" for header in table.headers]
    before, between, after, below_headers = _github_frame(widths, sides) if github else ("", "  ", "", [])
    sized = before + between.join(f"{{:{side}{size}}}" for side, size in zip(sides, widths, strict=True)) + after

    def laid_out(row: Sequence[str]) -> str:
        gaps = (" " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True))
        cells = (gap + cell if side == ">" else cell + gap for cell, gap, side in zip(row, gaps, sides, strict=True))
        return f"{before}{between.join(cells)}{after}".rstrip()

    top = [laid_out(table.headers), *below_headers]
    if display_width in lengths:
        return [*top, *(sized.format(*row).rstrip() if "".join(row).isascii() else laid_out(row) for row in rows)]
    layout = sized.format
    return [*top, *[layout(*row).rstrip() for row in rows]]


def _github_frame(widths: Sequence[int], sides: Sequence[str]) -> tuple[str, str, str, list[str]]:
    """Return what tabulate puts before, between and after the cells of a table for GitHub, and below the headers.

    It lays out one row as wide as the widest cells. Text has no frame, so the start of a command need not import it.
    """
    from tabulate import tabulate

    marks = ["x" * width for width in widths]
    align = ["right" if side == ">" else "left" for side in sides]
    names = [mark[BESIDE_HEADER:] for mark in marks]
    text = tabulate([marks], names, tablefmt="pipe", disable_numparse=True, colalign=align)
    *above, row = text.split("\n")
    before, *between, after = re.split("x+", row)
    return before, between[0] if between else "", after, above[1:]


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


Row = tuple[str, tuple[str, ...]]  # a row of a table: a key, and the other cells


def table_rows(rows: Iterable[Row], *, expand: bool) -> list[tuple[str, ...]]:
    """Return printable cells: one row per key if ``expand``, else with similar keys joined as by ``join_rows``."""
    if not expand:
        return join_rows(rows)
    return [
        (printable(key), *(_with_indices(cells, _INDEX.findall(key)) if _MARK in "".join(cells) else cells))
        for key, cells in rows
    ]


def name_beside(key: str, name: str) -> str:
    """Return another name for a cell of the row of ``key``, in printable form.

    Where it has the same indices as the key, its rows are joined as the keys are: ``h.{0..11}.w`` beside
    ``layers.{0..11}.w ×12``. The cell is for ``table_rows`` or ``join_rows`` only.
    """
    indices = _INDEX.findall(name)
    is_short = max(len(key), len(name)) <= _LONGEST_KEY and len(indices) <= _MOST_INDICES and "{" not in name
    if not indices or not is_short or indices != _INDEX.findall(key):
        return printable(name)
    return _INDEX.sub(_MARK, printable(name))


def _with_indices(cells: tuple[str, ...], indices: Sequence[str]) -> tuple[str, ...]:
    """Return the cells with the indices of the key in place of the marks of ``name_beside``."""
    if _MARK not in "".join(cells):
        return cells
    filled = []
    for cell in cells:
        first, *texts = cell.split(_MARK)
        filled.append(first + "".join(f"{index}{text}" for index, text in zip(cycle(indices), texts, strict=False)))
    return tuple(filled)


# An index as torch writes it, as a whole segment of a key; "0012" and "1_000" are names.
_INDEX = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,17})(?![^.])")
# The outline of a key has one sign for all letters, and one for all digits but 0. Keys with the same outline have their
# indices at the same places.
_OUTLINE = bytes(char if char in b".0" else ord("1") if char in b"123456789" else ord("a") for char in range(256))
_MARK = "\0"  # of an index; printable text has none
_MOST_INDICES = 16  # no model nests deeper, and the work grows with the square of the number
_LONGEST_KEY = 400  # longer keys are not joined; they are shortened when printed
_LIKE_A_COUNT = re.compile(r" ×(?=[0-9,]+$)")  # the end of a key that looks like the count of joined keys

_FEW_GROUPS = 4
_KeyShape = tuple[str, ...]  # the texts of a key before, between and behind its indices
_Group = tuple[_KeyShape, tuple[str, ...], list[tuple[str, ...]]]  # texts, cells, and the indices of each key
_IndexSets = tuple[tuple[int, ...], ...]  # for each index of a key, the numbers that it takes


def join_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return printable cells, with rows joined that have equal cells and keys that differ in indices only.

    ``layers.{0..11}.attn.q.weight ×12`` stands for exactly the twelve keys that it spells. Missing indices are shown
    (``{0..3,7}``). Several indices are joined only if every combination exists.
    """
    groups: dict[tuple[_KeyShape, tuple[str, ...]], list[tuple[str, ...]]] = defaultdict(list)
    first_keys: list[str] = []
    cutters: dict[bytes, tuple[Callable[[str], tuple[str, ...]], list[_Group]]] = {}
    for key, cells in rows:
        if key.isascii():
            outline = key.encode().translate(_OUTLINE)
            cutter = cutters.get(outline)
            if cutter is None:
                cutter = cutters[outline] = _cutter(key), []
        else:
            cutter = _cutter(key), []
        cut, known = cutter
        parts = cut(key)
        shape = parts[::2]
        for group in known:  # to compare a few texts takes less time than to hash them
            if group[0] == shape and group[1] == cells:
                group[2].append(parts[1::2])
                break
        else:
            found = groups[shape, cells]
            if not found:
                first_keys.append(key)
            found.append(parts[1::2])
            if len(known) < _FEW_GROUPS:
                known.append((shape, cells, found))
    joined: list[tuple[str, ...]] = []
    for key, ((shape, cells), found) in zip(first_keys, groups.items(), strict=True):
        if len(found) == 1 and " " not in key:  # as below, in a tenth of the time
            joined.append((printable(key), *_with_indices(cells, found[0])))
        else:
            for sets in _products(found):
                ranges = [*map(_ranges, sets)]
                joined.append((_joined_key(shape, sets, ranges), *_with_indices(cells, ranges)))
    return joined


def _cutter(key: str) -> Callable[[str], tuple[str, ...]]:
    """Return a function that divides a key into texts and indices, in turn; all keys with the same outline share it.

    The search for indices takes most of the time of a large table, and the keys of a model have few outlines.
    """
    spans = [match.span() for match in _INDEX.finditer(key)]
    if not spans or len(spans) > _MOST_INDICES or len(key) > _LONGEST_KEY:
        return _undivided
    ends = [0, *chain.from_iterable(spans), len(key)]
    return itemgetter(*(slice(*ends) for ends in pairwise(ends)))


def _undivided(key: str) -> tuple[str, ...]:
    return (key,)


def _products(members: Sequence[tuple[str, ...]]) -> list[_IndexSets]:
    """Return products of index sets that together are exactly the members."""
    if len(members) == 1:
        return [tuple((int(index),) for index in members[0])]
    columns = [set(column) for column in zip(*members, strict=True)]
    if math.prod(map(len, columns)) == len(members) == len(set(members)):  # every combination exists
        return [tuple(tuple(sorted(map(int, column))) for column in columns)]
    # The sets of the places that are done stand in the same tuples as the indices of the other places.
    products: Iterable[tuple[Any, ...]] = members
    for place in reversed(range(len(members[0]))):
        joined: dict[tuple[Any, ...], set[str]] = {}
        for product in products:
            joined.setdefault(product[:place] + product[place + 1 :], set()).add(product[place])
        products = [
            (*others[:place], tuple(sorted(map(int, union))), *others[place:]) for others, union in joined.items()
        ]
    return sorted(products)


def _joined_key(shape: _KeyShape, sets: _IndexSets, ranges: Sequence[str]) -> str:
    count = math.prod(map(len, sets))
    first, *texts = map(_printable_text, shape)
    if count == 1:
        key = first + "".join(f"{index}{text}" for (index,), text in zip(sets, texts, strict=True))
        return _LIKE_A_COUNT.sub(r" \\xd7", key) if " ×" in key else key
    first, *texts = (text.replace("{", "\\x7b").replace("}", "\\x7d") for text in (first, *texts))
    key = first + "".join(f"{indices}{text}" for indices, text in zip(ranges, texts, strict=True))
    return f"{key} ×{count}"


def _printable_text(text: str) -> str:
    """Return a text between two indices in printable form; spaces at the ends of its segments are hidden ones."""
    is_whole = " " not in text or len(text) > _LONGEST_KEY
    return printable(text) if is_whole else ".".join(map(printable, text.split(".")))


def _ranges(indices: tuple[int, ...]) -> str:
    if len(indices) == 1:
        return str(indices[0])
    parts = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(f"{values[0]}..{values[-1]}" if len(values) > 2 else ",".join(map(str, values)))
    return "{" + ",".join(parts) + "}"
