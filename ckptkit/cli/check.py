"""``$ ckpt check``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial

import click

from ckptkit.checks import run_checks
from ckptkit.checks.reading import unreadable_finding
from ckptkit.cli.options import (
    Form,
    about,
    echo_report,
    exit_code,
    form_options,
    opened,
    path_argument,
    progress_bar,
    quiet_option,
)
from ckptkit.cli.rules import rule_options
from ckptkit.core.findings import Report
from ckptkit.errors import CkptkitError, RuleError
from ckptkit.render.findings import Checked, findings_by_path, findings_document, in_one
from ckptkit.render.page import code
from ckptkit.render.show import describe, totals
from ckptkit.rules.model import Rules

__all__ = ["check"]


@click.command()
@path_argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--like", "expected", type=click.Path(), metavar="EXPECTED",
              help="Compare keys, shapes and dtypes with what a model expects, as ckpt diff does.")  # fmt: skip
@rule_options(beside="paths")
@click.option("--fast", is_flag=True, help="Read headers only: no tensor byte, no checksum, no number.")
@click.option("--no-values", is_flag=True, help="Judge no numbers: bytes and checksums alone, without torch.")
@form_options
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
    form: Form,
    quiet: bool,
) -> None:
    """Read every stored byte of checkpoints, and say what is damaged or odd.

    Checksums are compared where a file has them, and names with each other: a layer that is missing among others,
    half of an adapter. With --like also with what a model expects, after the rules have renamed the keys. What was
    not looked at is said too. Exit code 0 where there are only notes, 1 for errors and warnings. Of several paths,
    one that cannot be opened is an error among the findings, and ends with 2.

    \b
    ckpt check run.ckpt
    ckpt check --fast downloads/*.safetensors
    ckpt check --like py:mynet:build --strip auto run.ckpt
    """  # noqa: D301 - \b is click's mark
    with contextlib.ExitStack() as stack:
        like = stack.enter_context(opened(expected, quiet=quiet))[0] if expected is not None else None
        run = partial(run_checks, rules=rules, like=like, fast=fast, values=not no_values)
        checked, trouble = _check_all(paths, run, hidden=fast or quiet)
        report = in_one(checked)
    echo_report(form, lambda: findings_by_path(checked), lambda: findings_document(report))
    context.exit(2 if trouble else exit_code(report))


def _check_all(paths: tuple[str, ...], run: Callable[..., Report], *, hidden: bool) -> tuple[list[Checked], bool]:
    """Return what was found at each path, and whether one of several could not be opened."""
    checked: list[Checked] = []
    trouble = False
    for path in paths:
        try:
            with opened(path, quiet=True) as (checkpoint,), about(path):
                title = describe(checkpoint, totals(checkpoint.values()))
                size = sum(os.path.getsize(file) for file in checkpoint.files if os.path.exists(file))
                with progress_bar(size, hidden=hidden) as progress:
                    checked.append(Checked(path, title, run(checkpoint, progress=progress).findings))
        except CkptkitError as error:
            if len(paths) == 1 or isinstance(error, RuleError):
                raise
            checked.append(Checked(path, (code(path),), (unreadable_finding(error, path),)))
            trouble = True
    return checked, trouble
