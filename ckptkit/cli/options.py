"""What commands share: options, how results are printed, and which path an error is about."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, TypeVar

import click

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import form_of, parse_table
from ckptkit.core.files import LocalFile
from ckptkit.core.findings import Report
from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError, PathError, RuleError, one_line
from ckptkit.formats import LIVE_PREFIX, open_checkpoint, split_path
from ckptkit.render.page import Page, as_markdown, as_text

__all__ = [
    "Form",
    "about",
    "echo_report",
    "exit_code",
    "expand_option",
    "file_beside",
    "filter_options",
    "form_options",
    "opened",
    "path_argument",
    "progress_bar",
    "put",
    "quiet_option",
    "read_text",
    "read_toml",
    "tell",
]


def put(line: str, *, colour: str | None = None) -> None:
    """Print a line of a result, in a colour where the terminal has any and the user wants it."""
    # Named, since click gives a stream of ASCII an encoding of its own, whose bytes such a terminal may obey.
    click.echo(click.style(line, fg=colour) if colour else line, file=sys.stdout)


def tell(message: str) -> None:
    """Print a message, on one line whatever is in it."""
    click.echo(one_line(message), file=sys.stderr)


_Command = TypeVar("_Command", bound=Callable[..., Any])
_IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d][\w.]*")


class Form(Enum):
    """How a result is printed."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


def path_argument(name: str, **settings: Any) -> Callable[[_Command], _Command]:
    """Return an argument that is a PATH in the sense of ckptkit; completed as a file name."""
    return click.argument(name, type=click.Path(), **settings)


quiet_option = click.option("-q", "--quiet", is_flag=True, help="No messages on stderr but errors.")
expand_option = click.option("--expand", is_flag=True, help="One line a tensor: do not join layers.")


def form_options(command: _Command) -> _Command:
    """Add --json and --markdown, and pass on as ``form`` in which form the result is printed."""

    @functools.wraps(command)
    def with_form(*args: Any, as_json: bool, as_markdown: bool, **others: Any) -> Any:
        if as_json and as_markdown:
            raise click.UsageError("--json and --markdown exclude each other")
        form = Form.JSON if as_json else Form.MARKDOWN if as_markdown else Form.TEXT
        return command(*args, form=form, **others)

    markdown = click.option("--markdown", "as_markdown", is_flag=True, help="Print a report for a GitHub issue.")
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(  # type: ignore[return-value]
        markdown(with_form)
    )


def filter_options(command: _Command) -> _Command:
    """Add --keep and --drop."""
    command = click.option("--drop", multiple=True, metavar="PATTERN", help="Leave out keys that fit. Repeatable.")(
        command
    )
    return click.option("--keep", multiple=True, metavar="PATTERN", help="Take only keys that fit. Repeatable.")(
        command
    )


def file_beside(path: str, name: str) -> str | None:
    """Return the path of the file ``name`` that lies with a checkpoint, in its directory; None where there is none."""
    file, _ = split_path(path)
    found = os.path.join(file if os.path.isdir(file) else os.path.dirname(file), name)
    return found if os.path.exists(file) and os.path.isfile(found) else None


def read_text(path: str) -> str:
    """Return the text of a small file; raises ``PathError`` where it is none, ``RuleError`` where it is no UTF-8."""
    with contextlib.closing(LocalFile(path)) as file:  # which refuses a FIFO, whose reading might never end
        try:
            return file.read(0, file.size).decode()
        except OSError as error:
            raise PathError((error.strerror or str(error)).lower(), path=path) from None
        except UnicodeDecodeError as error:
            raise RuleError(f"is no text: {error}", path=path) from None


def read_toml(path: str, text: str | None = None, *, as_json: bool | None = None) -> Mapping[str, Any]:
    """Return the content of a TOML file, which holds ``text`` where that was read before.

    It is JSON where ``as_json`` says so; else its suffix says JSON or YAML. Raises ``RuleError`` where it is none.
    """
    text = read_text(path) if text is None else text
    try:
        return parse_table(text, form_of(path) if as_json is None else "json" if as_json else "toml")
    except RuleError as error:
        error.path = path
        raise


@contextlib.contextmanager
def about(path: str | None) -> Iterator[None]:
    """Let errors that name no file be about this one."""
    try:
        yield
    except CkptkitError as error:
        if error.path is None:
            error.path = path
        raise


@contextlib.contextmanager
def opened(*paths: str, quiet: bool) -> Iterator[list[Checkpoint]]:
    """Open checkpoints, say on stderr what is odd about each, and close them at the end."""
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(_open(path)) for path in paths]
        for checkpoint in checkpoints:
            if not quiet:
                for warning in checkpoint.warnings:
                    tell(f"ckpt: {printable(checkpoint.path)}: warning: {warning}")
        yield checkpoints


def _open(path: str) -> Checkpoint:
    try:
        return open_checkpoint(path)
    except PathError as error:
        if error.hint is None and _IMPORTABLE.fullmatch(path) and not os.path.lexists(path):
            error.hint = f"for a live model write {LIVE_PREFIX}{path}"
        raise


@contextlib.contextmanager
def progress_bar(length: int, *, hidden: bool) -> Iterator[Callable[[int], None] | None]:
    """Show on a terminal how far the reading of ``length`` bytes has come; gives what is to be told of each piece."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=length, label="reading", file=sys.stderr) as bar:
        yield bar.update


def exit_code(report: Report) -> int:
    """Return 1 where there is an error or a warning among the findings; notes are no reason."""
    return 1 if report.summary["errors"] or report.summary["warnings"] else 0


def echo_report(
    form: Form,
    page: Callable[[], Page],
    document: Callable[[], Mapping[str, Any]],
    colours: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print a result in the form that was asked for; only that one is made.

    In JSON names are exact, and ASCII whatever the terminal can show. ``colours`` are those of the lines of a text
    that begin with a mark.
    """
    if form is Form.JSON:
        put(json.dumps(document(), allow_nan=False))
    elif form is Form.MARKDOWN:
        for line in as_markdown(page()):
            put(line)
    else:
        for line in as_text(page()):
            colour = colours.get(line[:1]) if line[1:2] in (" ", "") else None
            put(line, colour=colour)
