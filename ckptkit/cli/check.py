"""The command ``ckpt check``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import click

from ckptkit.checks import run_checks
from ckptkit.checks.reading import unreadable_finding
from ckptkit.checks.report import CheckReport, merge_reports
from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import PATH_TYPE, ignore_option, path_argument, quiet_option, report_options
from ckptkit.cli.common.options.engines import Engine, engine_options
from ckptkit.cli.common.options.html_report import html_option, printed_in_any_case, write_html
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, exit_code, progress_bar
from ckptkit.cli.common.wildcards import expand_wildcards
from ckptkit.core.config_files import default_error_path
from ckptkit.core.files.places import size_at
from ckptkit.core.findings.codes import IGNORE_UNUSED
from ckptkit.core.findings.ignoring import IgnoreEntry, ignore_findings, parse_ignore
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.errors import CkptkitError, RuleError
from ckptkit.formats.writing.state import Target
from ckptkit.rules.model import Rules

__all__ = ["check"]


@click.command(cls=Command, first=("--like", "--no-values", "--fast"))
@path_argument("paths", nargs=-1, metavar="PATH...")
@click.option("--like", "expected", type=PATH_TYPE, metavar="EXPECTED",
              help="Also compare keys, shapes and dtypes with this model, as ckpt diff does.")  # fmt: skip
@rule_options(beside="paths", or_beside="expected")
@click.option("--fast", is_flag=True, help="Read headers only: no tensor, no checksum.")
@click.option("--no-values", is_flag=True, help="Check bytes and checksums only, not numbers.")
@ignore_option
@engine_options
@html_option
@report_options
@quiet_option
@click.pass_context
def check(
    context: click.Context,
    paths: tuple[str, ...],
    *,
    expected: str | None,
    rules: Rules,
    fast: bool,
    no_values: bool,
    ignore: tuple[str, ...],
    engine: Engine,
    html: Target | None,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Read every stored byte of checkpoints, and report what is damaged or unusual.

    Compares checksums if the file has them. Finds gaps in the names, such as one missing layer or half of an adapter.
    --like also compares with the model, after the rules have renamed the keys. The report also names what was not
    checked. Exit code 0 if there are only notes, 1 for errors and warnings. If one of several paths cannot be opened,
    that is an error in the report, and the exit code is 2.

    \b
    ckpt check run.ckpt
    ckpt check --fast downloads/*.safetensors
    ckpt check --like py:mynet:build --strip auto run.ckpt
    """  # noqa: D301 - \b is click's mark
    paths = expand_wildcards(paths)
    entries = parse_ignore(ignore)
    with contextlib.ExitStack() as stack:
        like = stack.enter_context(open_checkpoints(expected, quiet=quiet))[0] if expected is not None else None
        engine = Engine() if fast else engine
        run = partial(
            run_checks, rules=rules, like=like, fast=fast, values=not no_values, ignore=ignore,
            executor=stack.enter_context(engine.executor()),
        )  # fmt: skip
        # The page of a job shows only what is in a report.
        reported = len(paths) > 1 or report_format is ReportFormat.ACTIONS
        checked, unopened = _check_all(paths, run, entries, engine, reported=reported, hidden=fast or quiet)
        report = merge_reports(_without_used_entries(checked))
    with printed_in_any_case(partial(echo_result, report_format, report)):
        write_html(html, report, quiet=quiet)
    context.exit(2 if unopened else exit_code(report))


def _check_all(
    paths: tuple[str, ...],
    run: Callable[..., CheckReport],
    ignore: Sequence[IgnoreEntry],
    engine: Engine,
    *,
    reported: bool,
    hidden: bool,
) -> tuple[list[CheckReport], bool]:
    """Return the findings at each path, and whether one could not be opened, which raises unless it is ``reported``."""
    checked: list[CheckReport] = []
    unopened = False
    for path in paths:
        try:
            with open_checkpoints(path, quiet=True) as (checkpoint,), default_error_path(path):
                size = sum(map(size_at, checkpoint.files))
                with progress_bar(size, "reading", hidden=hidden) as progress:
                    checked.append(run(engine.input(path, checkpoint), progress=progress))
        except CkptkitError as error:
            if not reported or isinstance(error, RuleError):
                raise
            report = CheckReport((unreadable_finding(error, path),), checkpoint=CheckpointSummary(path))
            checked.append(ignore_findings(report, ignore))
            unopened = True
    return checked, unopened


def _without_used_entries(checked: list[CheckReport]) -> list[CheckReport]:
    """Return the findings without the notes about entries of --ignore that left a finding out at another path."""

    def unused(report: CheckReport) -> set[str]:
        return {finding.key for finding in report.findings if finding.code == IGNORE_UNUSED.name}

    everywhere = set.intersection(*map(unused, checked)) if checked else set()
    return [
        replace(
            report,
            findings=tuple(
                finding
                for finding in report.findings
                if finding.code != IGNORE_UNUSED.name or finding.key in everywhere
            ),
        )
        for report in checked
    ]
