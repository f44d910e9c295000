"""Reports as pages: lines, tables and listings, formatted as text for a terminal or as Markdown for an issue.

In Markdown, every text that may come from a file is a code span or a code block. No such text can become a link, a
mention, markup or HTML.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, groupby
from typing import Any, Final, Literal, TypeAlias

from ckptkit.core.text import printable
from ckptkit.lazy_patterns import lazy_pattern
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
    "Tone",
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


Tone: TypeAlias = Literal["", "good", "note", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Line:
    """A sentence: words of ckptkit are ``str``, the rest is ``Code``. An ``indented`` line explains the line above.

    Its ``tone`` says what it means to the reader, where a report has colours for that.
    """

    parts: tuple[str | Code, ...]
    indented: bool = False
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of printable cells below headers; the columns named in ``right`` are aligned to the right.

    ``gives_way`` names the columns that a narrow terminal leaves out first, the least important first. After them go
    the others from the right, and never the first that has a name. They are left out before a name gets shorter than
    ``name_width``. A page shows no table without rows, and none that is ``only_tsv``, which has for scripts what the
    lines of the page say to people. An HTML report shows ``title`` above the table, and has in ``marks`` the words for
    each mark in the first column.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    gives_way: tuple[str, ...] = ()
    only_tsv: bool = False
    name_width: int = 32
    title: str = ""
    marks: tuple[tuple[str, str], ...] = ()

    @property
    def is_shown(self) -> bool:
        """Whether people see the table."""
        return bool(self.rows) and not self.only_tsv


@dataclass(frozen=True, slots=True)
class Listing:
    """Printable lines that keep their indentation.

    ``drawn_as`` is the ``kind`` of the picture that shows the same: a page with that picture leaves the lines out.
    """

    lines: tuple[str, ...]
    drawn_as: str = ""


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


_BACKTICKS = lazy_pattern(r"`+")
_NUMBER = lazy_pattern(r"(?:< )?-?[0-9][0-9.,e+-]*( ?[%a-zA-Z]{1,2})?")
_MARKUP = lazy_pattern(r"[\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w)|^[-+#=]")


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
    return [(printable(key), *_with_indices(cells, key)) for key, cells in rows]


def name_beside(key: str, name: str) -> str:
    """Return another name for a cell of the row of ``key``, in printable form.

    Where it has the same indices as the key, its rows are joined as the keys are: ``h.{0..11}.w`` beside
    ``layers.{0..11}.w ×12``. The cell is for ``table_rows`` or ``join_rows`` only.
    """
    indices = _INDEX.findall(name)
    is_short = max(len(key), len(name)) <= _LONGEST_KEY and len(indices) <= _MOST_INDICES and "{" not in name
    if not indices or not is_short or _MARK in key or _END in key or indices != _INDEX.findall(key):
        return printable(name)
    return _INDEX.sub(_MARK, printable(name))


def _with_indices(cells: tuple[str, ...], key: str) -> tuple[str, ...]:
    """Return the cells with the indices of the key in place of the marks of ``name_beside``."""
    return _filled(cells, _INDEX.findall(key)) if _MARK in "".join(cells) else cells


def _filled(cells: tuple[str, ...], indices: Sequence[str]) -> tuple[str, ...]:
    """Return the cells with the indices in place of the marks, in turn."""
    if _MARK not in "".join(cells):
        return cells
    filled = []
    for cell in cells:
        first, *texts = cell.split(_MARK)
        filled.append(first + "".join(f"{index}{text}" for index, text in zip(cycle(indices), texts, strict=False)))
    return tuple(filled)


# An index as torch writes it, as a whole segment of a key; "0012" and "1_000" are names.
_INDEX = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,17})(?![^.])")
_MARK = "\0"  # of an index; printable text has none
_END = "\x01"  # of a key, where many are one text
# An index in a text of many keys. A pattern that begins with one character is found in half the time.
_LATER_INDEX = re.compile(r"\.(?:0|[1-9][0-9]{0,17})(?=[.\x01])")
_FIRST_INDEX = re.compile(r"\x01(?:0|[1-9][0-9]{0,17})(?=[.\x01])")
_ANY_INDEX = re.compile(r"[.\x01](0|[1-9][0-9]{0,17})(?=[.\x01])")
_MOST_INDICES = 16  # no model nests deeper, and the work grows with the square of the number
_LONGEST_KEY = 400  # longer keys are not joined; they are shortened when printed
_LIKE_A_COUNT = lazy_pattern(r" ×(?=[0-9,]+$)")  # the end of a key that looks like the count of joined keys

_IndexSets = tuple[tuple[int, ...], ...]  # for each index of a key, the numbers that it takes


def join_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return printable cells, with rows joined that have equal cells and keys that differ in indices only.

    ``layers.{0..11}.attn.q.weight ×12`` stands for exactly the twelve keys that it spells. Missing indices are shown
    (``{0..3,7}``). Several indices are joined only if every combination exists.
    """
    rows = list(rows)
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for shape, (key, cells) in zip(_shapes([key for key, _ in rows]), rows, strict=True):
        groups[shape, cells].append(key)
    joined: list[tuple[str, ...]] = []
    for (shape, cells), keys in groups.items():
        if len(keys) == 1 and " " not in keys[0]:  # as below, in a tenth of the time
            joined.append((printable(keys[0]), *_with_indices(cells, keys[0])))
            continue
        texts = [keys[0]] if shape.startswith(_END) else shape.split(_MARK)
        for sets in _products(_indices(keys, texts), len(keys)):
            ranges = [*map(_ranges, sets)]
            joined.append((_joined_key(texts, sets, ranges), *_filled(cells, ranges)))
    return joined


def _shapes(keys: Sequence[str]) -> list[str]:
    """Return each key with ``_MARK`` in place of each index, or behind ``_END`` if it is not joined with others.

    All keys are searched as one text, since a call of ``re`` for each takes most of the time of a large table.
    """
    text = _END.join(["", *keys, ""])
    has_odd = _MARK in text or text.count(_END) > len(keys) + 1 or max(map(len, keys), default=0) > _LONGEST_KEY
    if has_odd:
        is_odd = [_MARK in key or _END in key or len(key) > _LONGEST_KEY for key in keys]
        others = iter(_shapes([key for key, odd in zip(keys, is_odd, strict=True) if not odd]))
        return [_END + key if odd else next(others) for key, odd in zip(keys, is_odd, strict=True)]
    shapes = _FIRST_INDEX.sub(_END + _MARK, _LATER_INDEX.sub("." + _MARK, text)).split(_END)[1:-1]
    has_many = {shape for shape in set(shapes) if shape.count(_MARK) > _MOST_INDICES}
    if not has_many:
        return shapes
    return [_END + key if shape in has_many else shape for key, shape in zip(keys, shapes, strict=True)]


def _indices(keys: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
    """Return the first index of every key, the second of every key, and so on; ``texts`` stand around them."""
    count = len(texts) - 1
    if count == 1:
        start, behind = map(len, texts)
        return [[key[start : len(key) - behind] for key in keys]]
    found = _ANY_INDEX.findall(_END.join(["", *keys, ""])) if count else []
    return [found[place::count] for place in range(count)]


def _products(indices: Sequence[Sequence[str]], count: int) -> list[_IndexSets]:
    """Return products of index sets that together are exactly the indices of ``count`` keys."""
    columns = [set(column) for column in indices]
    is_like_all = math.prod(map(len, columns)) == count  # with one index, its numbers all differ
    if is_like_all and (len(indices) < 2 or len(set(zip(*indices, strict=True))) == count):  # every combination exists
        return [tuple(tuple(sorted(map(int, column))) for column in columns)]
    members: list[tuple[str, ...]] = list(zip(*indices, strict=True)) if indices else [()] * count
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


def _joined_key(shape: Sequence[str], sets: _IndexSets, ranges: Sequence[str]) -> str:
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
    if len(indices) > 2 and indices[-1] - indices[0] == len(indices) - 1:  # they are sorted, each once
        return f"{{{indices[0]}..{indices[-1]}}}"
    parts = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(f"{values[0]}..{values[-1]}" if len(values) > 2 else ",".join(map(str, values)))
    return "{" + ",".join(parts) + "}"
