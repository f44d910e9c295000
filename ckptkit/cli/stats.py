"""``$ ckpt stats``."""

from __future__ import annotations

import click

from ckptkit.cli.options import (
    Form,
    about,
    echo_report,
    expand_option,
    filter_options,
    form_options,
    opened,
    path_argument,
    progress_bar,
    quiet_option,
)
from ckptkit.render.stats import SORTS, View, stats_document, stats_page
from ckptkit.rules.parse import parse_rules
from ckptkit.statistics.state_dict_stats import stats as stats_of

__all__ = ["stats"]


@click.command()
@path_argument("path")
@filter_options
@click.option("--depth", type=click.IntRange(0), help="Modules down to this depth instead of tensors.")
@click.option("--sort", type=click.Choice(list(SORTS)), help="The largest first, by magnitude; else as in the file.")
@click.option("--top", type=click.IntRange(1), metavar="N", help="Only the first N lines.")
@expand_option
@form_options
@quiet_option
def stats(
    path: str,
    *,
    keep: tuple[str, ...],
    drop: tuple[str, ...],
    depth: int | None,
    sort: str | None,
    top: int | None,
    expand: bool,
    form: Form,
    quiet: bool,
) -> None:
    """Show what the numbers are: mean, deviation, extremes, norms, zeros, NaN, Inf and a histogram for each tensor.

    Every tensor is read once, in pieces, and summed in float64. Mean, deviation, extremes and norms are those of the
    finite numbers. The histogram counts magnitudes by powers of two.

    \b
    ckpt stats model.safetensors --depth 2
    ckpt stats run.ckpt --sort abs-max --top 10
    """  # noqa: D301 - \b is click's mark
    with opened(path, quiet=quiet) as (checkpoint,), about(path):
        size = sum(info.nbytes for info in checkpoint.values() if info.kind == "dense")
        with progress_bar(size, hidden=quiet) as progress:
            result = stats_of(checkpoint, parse_rules(keep=keep, drop=drop), progress=progress)
        view = View(depth, sort, top)
        echo_report(
            form,
            lambda: stats_page(result, checkpoint, view, expand=expand or sort is not None),
            lambda: stats_document(result, checkpoint, view),
        )
