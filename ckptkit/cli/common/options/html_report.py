"""The option ``--html``: the result of a command as one HTML file too, beside what it prints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import click

from ckptkit.cli.common.options import PATH_TYPE, CommandFunction, add_options
from ckptkit.cli.common.printing import print_message
from ckptkit.core.files.places import open_source
from ckptkit.core.text import human_bytes, printable
from ckptkit.errors import CkptkitError, OutputError
from ckptkit.formats.writing.state import Target

if TYPE_CHECKING:
    from ckptkit.core.result import Result
    from ckptkit.render.html.histograms import BothSides

__all__ = ["html_option", "printed_in_any_case", "write_html"]

_STDOUT = "-"
_option = click.option(
    "--html", "html_path", type=PATH_TYPE, metavar="FILE",
    help="Also write the result to FILE as one HTML page for a browser. Only an earlier report is replaced.",
)  # fmt: skip


def html_option(command: CommandFunction) -> CommandFunction:
    """Add --html, and pass its file to the command as ``html``: None, or checked before the command begins."""

    @functools.wraps(command)
    def with_html(*args: object, html_path: str | None, **others: object) -> object:
        return command(*args, html=None if html_path is None else _target(html_path), **others)

    return add_options(with_html, _option)


def _target(path: str) -> Target:
    """Return where the report is written. Raises ``OutputError`` for a file that is not an earlier report."""
    from ckptkit.formats.writing.targets import output_path, prepare_target
    from ckptkit.render.html.report import START_BYTES, is_report

    if path in ("", _STDOUT):
        raise click.UsageError("--html needs the name of a file, since the result itself is printed on stdout")
    path = output_path(path)
    target = prepare_target(path, force=True)
    if target.before.file is not None:
        with closing(open_source(path)) as file:
            start = file.read(0, min(START_BYTES, file.size))
        if not is_report(start):
            reason = "already exists and is not a report of ckptkit, so --html does not replace it"
            raise OutputError(reason, hint="give a new name", path=path)
    return target


@contextmanager
def printed_in_any_case(echo: Callable[[], None]) -> Iterator[None]:
    """Print a result with ``echo`` after the body has written its report, and also before an error of the body."""
    try:
        yield
    except CkptkitError:  # the result may have taken hours
        echo()
        raise
    echo()


def write_html(
    html: Target | None,
    result: Result,
    *,
    quiet: bool,
    chosen: Mapping[str, object] = MappingProxyType({}),
    both_sides: BothSides | None = None,
    about: Mapping[str, str | None] = MappingProxyType({}),
) -> None:
    """Write the report of a result if the user asked for one, completely or not at all, and say so unless ``quiet``.

    ``chosen`` are options of the page and of the document of the result; ``both_sides`` has statistics for histograms.
    ``about`` has what the user gave for each role, such as the model, where the result does not know it.
    """
    if html is None:
        return
    from ckptkit.core.files.remote.urls import clean_url
    from ckptkit.formats.writing.outputs import write_small_file
    from ckptkit.render.results import report_of

    given = {role: clean_url(text) for role, text in about.items() if text is not None}
    data = report_of(result, both_sides=both_sides, chosen=chosen, about=given).encode()
    write_small_file(html, data)
    if not quiet:
        print_message(f"wrote {printable(html.given)}: HTML, {human_bytes(len(data))}")
