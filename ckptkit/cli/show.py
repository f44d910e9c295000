"""The command ``ckpt show``."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import NoReturn

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import expand_option, filter_options, path_argument, quiet_option, report_options
from ckptkit.cli.common.printing import ReportFormat, echo_report, echo_result, print_message, progress_bar
from ckptkit.cli.common.wildcards import expand_wildcards
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.checkpoint.provenance import DELTA, PROVENANCE, provenance_beside
from ckptkit.core.checkpoint.stored import has_stored_bytes
from ckptkit.core.config_files import default_error_path, read_text_file
from ckptkit.core.files.places import is_url
from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError, RuleError
from ckptkit.formats import codes

__all__ = ["show"]


@click.command(cls=Command, first=("--tree", "--digests", "--keep", "--drop"))
@path_argument("paths", nargs=-1, metavar="PATH...")
@filter_options
@click.option("--tree", is_flag=True, help="Print modules as a tree, with the size of each.")
@click.option("--digests", is_flag=True, help="Read all tensors, and print a hash of each, as ckpt digest does.")
@expand_option
@report_options
@quiet_option
@click.pass_context
def show(
    context: click.Context,
    paths: tuple[str, ...],
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

    Of a patch, it prints what changed. Reads headers only, but for --digests. Does not import or run any code that the
    file names. Several paths are listed with one row each; if one of them cannot be read, the exit code is 2.

    \b
    ckpt show model.safetensors
    ckpt show checkpoints/*
    ckpt show run.ckpt --tree --keep 'encoder.*'
    ckpt show run.ckpt::optimizer --json
    """  # noqa: D301 - \b is click's mark
    paths = expand_wildcards(paths)
    if len(paths) > 1:
        if tree or digests:
            raise click.UsageError("--tree and --digests are for one PATH")
        _show_several(context, paths, keep, drop, report_format=report_format, quiet=quiet)
    (path,) = paths
    is_whole = not tree and not digests
    expected = [codes.PATCH] if is_whole else []  # the page says it
    with (
        open_checkpoints(path, quiet=quiet, listing_parts=True, expected=expected) as (checkpoint,),
        default_error_path(path),
    ):
        chosen: dict[str, object] = {"infos": _chosen(checkpoint, keep, drop)} if keep or drop else {}
        if (merge := _merge_beside(checkpoint)) is not None:
            chosen["merge"] = merge
        if DELTA in checkpoint.metadata and is_whole:
            from ckptkit.deltas.delta import delta_of_patch

            chosen["delta"] = delta_of_patch(checkpoint)
        if digests:
            chosen["digests"] = _digests(checkpoint, _chosen(checkpoint, keep, drop), quiet=quiet)
        echo_result(report_format, checkpoint, chosen=chosen, tree=tree, expand=expand)


def _show_several(
    context: click.Context,
    paths: tuple[str, ...],
    keep: tuple[str, ...],
    drop: tuple[str, ...],
    *,
    report_format: ReportFormat,
    quiet: bool,
) -> NoReturn:
    """List several checkpoints, then say why some cannot be read, and exit."""
    from ckptkit.render.show.several import ListedCheckpoint, listing_document, listing_page

    listed, names = [], set[str]()
    for path in paths:
        try:
            with open_checkpoints(path, quiet=quiet, listing_parts=True) as (checkpoint,):
                infos = _chosen(checkpoint, keep, drop, allow_unused=True) if keep or drop else checkpoint
                listed.append(ListedCheckpoint.of(checkpoint, infos))
                names.update(checkpoint if keep or drop else ())
        except RuleError:
            raise
        except CkptkitError as error:
            listed.append(ListedCheckpoint(path, error=error))
    if names:
        _refuse_unused(names, keep, drop)
    echo_report(report_format, lambda: listing_page(listed), lambda: listing_document(listed))
    errors = [(row.path, row.error) for row in listed if row.error is not None]
    for path, found in errors:
        print_message(f"ckpt: {printable(found.path or path)}: {found.reason}")
        if found.hint:
            print_message(f"hint: {found.hint}")
    context.exit(2 if errors else 0)


def _merge_beside(checkpoint: Checkpoint) -> Mapping[str, object] | None:
    """Return what the file beside a local checkpoint says about the merge that made it; None if it cannot be read."""
    if PROVENANCE in checkpoint.metadata or is_url(checkpoint.path):
        return None
    beside = provenance_beside(checkpoint)
    if beside is None:
        return None
    from ckptkit.render.merging.recorded import recorded_in

    with contextlib.suppress(CkptkitError):
        return recorded_in({PROVENANCE: read_text_file(beside, "json")})
    return None


def _chosen(
    checkpoint: Checkpoint, keep: tuple[str, ...], drop: tuple[str, ...], *, allow_unused: bool = False
) -> Mapping[str, TensorInfo]:
    from ckptkit.rules.apply import apply_rules  # a third of the time that the command takes for a small file
    from ckptkit.rules.parse import parse_rules

    rules = parse_rules(keep=keep, drop=drop, allow_unused=allow_unused)
    return {key: checkpoint[key] for key in apply_rules(rules, checkpoint).renamed}


def _refuse_unused(names: Collection[str], keep: tuple[str, ...], drop: tuple[str, ...]) -> None:
    """Raise ``RuleError`` for a pattern that matches no key of any checkpoint."""
    from ckptkit.rules.apply import apply_rules
    from ckptkit.rules.parse import parse_rules

    apply_rules(parse_rules(keep=keep, drop=drop), names)


def _digests(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], *, quiet: bool) -> Mapping[str, str]:
    """Return the digest of each tensor whose bytes can be read."""
    from ckptkit.digests import digests_by_key

    dense = {key: info.nbytes for key, info in infos.items() if has_stored_bytes(info)}
    with progress_bar(sum(dense.values()), "reading", hidden=quiet) as progress:
        found = digests_by_key(checkpoint, dense, progress=progress)
    checkpoint.check_unchanged()
    return found
