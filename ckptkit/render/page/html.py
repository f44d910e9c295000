"""Pages as HTML, for notebooks: the same lines and tables as in a terminal, and pictures."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from itertools import groupby, starmap, takewhile
from typing import Final, Protocol

from ckptkit.core.text import plural
from ckptkit.render.page import Block, Code, Line, Listing, Page, Table

__all__ = ["as_html"]

_MOST_ROWS: Final = 500  # a browser takes long for a table of all tensors of a large model
_MOST_LINES: Final = 2000  # of a listing
_LONG: Final = 40  # characters of a cell that is broken into lines
# The colours of text are those of the notebook. A long table has its own place to scroll. The selectors of cells are
# long, since JupyterLab aligns all cells to the right.
_STYLE: Final = (
    ".ckptkit{line-height:1.45}"
    ".ckptkit .rows table th,.ckptkit .rows table td{text-align:left;white-space:pre}"
    ".ckptkit .rows table td.long{white-space:pre-wrap;overflow-wrap:anywhere;min-width:20em;max-width:50em}"
    ".ckptkit .rows table .right{text-align:right}"
    ".ckptkit p{white-space:pre-wrap;overflow-wrap:anywhere;margin:.5em 0}"
    ".ckptkit .rows{max-height:26em;overflow:auto;margin:.5em 0}.ckptkit table{margin:0}"
    ".ckptkit .pictures{display:flex!important;flex-wrap:wrap;gap:1em 2em;margin:1em 0}"
    ".ckptkit figure{flex:0 1 32em;max-width:36em;min-width:0;margin:0}"
    ".ckptkit figcaption{font-weight:600;margin:0 0 .5em}"
    ".ckptkit .without-pictures{display:none}"
)
# JupyterLab takes the style and the pictures out of a notebook that it does not trust, and leaves all their words.
_PICTURES: Final = (
    '<p class="without-pictures">Pictures are shown where the notebook is trusted.</p>'
    '<div class="pictures" hidden="hidden">{}</div>'
)


class _Picture(Protocol):
    """What a page needs of a picture: a title, and an element in which every name is escaped."""

    @property
    def title(self) -> str: ...

    @property
    def svg(self) -> str: ...


def as_html(page: Page, pictures: Sequence[_Picture] = (), picture_style: str = "") -> str:
    """Return a page as one HTML element; tables without rows are left out and names are escaped.

    The pictures stand behind the first lines. ``picture_style`` are the rules of CSS that they need.
    """
    page = list(page)
    first = list(takewhile(lambda block: isinstance(block, Line), page))
    figures = "".join(
        f"<figure><figcaption>{html.escape(picture.title)}</figcaption>{picture.svg}</figure>" for picture in pictures
    )
    shown = _PICTURES.format(figures) if figures else ""
    # A page of lines alone ends with its verdict, and pictures follow it.
    blocks = [*_blocks(first), shown, *_blocks(page[len(first) :])]
    return f'<div class="ckptkit"><style>{_STYLE}{picture_style}</style>{"".join(blocks)}</div>'


def _blocks(page: Sequence[Block]) -> Iterator[str]:
    for kind, group in groupby(page, type):
        if kind is Line:
            yield from _paragraphs([block for block in group if isinstance(block, Line)])
        else:
            yield from map(_block, group)


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
        lines = block.lines[:_MOST_LINES]
        text = html.escape("\n".join(lines))
        return f'<div class="rows"><pre>{text}</pre></div>{_more(len(block.lines) - len(lines), "line")}'
    return _table(block) if isinstance(block, Table) and block.is_shown else ""


def _more(count: int, noun: str) -> str:
    return f"<p>and {plural(count, noun)} more</p>" if count > 0 else ""


def _table(table: Table) -> str:
    marks = [' class="right"' if header in table.right else "" for header in table.headers]
    head = "".join(f"<th{mark}>{html.escape(name)}</th>" for name, mark in zip(table.headers, marks, strict=True))
    body = "".join(
        f"<tr>{''.join(starmap(_cell, zip(row, marks, strict=True)))}</tr>" for row in table.rows[:_MOST_ROWS]
    )
    rows = f'<div class="rows"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return rows + _more(len(table.rows) - _MOST_ROWS, "row")


def _cell(text: str, mark: str) -> str:
    mark = mark or (' class="long"' if len(text) > _LONG else "")
    return f"<td{mark}>{html.escape(text)}</td>"
