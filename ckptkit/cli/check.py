"""``$ ckpt check``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import click

from ckptkit.checks import run_checks, unreadable
from ckptkit.cli.options import (
    Form,
    about,
    echo_report,
    exit_code,
    filter_options,
    form_options,
    opened,
    path_argument,
    quiet_option,
)
from ckptkit.errors import CkptkitError, RuleError
from ckptkit.report.findings import Checked, findings_by_path, findings_document, in_one
from ckptkit.report.page import code
from ckptkit.report.show import describe, totals
from ckptkit.rules import Rules, parse_rules
from ckptkit.tensors import Checkpoint

__all__ = ["check"]


@click.command()
@path_argument("paths", nargs=-1, required=True, metavar="PATH...")
@filter_options
@click.option("--fast", is_flag=True, help="Read headers only: no tensor byte, no checksum.")
@form_options
@quiet_option
@click.pass_context
def check(
    context: click.Context,
    paths: tuple[str, ...],
    *,
    keep: tuple[str, ...],
    drop: tuple[str, ...],
    fast: bool,
    form: Form,
    quiet: bool,
) -> None:
    """Read every stored byte of checkpoints, and say what is damaged or odd.

    Checksums are compared where a file has them. What was not looked at is said too. Exit code 0 where there are
    only notes, 1 for errors and warnings. Of several paths, one that cannot be opened is an error among the
    findings, and ends with 2.

    \b
    ckpt check run.ckpt
    ckpt check --fast downloads/*.safetensors
    """  # noqa: D301 - \b is click's mark
    rules = parse_rules(keep=keep, drop=drop)
    checked: list[Checked] = []
    trouble = False
    for path in paths:
        try:
            checked.append(_check(path, rules, fast=fast, quiet=quiet))
        except CkptkitError as error:
            if len(paths) == 1 or isinstance(error, RuleError):
                raise
            checked.append(Checked(path, (code(path),), (unreadable(error, path),)))
            trouble = True
    report = in_one(checked)
    echo_report(form, lambda: findings_by_path(checked), lambda: findings_document(report))
    context.exit(2 if trouble else exit_code(report))


def _check(path: str, rules: Rules, *, fast: bool, quiet: bool) -> Checked:
    with opened(path, quiet=True) as (checkpoint,), about(path):
        title = describe(checkpoint, totals(checkpoint.values()))
        with _progress(checkpoint, hidden=fast or quiet) as progress:
            return Checked(path, title, run_checks(checkpoint, rules, fast=fast, progress=progress).findings)


@contextlib.contextmanager
def _progress(checkpoint: Checkpoint, *, hidden: bool) -> Iterator[Callable[[int], None] | None]:
    if hidden or not sys.stderr.isatty():
        yield None
        return
    size = sum(os.path.getsize(file) for file in checkpoint.files if os.path.exists(file))
    with click.progressbar(length=size, label="reading", file=sys.stderr) as bar:
        yield bar.update
