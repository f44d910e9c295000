"""The blocks of a page as what the template of a report lays out: sentences, texts and tables with their columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ckptkit.core.text import plural
from ckptkit.render.page import Code, Hint, Line, Listing, Page, Table, Tone
from ckptkit.render.page.display import are_plain, display_width

__all__ = [
    "FEW_ROWS", "Choice", "Column", "Part", "Sentence", "TableView", "rows_left_out", "sentence_of", "sentences_of",
    "tables_of", "texts_of",
]  # fmt: skip

_MOST_ROWS: Final = 20_000  # of one table: a browser stays quick, and the document has all
_ROWS_AT_ONCE: Final = 50  # that a browser lays out together, or not at all while they are not in sight
_WIDEST = 120  # columns of characters; a longer name or sentence is wrapped
_LEAST = 22  # to which a name or sentence is narrowed before the table scrolls
_BESIDE_HEADER = 3  # the sign of the order
FEW_ROWS: Final = 12  # that need no filter
_MOST_CHOICES = 8
_ROWS_FOR_CHOICE = 3
_BARS = re.compile(r"[▁▂▃▄▅▆▇█· ]*")  # also the cell of a row without bars
_MARK_HEADER = "status"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a sentence; ``is_code`` where it is a name, and not words of ckptkit that may quote one."""

    text: str
    is_code: bool


@dataclass(slots=True)
class Sentence:
    """A line of a page, with the lines below that explain it."""

    parts: tuple[Part, ...]
    tone: Tone = ""
    badge: str = ""  # the first word, where the tone has a colour for it
    below: list[Sentence] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its header, its width in characters, and how it is sorted.

    ``order`` is ``number``, ``text``, or empty for bars, which have no order.
    """

    header: str
    width: int
    least: int
    order: str
    is_wide: bool = False  # it has long names or sentences

    @property
    def kind(self) -> str:
        """The class of the cells."""
        return "number" if self.order == "number" else "bars" if not self.order else "wide" if self.is_wide else "text"

    @property
    def size(self) -> str:
        """The width of the column, for a grid of CSS."""
        return f"minmax({self.least}ch,{self.width}ch)" if self.least < self.width else f"{self.width}ch"


@dataclass(frozen=True, slots=True)
class Choice:
    """A column with few different cells, which can be chosen: the values and how many rows have each."""

    column: int
    name: str
    values: tuple[tuple[str, str, int], ...]  # the cell, what it says, the number of rows


@dataclass(frozen=True, slots=True)
class TableView:
    """A table with everything that a browser needs to show, sort and filter it.

    ``chunks`` are the rows, some at a time. ``picks`` says whether a row chooses the tensor of the histogram.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    chunks: tuple[Sequence[tuple[str, ...]], ...]
    count: int
    left_out: int
    choices: tuple[Choice, ...]
    notes: tuple[Sentence, ...]
    marks: dict[str, str]
    picks: bool = False

    @property
    def cells(self) -> list[tuple[str, str]]:
        """The role and the class of the cells of each column: screen readers take the names of the rows as headers."""
        names = 1 if self.marks else 0
        other = "gridcell" if self.picks else "cell"
        return [("rowheader" if at == names else other, column.kind) for at, column in enumerate(self.columns)]

    @property
    def has_filter(self) -> bool:
        """Whether the table is so long that it needs a filter."""
        return self.count > FEW_ROWS


def sentences_of(lines: Iterable[Line]) -> list[list[Sentence]]:
    """Return the sentences in paragraphs, which an empty line separates."""
    paragraphs: list[list[Sentence]] = [[]]
    for line in lines:
        if not "".join(line.parts):
            paragraphs.append([])
        elif line.indented and paragraphs[-1]:
            paragraphs[-1][-1].below.append(sentence_of(line))
        else:
            paragraphs[-1].append(sentence_of(line))
    return [paragraph for paragraph in paragraphs if paragraph]


def sentence_of(line: Line) -> Sentence:
    """Return a line as a sentence; the word in front of a sentence with a tone becomes its badge."""
    first, *others = line.parts
    tone, badge, parts = line.tone, "", line.parts
    if not isinstance(first, Code) and first.endswith(": ") and (tone or _has_hint(others)):
        badge, parts = first.removesuffix(": "), tuple(others)
    return Sentence(tuple(Part(str(part), type(part) is Code) for part in parts if part), tone, badge)


def _has_hint(parts: Iterable[str]) -> bool:
    return any(isinstance(part, Hint) for part in parts)


def texts_of(page: Page) -> list[Listing]:
    """Return the texts of a page that keep their layout."""
    return [block for block in page if isinstance(block, Listing) and block.lines]


def tables_of(page: Page, picked: frozenset[str]) -> tuple[list[TableView], list[Line]]:
    """Return the tables of a page, and all lines but those that explain a column of the table above them.

    The first table with a row for a tensor among ``picked`` chooses the tensor of the histogram.
    """
    tables: list[tuple[Table, list[Line]]] = []
    others: list[Line] = []
    for block in page:
        if isinstance(block, Table) and block.is_shown:
            tables.append((block, []))
        elif isinstance(block, Line):
            start = block.parts[0].partition(":")[0] if block.parts else ""
            is_legend = bool(tables) and start != "" and start in tables[-1][0].headers
            (tables[-1][1] if is_legend else others).append(block)
    views: list[TableView] = []
    for number, (table, notes) in enumerate(tables):
        picks = bool(picked) and not any(view.picks for view in views) and _has_any(table, picked)
        views.append(_table_view(table, notes, f"t{number}", picks=picks))
    return views, others


def _has_any(table: Table, picked: frozenset[str]) -> bool:
    at = _name_column(table)
    return any(row[at] in picked for row in table.rows)


def _name_column(table: Table) -> int:
    return next((at for at, header in enumerate(table.headers) if header), 0)


def _table_view(table: Table, notes: Sequence[Line], name: str, *, picks: bool) -> TableView:
    marks = dict(table.marks)
    rows: Sequence[tuple[str, ...]] = table.rows
    if "=" in marks:  # what is the same on both sides is read last
        rows = sorted(rows, key=lambda row: row[0] == "=")
    shown = rows[:_MOST_ROWS]
    columns = tuple(_columns(table, shown, marks))
    return TableView(
        name,
        table.title or next((header for header in table.headers if header), "table").capitalize(),
        columns,
        tuple(shown[at : at + _ROWS_AT_ONCE] for at in range(0, len(shown), _ROWS_AT_ONCE)),
        len(shown),
        len(rows) - len(shown),
        tuple(_choices(table, shown, marks)),
        tuple(map(sentence_of, notes)),
        marks,
        picks,
    )


def _columns(table: Table, rows: Sequence[tuple[str, ...]], marks: dict[str, str]) -> Iterator[Column]:
    cells = list(zip(*rows, strict=True))
    for at, (header, column) in enumerate(zip(table.headers, cells, strict=True)):
        is_bars = any(column) and all(map(_BARS.fullmatch, column))
        name = header or ("" if is_bars else _MARK_HEADER)
        if at == 0 and marks:
            width = max(len(word) for word in marks.values()) + 2
        else:
            width = max(map(len if are_plain(column) else display_width, column), default=0)
        width = max(width, display_width(name) + _BESIDE_HEADER)
        if header in table.right:
            yield Column(name, width, width, "number")
        elif is_bars:
            yield Column(name, width, width, "")
        else:
            wide = width > _LEAST
            yield Column(name, min(width, _WIDEST), min(width, _LEAST), "text", is_wide=wide)


def _choices(table: Table, rows: Sequence[tuple[str, ...]], marks: dict[str, str]) -> Iterator[Choice]:
    """Yield the columns by which rows can be chosen: that of the marks, else those that have few different cells."""
    named = _name_column(table)
    for at, header in enumerate(table.headers):
        is_mark = at == 0 and bool(marks)
        if at == named or header in table.right or len(rows) <= FEW_ROWS or bool(marks) != is_mark:
            continue
        counts = Counter(row[at] for row in rows)
        few = 2 <= len(counts) <= _MOST_CHOICES and len(counts) * _ROWS_FOR_CHOICE <= len(rows)
        if (few or is_mark) and not all(map(_BARS.fullmatch, counts)):
            words = marks if is_mark else {}
            values = ((cell, words.get(cell, cell) or "(empty)", count) for cell, count in counts.most_common())
            yield Choice(at, header or _MARK_HEADER, tuple(values))


def rows_left_out(view: TableView) -> str:
    """Return the sentence about rows that the report does not show, or an empty string."""
    if not view.left_out:
        return ""
    return f"{plural(view.left_out, 'more row')} would make this page slow: the JSON document has all"
