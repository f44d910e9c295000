"""The command ``ckpt stats``."""

from __future__ import annotations

from functools import partial

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import (
    dequantize_option,
    expand_option,
    filter_options,
    numbers_dtype_option,
    path_argument,
    quiet_option,
    report_options,
)
from ckptkit.cli.common.options.engines import Engine, engine_options
from ckptkit.cli.common.options.html_report import html_option, printed_in_any_case, write_html
from ckptkit.cli.common.printing import ReportFormat, echo_result, progress_bar
from ckptkit.core.config_files import default_error_path
from ckptkit.formats.writing.state import Target
from ckptkit.render.stats import SORT_KEYS, StatsView
from ckptkit.rules.parse import parse_rules
from ckptkit.statistics.state_dict_stats import stats as stats_of

__all__ = ["stats"]


@click.command(cls=Command, first=("--depth", "--sort", "--top"))
@path_argument("path")
@filter_options
@click.option("--depth", type=click.IntRange(0), help="List modules down to this depth instead of tensors.")
@click.option(
    "--sort", type=click.Choice(list(SORT_KEYS)), help="Sort by magnitude, largest first. Default: file order."
)
@click.option("--top", type=click.IntRange(1), metavar="N", help="List the first N only.")
@dequantize_option
@numbers_dtype_option
@engine_options
@expand_option
@html_option
@report_options
@quiet_option
def stats(
    path: str,
    *,
    keep: tuple[str, ...],
    drop: tuple[str, ...],
    depth: int | None,
    sort: str | None,
    top: int | None,
    dequantize: bool,
    dtype: str | None,
    engine: Engine,
    expand: bool,
    html: Target | None,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Show statistics of each tensor: mean, deviation, extremes, norms, zeros, NaN, Inf and a histogram.

    Reads every tensor once, in pieces, and sums in float64. Mean, deviation, extremes and norms cover the finite
    numbers only. The histogram counts magnitudes by powers of two.

    \b
    ckpt stats model.safetensors --depth 2
    ckpt stats run.ckpt --sort abs-max --top 10
    """  # noqa: D301 - \b is click's mark
    if dtype is not None and not dequantize:
        raise click.UsageError("--dtype has no meaning without --dequantize")
    with open_checkpoints(path, quiet=quiet) as (checkpoint,), default_error_path(path):
        size = sum(info.nbytes for info in checkpoint.values() if info.kind == "dense")
        with engine.executor() as executor, progress_bar(size, "reading", hidden=quiet) as progress:
            result = stats_of(
                engine.input(path, checkpoint), parse_rules(keep=keep, drop=drop),
                dequantize=dtype or dequantize, progress=progress, executor=executor,
            )  # fmt: skip
        view = StatsView(depth, sort, top)
        echo = partial(echo_result, report_format, result, chosen={"view": view}, expand=expand or sort is not None)
        with printed_in_any_case(echo):
            write_html(html, result, quiet=quiet, chosen={"view": view})
