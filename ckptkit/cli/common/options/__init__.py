"""Options and arguments that many commands take."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Final

import click

from ckptkit.cli.common.completing import complete_expected_keys, complete_keys
from ckptkit.cli.common.printing import ReportFormat
from ckptkit.core.files.places import clean_path

__all__ = [
    "PATH_TYPE",
    "CommandFunction",
    "add_options",
    "dequantize_option",
    "expand_option",
    "filter_options",
    "ignore_option",
    "numbers_dtype_option",
    "output_report_options",
    "path_argument",
    "quiet_option",
    "report_options",
    "requirement_options",
    "skip_unread_option",
]

CommandFunction = Callable[..., object]
Decorator = Callable[[CommandFunction], CommandFunction]


class _PathType(click.Path):
    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        path = super().convert(value, param, ctx)
        return clean_path(path) if isinstance(path, str) else path  # no message may show the credentials of a URL


# The readers and writers say which permission is missing. click would call it a wrong value.
PATH_TYPE: Final = _PathType(readable=False)


def path_argument(name: str, *, nargs: int = 1, required: bool = True, metavar: str | None = None) -> Decorator:
    """Return an argument that takes a PATH as ckptkit reads it; the shell completes it as a file name."""
    return click.argument(name, type=PATH_TYPE, nargs=nargs, required=required, metavar=metavar)


def add_options(command: CommandFunction, *options: Decorator) -> CommandFunction:
    """Return ``command`` with ``options``, which ``--help`` lists in this order."""
    for option in reversed(options):
        command = option(command)
    return command


quiet_option: Decorator = click.option(
    "-q", "--quiet", is_flag=True, help="Print no progress, notes or hints; the report and errors stay."
)
skip_unread_option: Decorator = click.option(
    "--skip-unread",
    is_flag=True,
    help="Leave out tensors that cannot be read, such as sparse tensors.",
)
dequantize_option: Decorator = click.option(
    "--dequantize", is_flag=True, help="Read quantised weights as numbers, such as fp8, GPTQ, nf4 and GGUF blocks."
)
numbers_dtype_option: Decorator = click.option(
    "--dtype", metavar="DTYPE", help="--dequantize only: the dtype of the numbers."
)
ignore_option: Decorator = click.option(
    "--ignore",
    multiple=True,
    metavar="CODE[:KEY-PATTERN]",
    help="Leave expected findings out, as in 'groups.decay:*.norm.*'. Repeatable.",
)
expand_option: Decorator = click.option("--expand", is_flag=True, help="List every tensor; do not join layers.")
_FORMAT_HELP = (
    "Format of the report. table: fitted to the terminal. plain: whole names and all columns, as in a pipe. github: "
    "Markdown. actions: for a job of GitHub Actions. tsv: the first table, without joined rows. json: one document."
)
_SHORT_FORMS: Final = {"--json": ReportFormat.JSON, "--markdown": ReportFormat.GITHUB, "--wide": ReportFormat.PLAIN}
_short_options = (
    click.option("--json", is_flag=True, help="Print one JSON document."),
    click.option("--markdown", is_flag=True, help="Print Markdown, to paste into an issue."),
    click.option("--wide", is_flag=True, help="Print all columns and whole names in a narrow terminal too."),
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
    "--require", multiple=True, metavar="PATTERN", shell_complete=complete_expected_keys,
    help="Keys that must all be filled. Repeatable.",
)  # fmt: skip
_min_coverage_option = click.option(
    "--min-coverage", default="0", metavar="SHARE", callback=_parse_share,
    help="The least share of the elements that must be filled, such as 0.95 or 95%.",
)  # fmt: skip


def requirement_options(command: CommandFunction) -> CommandFunction:
    """Add --require and --min-coverage."""
    return add_options(command, _require_option, _min_coverage_option)


def filter_options(command: CommandFunction, *, of: str = "") -> CommandFunction:
    """Add --keep and --drop, which filter the keys of the argument ``of`` where there are several."""
    keys = f"matching keys of {of}" if of else "matching keys"
    return add_options(
        command,
        click.option(
            "--keep", multiple=True, metavar="PATTERN", shell_complete=complete_keys,
            help=f"Keep only {keys}. Repeatable.",
        ),
        click.option(
            "--drop", multiple=True, metavar="PATTERN", shell_complete=complete_keys,
            help=f"Leave out {keys}. Repeatable.",
        ),
    )  # fmt: skip


def report_options(command: CommandFunction) -> CommandFunction:
    """Add --format and its short forms, and pass the choice to the command as ``report_format``."""
    return _report_options("--format", command)


def output_report_options(command: CommandFunction) -> CommandFunction:
    """Do as ``report_options`` for a command that writes a checkpoint, where --format is the format of the output."""
    return _report_options("--report", command)


def _report_options(name: str, command: CommandFunction) -> CommandFunction:
    @functools.wraps(command)
    def with_report_format(*args: object, format_name: str | None, **others: object) -> object:
        given = {f"{name} {format_name}": ReportFormat(format_name)} if format_name else {}
        given |= {flag: form for flag, form in _SHORT_FORMS.items() if others.pop(flag.lstrip("-"))}
        if len(set(given.values())) > 1:
            raise click.UsageError(f"{' and '.join(given)} exclude each other")
        return command(*args, report_format=next(iter(given.values()), ReportFormat.TABLE), **others)

    choice = click.Choice([form.value for form in ReportFormat])
    option = click.option(name, "format_name", type=choice, help=_FORMAT_HELP)
    return add_options(with_report_format, option, *_short_options)
