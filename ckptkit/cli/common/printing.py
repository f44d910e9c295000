"""Print results on stdout and messages on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, TextIO

import click

from ckptkit.errors import one_line

if TYPE_CHECKING:
    from ckptkit.core.findings import Report
    from ckptkit.core.progress import Progress
    from ckptkit.core.result import Result
    from ckptkit.render.page import Page

__all__ = [
    "ReportFormat",
    "echo_report",
    "echo_result",
    "exit_code",
    "fitted_to",
    "print_line",
    "print_message",
    "progress_bar",
]

_LINES_AT_ONCE = 1000
_USUAL_WIDTH = 80  # of a terminal that does not know it
_BAR = 36
_BESIDE_BAR = len("  []  100%  00:00:00")


class ReportFormat(Enum):
    """The format in which a command prints its result; ``TABLE`` alone is fitted to the terminal."""

    TABLE = "table"
    GITHUB = "github"
    PLAIN = "plain"
    ACTIONS = "actions"
    TSV = "tsv"
    JSON = "json"


def print_line(line: str) -> None:
    """Print a line of a result on stdout; its colours are left out unless the user and the terminal allow them."""
    if not line.isascii():
        from ckptkit.render.page.sparkline import for_encoding

        line = for_encoding(line, getattr(sys.stdout, "encoding", None))
    # Without file=, click wraps an ASCII stream in an encoding of its own, and such a terminal may obey those bytes.
    click.echo(line, file=sys.stdout)


def _print_lines(lines: Iterable[str]) -> None:
    """Print lines of a result on stdout, many at a time: click looks at the stream and flushes it each time."""
    left = iter(lines)
    while some := list(islice(left, _LINES_AT_ONCE)):
        print_line("\n".join(some))


def print_message(message: str) -> None:
    """Print a message on stderr as one line, without control characters and commands of a workflow of GitHub."""
    line = one_line(message)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        # The runner reads stderr too: it takes a line that begins with ::, and what begins with ##[ anywhere in a line.
        line = line.replace("##[", r"#\x23[")
        line = line.replace("::", r":\x3a", 1) if line.lstrip().startswith("::") else line
    click.echo(line, file=sys.stderr)


def echo_result(
    report_format: ReportFormat,
    result: Result,
    *,
    chosen: Mapping[str, object] = MappingProxyType({}),
    colours: Mapping[str, str] = MappingProxyType({}),
    **layout: object,
) -> None:
    """Print a result in the requested format; without options, as ``print(result)`` and ``result.to_dict()`` have it.

    ``chosen`` are options of the page and of the document of the result, and ``layout`` are options of the page alone.
    """
    from ckptkit.render.results import document_of, page_of

    if report_format is ReportFormat.TSV and "expand" in layout:
        layout["expand"] = True  # a script looks for the name of each tensor
    echo_report(
        report_format,
        lambda: page_of(result, **chosen, **layout),
        lambda: document_of(result, **chosen),
        colours,
    )
    if report_format is ReportFormat.ACTIONS:
        from ckptkit.render.github import annotations_of, command_lines

        _print_lines(command_lines(annotations_of(result)))


def echo_report(
    report_format: ReportFormat,
    page: Callable[[], Page],
    document: Callable[[], Mapping[str, object]],
    colours: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print what a page and a document say in the requested format; only the function for that format is called.

    JSON is printed in ASCII, so names survive every terminal. Only ``TABLE`` in a terminal is fitted to its width:
    nothing is left out or shortened in a pipe. ``colours`` maps the mark at the start of a line of text
    to the colour of that line.
    """
    if report_format is ReportFormat.JSON:
        print_line(json.dumps(document(), allow_nan=False))
        return
    from ckptkit.render.page import Table, as_markdown, as_text, as_tsv

    blocks = page()
    if report_format is ReportFormat.GITHUB:
        _print_lines(as_markdown(blocks))
        return
    if report_format is ReportFormat.ACTIONS:
        from ckptkit.render.github import append_summary, log_lines

        append_summary(blocks)
        _print_lines(log_lines(blocks))
        return
    if report_format is ReportFormat.TSV:
        if not any(isinstance(block, Table) for block in blocks):
            raise click.UsageError("this report has no table, so it cannot be printed as tsv")
        _print_lines(as_tsv(blocks))
        return
    if report_format is ReportFormat.TABLE:
        blocks = fitted_to(sys.stdout, blocks)

    def coloured(line: str) -> str:
        colour = colours.get(line[:1]) if line[1:2] in (" ", "") else None
        return click.style(line, fg=colour) if colour else line

    lines = as_text(blocks)
    _print_lines(map(coloured, lines) if colours else lines)


def fitted_to(stream: TextIO, page: Page) -> Page:
    """Return the page as the terminal that ``stream`` is has room for it; a pipe or a file gets all of it."""
    if not stream.isatty():
        return page
    from ckptkit.render.page.width import fitted

    return fitted(page, _width_of(stream))


def _width_of(terminal: TextIO) -> int:
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and int(given) > 0:
        return int(given)
    with contextlib.suppress(OSError):
        return os.get_terminal_size(terminal.fileno()).columns or _USUAL_WIDTH
    return _USUAL_WIDTH


def exit_code(report: Report) -> int:
    """Return 1 if the report has an error or a warning, else 0: notes alone do not count."""
    return 1 if report.errors or report.warnings else 0


@contextlib.contextmanager
def progress_bar(length: int, label: str, *, hidden: bool) -> Iterator[Progress | None]:
    """Show a progress bar over ``length`` bytes and yield the function that advances it by a number of bytes.

    Yields None, and shows nothing, if the bar is ``hidden`` or stderr is not a terminal.
    """
    if hidden or not sys.stderr.isatty():
        yield None
        return
    size = min(_BAR, _width_of(sys.stderr) - len(label) - _BESIDE_BAR)  # a bar in two lines is not drawn over
    with click.progressbar(length=length, label=label, file=sys.stderr, width=max(size, 1)) as bar:
        yield bar.update
