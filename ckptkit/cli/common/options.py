"""Options and arguments that many commands take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Final

import click

from ckptkit.cli.common.completing import complete_keys
from ckptkit.cli.common.printing import ReportFormat

__all__ = [
    "PATH_TYPE",
    "CommandFunction",
    "add_options",
    "expand_option",
    "filter_options",
    "ignore_option",
    "path_argument",
    "quiet_option",
    "report_options",
    "requirement_options",
    "skip_unread_option",
]

CommandFunction = Callable[..., object]
Decorator = Callable[[CommandFunction], CommandFunction]

# The readers and writers say which permission is missing. click would call it a wrong value.
PATH_TYPE: Final = click.Path(readable=False)


def path_argument(name: str, *, nargs: int = 1, required: bool = True, metavar: str | None = None) -> Decorator:
    """Return an argument that takes a PATH as ckptkit reads it; the shell completes it as a file name."""
    return click.argument(name, type=PATH_TYPE, nargs=nargs, required=required, metavar=metavar)


def add_options(command: CommandFunction, *options: Decorator) -> CommandFunction:
    """Return ``command`` with ``options``, which ``--help`` lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


quiet_option: Decorator = click.option("-q", "--quiet", is_flag=True, help="Print errors only on stderr.")
skip_unread_option: Decorator = click.option(
    "--skip-unread",
    is_flag=True,
    help="Leave out tensors that cannot be read, such as sparse tensors.",
)
ignore_option: Decorator = click.option(
    "--ignore",
    multiple=True,
    metavar="CODE[:KEY-PATTERN]",
    help="Leave expected findings out, as in 'groups.decay:*.norm.*'. Repeatable.",
)
expand_option: Decorator = click.option("--expand", is_flag=True, help="List every tensor; do not join layers.")
_keep_option = click.option(
    "--keep", multiple=True, metavar="PATTERN", shell_complete=complete_keys,
    help="Keep only matching keys. Repeatable.",
)  # fmt: skip
_drop_option = click.option(
    "--drop", multiple=True, metavar="PATTERN", shell_complete=complete_keys,
    help="Leave out matching keys. Repeatable.",
)  # fmt: skip
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_markdown_option = click.option(
    "--markdown", "as_markdown", is_flag=True, help="Print Markdown, to paste into an issue."
)


def _parse_share(context: click.Context, option: click.Parameter, text: str) -> float:
    """Return the share that is written as ``0.95`` or ``95%``."""
    number = text.strip().removesuffix("%")
    with contextlib.suppress(ValueError):
        share = float(number) / 100 if number != text.strip() else float(number)
        if 0 <= share <= 1:
            return share
    raise click.BadParameter(f"{text!r} is not a share: write 0.95 or 95%.", context, option)


_require_option = click.option(
    "--require", multiple=True, metavar="PATTERN", shell_complete=complete_keys,
    help="Keys that must all be filled. Repeatable.",
)  # fmt: skip
_min_coverage_option = click.option(
    "--min-coverage", default="0", metavar="SHARE", callback=_parse_share,
    help="The least share of the elements that must be filled, such as 0.95 or 95%.",
)  # fmt: skip


def requirement_options(command: CommandFunction) -> CommandFunction:
    """Add --require and --min-coverage."""
    return add_options(command, _require_option, _min_coverage_option)


def filter_options(command: CommandFunction) -> CommandFunction:
    """Add --keep and --drop."""
    return add_options(command, _keep_option, _drop_option)


def report_options(command: CommandFunction) -> CommandFunction:
    """Add --json and --markdown, and pass them to the command as ``report_format``."""

    @functools.wraps(command)
    def with_report_format(*args: object, as_json: bool, as_markdown: bool, **others: object) -> object:
        if as_json and as_markdown:
            raise click.UsageError("--json and --markdown exclude each other")
        chosen = ReportFormat.JSON if as_json else ReportFormat.MARKDOWN if as_markdown else ReportFormat.TEXT
        return command(*args, report_format=chosen, **others)

    return add_options(with_report_format, _json_option, _markdown_option)
