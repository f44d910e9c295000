"""A report as a page: lines, tables and listings, set as text for a terminal or as Markdown for an issue.

In Markdown whatever may come from a file stands in a code span or a code block, where nothing is a link, a mention,
markup or HTML; only the words of ckptkit itself are prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ckptkit.core.text import printable

__all__ = ["Block", "Code", "Line", "Listing", "Page", "Table", "as_markdown", "as_text", "code"]

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
