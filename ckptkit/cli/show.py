"""The command ``ckpt show``."""

from __future__ import annotations

from collections.abc import Mapping

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import expand_option, filter_options, path_argument, quiet_option, report_options
from ckptkit.cli.common.printing import ReportFormat, echo_result, progress_bar
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.config_files import default_error_path

__all__ = ["show"]


@click.command(cls=Command, first=("--tree", "--digests", "--keep", "--drop"))
@path_argument("path")
@filter_options
@click.option("--tree", is_flag=True, help="Print modules as a tree, with the size of each.")
@click.option("--digests", is_flag=True, help="Read all tensors, and print a hash of each, as ckpt digest does.")
@expand_option
@report_options
@quiet_option
def show(
    path: str,
    *,
    keep: tuple[str, ...],
    drop: tuple[str, ...],
    tree: bool,
    digests: bool,
    expand: bool,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Show the content of a checkpoint: tensors, other entries, metadata and warnings.

    Reads headers only, but for --digests. Does not import or run any code that the file names.

    \b
    ckpt show model.safetensors
    ckpt show run.ckpt --tree --keep 'encoder.*'
    ckpt show run.ckpt::optimizer --json
    """  # noqa: D301 - \b is click's mark
    with open_checkpoints(path, quiet=quiet, listing_parts=True) as (checkpoint,), default_error_path(path):
        chosen: dict[str, object] = {"infos": _chosen(checkpoint, keep, drop)} if keep or drop else {}
        if digests:
            chosen["digests"] = _digests(checkpoint, _chosen(checkpoint, keep, drop), quiet=quiet)
        echo_result(report_format, checkpoint, chosen=chosen, tree=tree, expand=expand)


def _chosen(checkpoint: Checkpoint, keep: tuple[str, ...], drop: tuple[str, ...]) -> dict[str, TensorInfo]:
    from ckptkit.rules.apply import apply_rules  # a third of the time that the command takes for a small file
    from ckptkit.rules.parse import parse_rules

    return {key: checkpoint[key] for key in apply_rules(parse_rules(keep=keep, drop=drop), checkpoint).renamed}


def _digests(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], *, quiet: bool) -> Mapping[str, str]:
    """Return the digest of each tensor whose bytes can be read."""
    from ckptkit.digests import digests_by_key, has_digest

    dense = {key: info.nbytes for key, info in infos.items() if has_digest(info)}
    with progress_bar(sum(dense.values()), "reading", hidden=quiet) as progress:
        found = digests_by_key(checkpoint, dense, progress=progress)
    checkpoint.check_unchanged()
    return found
