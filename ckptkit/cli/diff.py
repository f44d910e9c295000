"""The command ``ckpt diff``."""

from __future__ import annotations

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import expand_option, path_argument, quiet_option, report_options, requirement_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, print_message
from ckptkit.cli.common.rule_options import rule_options
from ckptkit.comparison import diff as compare
from ckptkit.core.config_files import default_error_path
from ckptkit.render.diff import answers_first
from ckptkit.rules.model import Rules

__all__ = ["diff"]

_COLOURS = {"+": "green", "-": "red", "~": "yellow", "≈": "yellow"}


@click.command(cls=Command, first=("--rename", "--strip", "--rules"))
@path_argument("expected")
@path_argument("found")
@rule_options(beside="found", or_beside="expected")
@requirement_options
@click.option("-a", "--all", "everything", is_flag=True, help="List matched keys too.")
@expand_option
@report_options
@quiet_option
@click.pass_context
def diff(
    context: click.Context,
    expected: str,
    found: str,
    *,
    rules: Rules,
    require: tuple[str, ...],
    min_coverage: float,
    everything: bool,
    expand: bool,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Compare the tensors that a model expects with those that a checkpoint has.

    EXPECTED is the model or a checkpoint of it, FOUND the checkpoint to load. The rules rename and filter the keys of
    FOUND first. No tensor is read. Exit code 0 if nothing differs and every requirement is met, else 1.

    \b
    ckpt diff py:mynet:build pretrained.pth
    ckpt diff base.safetensors run.ckpt --strip auto
    ckpt diff base.safetensors run.ckpt --rename 'h.*=layers.*'
    """  # noqa: D301 - \b is click's mark
    with open_checkpoints(expected, found, quiet=quiet) as (left, right):
        with default_error_path(found):
            result = compare(left, right, rules, require=require, min_coverage=min_coverage)
        is_answered = answers_first(result, expand=expand, everything=everything)
        echo_result(
            report_format,
            result,
            colours=_COLOURS,
            expand=expand,
            everything=everything,
            with_hints=is_answered and not quiet,
        )
        if not quiet:
            # The JSON document and the beginning of the page have them.
            hints = () if report_format is ReportFormat.JSON or is_answered else result.hints
            if is_answered and report_format is not ReportFormat.JSON:
                print_message("ckpt: --expand lists every key")
            for message in (*result.notes, *(f"hint: {hint.message}" for hint in hints)):
                print_message(message)
    context.exit(1 if result.different or result.unmet else 0)
