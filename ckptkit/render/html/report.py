"""One HTML file of a page, its pictures and its document: nothing in it is loaded, and only its own script runs.

Every name is escaped by the template. The policy in the first lines of the file allows one style and one script, by
their hashes. If a name were taken for markup, it still could not run, and could load nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from ckptkit.core.text import human_bytes
from ckptkit.render.html.blocks import (
    FEW_ROWS,
    TableView,
    rows_left_out,
    sentence_of,
    sentences_of,
    tables_of,
    texts_of,
)
from ckptkit.render.html.histograms import HistogramRow, histograms_in, histograms_of
from ckptkit.render.page import Line, Page
from ckptkit.render.page.head import Head
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.style import picture_style

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["START_BYTES", "as_report", "is_report"]

START_BYTES: Final = 200  # that tell a report from any other file
_START = re.compile(
    rb'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="ckptkit[ "]'
)
_MOST_DOCUMENT: Final = 64_000_000  # bytes of the JSON document: browsers open larger files slowly, or not at all
_FINDINGS: Final = frozenset({"note", "warning", "error"})
_SIDES: Final = ("expected", "found")


def is_report(start: bytes) -> bool:
    """Return whether a file that begins with these bytes is a report of ckptkit, of any version."""
    return _START.match(start) is not None


def as_report(
    page: Page,
    head: Head,
    document: Mapping[str, Any],
    pictures: Sequence[Picture],
    both_sides: Iterable[HistogramRow] | None = None,
) -> str:
    """Return the text of the HTML file.

    ``both_sides`` has the statistics of tensors for histograms; the default is those that ``document`` has.
    """
    from markupsafe import Markup

    histograms = histograms_in(document) if both_sides is None else histograms_of(both_sides, _SIDES)
    tables, lines = tables_of(page, frozenset() if histograms is None else histograms.names)
    lines = list(_not_said(lines, list(head.lines())))
    style = _package_text("style.css") + picture_style() + "".join(map(_table_style, tables))
    script = _package_text("script.js")
    data = json.dumps(document, allow_nan=False, separators=(",", ":"))
    is_whole = len(data) <= _MOST_DOCUMENT
    environment = _environment()
    text: str = environment.get_template("report.html").render(
        generator=_generator(),
        policy=f"default-src 'none'; style-src {_hash_of(style)}; script-src {_hash_of(script)}; base-uri 'none'; "
        "form-action 'none'",
        style=Markup(style),  # noqa: S704 - both are files of this package
        script=Markup(script),  # noqa: S704
        head=head,
        verdict=sentence_of(head.verdict),
        subjects=[(subject.label, sentence_of(subject.description)) for subject in head.subjects],
        pictures=[(picture, Markup(picture.svg)) for picture in pictures],  # noqa: S704 - they escape every name
        tones=[(tone, count) for tone, count in Counter(line.tone for line in lines).items() if tone in _FINDINGS],
        few=FEW_ROWS,
        paragraphs=sentences_of(lines),
        listings=texts_of(page),
        tables=[(table, rows_left_out(table)) for table in tables],
        histograms=histograms,
        document=Markup(_as_script_data(data)) if is_whole else "",  # noqa: S704
        document_name=str(document.get("schema", "ckptkit.report/1")).partition("/")[0].replace("ckptkit.", "ckpt-"),
        document_size=human_bytes(len(data)),
        histogram_data=Markup(_as_script_data(json.dumps(histograms.numbers, separators=(",", ":"))))  # noqa: S704
        if histograms
        else "",
    )
    return text


def _not_said(lines: Iterable[Line], said: Sequence[Line]) -> Iterator[Line]:
    """Yield the lines that the head has not said; what explained a line that it has said stands for itself."""
    is_said = False
    for line in lines:
        is_said = line in said or (is_said and line.indented)
        if line not in said:
            yield replace(line, indented=False) if is_said else line


def _generator() -> str:
    try:
        return f"ckptkit {metadata.version('ckptkit')}"
    except metadata.PackageNotFoundError:  # a checkout on the path that is not installed
        return "ckptkit"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("ckptkit.render.html", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


@cache
def _package_text(name: str) -> str:
    from importlib.resources import files

    return files("ckptkit.render.html").joinpath(name).read_text(encoding="utf-8")


def _hash_of(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _as_script_data(data: str) -> str:
    """Return JSON in ASCII that no browser takes for the end of its element, nor for markup."""
    return data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _table_style(table: TableView) -> str:
    """Return the rules for the columns of one table: their widths, and their headers where rows are stacked."""
    name = f"#{table.name}"
    least = sum(column.least for column in table.columns) + 2 * len(table.columns)
    rules = [
        f"{name} tr{{grid-template-columns:{' '.join(column.size for column in table.columns)};min-width:{least}ch}}"
    ]
    labels = "".join(
        f'{name} td:nth-child({at}):before{{content:"{_css_text(column.header)}"}}'
        for at, column in enumerate(table.columns, 1)
        if column.header and (at > 1 or column.order == "number")  # a name says itself what it is
    )
    return "".join([*rules, f"@media (max-width:700px){{{labels}}}"])


def _css_text(text: str) -> str:
    r"""Return text for a string of CSS: every character that is not a letter or a digit is written as ``\20 ``."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\{ord(char):x} " for char in text)
