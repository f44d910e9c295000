"""Pages as HTML, for notebooks: the same lines and tables as in a terminal."""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import groupby

from ckptkit.core.text import plural
from ckptkit.render.page import Code, Line, Listing, Page, Table

__all__ = ["as_html"]

_MOST_ROWS = 500  # a browser takes long for a table of all tensors of a large model
_STYLE = (
    "<style>.ckptkit th,.ckptkit td{text-align:left;white-space:pre-wrap}.ckptkit .right{text-align:right}"
    ".ckptkit p{white-space:pre-wrap}</style>"
)


def as_html(page: Page) -> str:
    """Return a page as one HTML element; tables without rows are left out and names are escaped."""
    blocks: list[str] = []
    for kind, group in groupby(page, type):
        if kind is Line:
            lines = [block for block in group if isinstance(block, Line)]
            blocks += _paragraphs(lines)
        else:
            blocks += [_block(block) for block in group]
    return f'<div class="ckptkit">{_STYLE}{"".join(blocks)}</div>'


def _paragraphs(lines: list[Line]) -> Iterator[str]:
    """Yield one paragraph for each run of lines between empty lines."""
    for is_text, run in groupby(lines, key=lambda line: bool("".join(line.parts))):
        if is_text:
            yield f"<p>{'<br>'.join(map(_line, run))}</p>"


def _line(line: Line) -> str:
    text = "".join(
        f"<code>{html.escape(part)}</code>" if isinstance(part, Code) and part else html.escape(part)
        for part in line.parts
    )
    return f"  {text}" if line.indented else text


def _block(block: object) -> str:
    if isinstance(block, Listing):
        return f"<pre>{html.escape(chr(10).join(block.lines))}</pre>"
    return _table(block) if isinstance(block, Table) and block.is_shown else ""


def _table(table: Table) -> str:
    marks = [' class="right"' if header in table.right else "" for header in table.headers]
    head = "".join(f"<th{mark}>{html.escape(name)}</th>" for name, mark in zip(table.headers, marks, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{html.escape(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in table.rows[:_MOST_ROWS]
    )
    more = len(table.rows) - _MOST_ROWS
    note = f"<p>and {plural(more, 'row')} more</p>" if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"
