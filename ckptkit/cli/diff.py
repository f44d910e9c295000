"""The command ``ckpt diff``."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.completing import complete_expected_keys
from ckptkit.cli.common.inputs import note_what_is_beside, open_checkpoints
from ckptkit.cli.common.options import (
    dequantize_option,
    expand_option,
    numbers_dtype_option,
    path_argument,
    quiet_option,
    report_options,
    requirement_options,
)
from ckptkit.cli.common.options.engines import Engine, engine_options
from ckptkit.cli.common.options.html_report import html_option, printed_in_any_case, write_html
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, print_message, progress_bar
from ckptkit.comparison import StateDictDiff
from ckptkit.comparison import diff as compare
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.checkpoint.stored import has_stored_bytes
from ckptkit.core.config_files import default_error_path
from ckptkit.formats.writing.state import Target
from ckptkit.quantized.view import DequantizeLike
from ckptkit.render.diff import answers_first, hints_below
from ckptkit.render.values import lists_all
from ckptkit.rules.model import Rules

if TYPE_CHECKING:
    from ckptkit.render.html.histograms import BothSides

__all__ = ["diff"]

_COLOURS = {"+": "green", "-": "red", "~": "yellow", "≈": "yellow"}


def _parse_size(context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    """Return a number of at least 0; click's own range takes NaN."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        if (size := float(text)) >= 0:
            return size
    raise click.BadParameter(f"{text!r} is not a number of at least 0, such as 1e-5.", context, option)


@click.command(cls=Command, first=("--values", "--rename", "--rules"))
@path_argument("expected")
@path_argument("found")
@rule_options(beside="found", or_beside="expected")
@requirement_options
@click.option("--values", is_flag=True, help="Compare the values too: read both sides once.")
@dequantize_option
@numbers_dtype_option
@click.option(
    "--rtol", callback=_parse_size, metavar="X", help="Compare values, and allow differences relative to EXPECTED."
)
@click.option("--atol", callback=_parse_size, metavar="X", help="Compare values, and allow absolute differences.")
@click.option(
    "--expect-frozen", multiple=True, metavar="PATTERN", shell_complete=complete_expected_keys,
    help="Gate: the values of these keys are equal. Repeatable.",
)  # fmt: skip
@click.option(
    "--expect-changed", multiple=True, metavar="PATTERN", shell_complete=complete_expected_keys,
    help="Gate: the values of each of these keys differ. Repeatable.",
)  # fmt: skip
@click.option(
    "--max-rel-l2", callback=_parse_size, metavar="X", help="Gate: no tensor changes by more, relative to its norm."
)
@click.option(
    "--depth", type=click.IntRange(0), help="Compare values, and list modules down to this depth, not tensors."
)
@engine_options
@click.option("-a", "--all", "everything", is_flag=True, help="List matched keys too.")
@expand_option
@html_option
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
    values: bool,
    dequantize: bool,
    dtype: str | None,
    rtol: float | None,
    atol: float | None,
    expect_frozen: tuple[str, ...],
    expect_changed: tuple[str, ...],
    max_rel_l2: float | None,
    depth: int | None,
    engine: Engine,
    everything: bool,
    expand: bool,
    html: Target | None,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Compare the tensors that a model expects with those that a checkpoint has.

    EXPECTED is the model or a checkpoint of it, FOUND the checkpoint to load. The rules rename and filter the keys of
    FOUND first: a key that --keep or --drop leaves out is missing, and does not count for gates. No tensor is read
    without --values, or an option that needs values. Exit code 0 if nothing differs and
    every requirement is met, else 1. With a gate on values, differences do not count: 0 if all gates hold, else 1.

    \b
    ckpt diff py:mynet:build pretrained.pth
    ckpt diff base.safetensors run.ckpt --strip auto
    ckpt diff base.safetensors run.ckpt --rename 'h.*=layers.*'
    ckpt diff base.safetensors tuned.safetensors --values
    ckpt diff base.safetensors tuned.safetensors --expect-frozen 'backbone.*'
    """  # noqa: D301 - \b is click's mark
    if dtype is not None and not dequantize:
        raise click.UsageError("--dtype has no meaning without --dequantize")
    with open_checkpoints(expected, found, quiet=quiet) as (left, right):
        with default_error_path(found):
            has_gates = bool(expect_frozen or expect_changed) or max_rel_l2 is not None
            values = values or depth is not None
            reads = values or has_gates or rtol is not None or atol is not None
            size = (
                sum(info.nbytes for info in (*left.values(), *right.values()) if has_stored_bytes(info)) if reads else 0
            )
            engine = engine if reads else Engine()
            with engine.executor() as executor, progress_bar(size, "comparing", hidden=quiet or not reads) as progress:
                result = compare(
                    engine.input(expected, left), engine.input(found, right), rules, require=require,
                    min_coverage=min_coverage, values=values,
                    dequantize=dtype or dequantize, rtol=rtol, atol=atol, expect_frozen=expect_frozen,
                    expect_changed=expect_changed, max_rel_l2=max_rel_l2, progress=progress, executor=executor,
                )  # fmt: skip
        is_all = expand or everything
        if reads:
            for side in (left, right):
                note_what_is_beside(side, "compared", quiet=quiet)
        is_answered = answers_first(result, expand=expand, everything=everything)
        echo = partial(
            echo_result, report_format, result, colours=_COLOURS, expand=expand, everything=everything,
            with_hints=is_answered and not quiet, depth=depth,
        )  # fmt: skip
        with printed_in_any_case(echo):
            if html is not None:
                both = _both_sides(result, left, right, dequantize=dtype or dequantize, quiet=quiet)
                write_html(html, result, quiet=quiet, both_sides=both)
        if not quiet:
            # The JSON document and the beginning of the page have them.
            hints = () if report_format is ReportFormat.JSON or is_answered else hints_below(result)
            if report_format in (ReportFormat.TABLE, ReportFormat.PLAIN, ReportFormat.GITHUB):
                if is_answered:
                    print_message("ckpt: --expand lists every key")
                elif not (
                    is_all or depth is not None or has_gates or result.values is None or lists_all(result.values)
                ):
                    print_message("ckpt: --expand lists every tensor, and --depth N every module down to a depth")
            for message in (*result.notes, *(f"hint: {hint.message}" for hint in hints)):
                print_message(message)
    context.exit(0 if result.ok else 1)


def _both_sides(
    result: StateDictDiff, left: Checkpoint, right: Checkpoint, *, dequantize: DequantizeLike, quiet: bool
) -> BothSides | None:
    """Return the statistics of both sides of the tensors whose values differ, which are read once more for them."""
    if result.values is None:
        return None
    from ckptkit.render.html.histograms import MOST_TENSORS, BothSides
    from ckptkit.statistics.state_dict_stats import stats_of_keys

    worst = result.values.different[:MOST_TENSORS]
    size = sum(one.expected.nbytes + one.found.nbytes for one in worst)
    with progress_bar(size, "measuring", hidden=quiet) as progress:
        measured = [
            stats_of_keys(side, keys, dequantize=dequantize, progress=progress)
            for side, keys in ((left, [one.expected.key for one in worst]), (right, [one.found.key for one in worst]))
        ]
    return BothSides.of(result.values, *measured)
