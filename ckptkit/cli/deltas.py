"""The commands ``ckpt delta`` and ``ckpt apply``."""

from __future__ import annotations

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import PATH_TYPE, expand_option, path_argument, quiet_option, report_options
from ckptkit.cli.common.outputs import OutputOptions, applied_output_options, run_plan
from ckptkit.cli.common.printing import ReportFormat, echo_result, print_message, progress_bar
from ckptkit.core.checkpoint.stored import has_stored_bytes
from ckptkit.core.config_files import default_error_path
from ckptkit.core.text import human_bytes, printable
from ckptkit.deltas.making import make_delta
from ckptkit.deltas.planning import BASE, PATCH, plan_of_patch
from ckptkit.formats import codes
from ckptkit.values.delta.coding import COMPRESSIONS, Compression

__all__ = ["apply", "delta"]


@click.command(cls=Command, first=("--output", "--dry-run", "--compression", "--only-tensors", "--force"))
@path_argument("base")
@path_argument("new")
@click.option("-o", "--output", type=PATH_TYPE, metavar="PATCH", help="The patch to write, a safetensors file.")
@click.option("-n", "--dry-run", is_flag=True, help="Pack everything, and print how large the patch would be.")
@click.option("--compression", type=click.Choice(COMPRESSIONS), default="zlib",
              help="zlib (the default): any Python can apply it. zstd: faster, needs the extra [fast].")  # fmt: skip
@click.option("--only-tensors", is_flag=True, help="Leave out what is not a tensor in NEW, such as the epoch.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@expand_option
@report_options
@quiet_option
def delta(
    base: str,
    new: str,
    *,
    output: str | None,
    dry_run: bool,
    compression: Compression,
    only_tensors: bool,
    force: bool,
    expand: bool,
    report_format: ReportFormat,
    quiet: bool,
) -> None:
    """Write a patch that makes NEW of BASE, bit by bit: what changed, compressed, and the digest of each tensor.

    Equal tensors cost nothing, so a patch of a tuned model is smaller than the model. The formats of both sides may
    differ. Before the patch gets its name, each tensor in it was made once and compared. ckpt show PATCH prints what a
    patch holds, and the digest of its base.

    \b
    ckpt delta base.safetensors tuned.safetensors -o patch.safetensors
    ckpt delta llama/ llama-tuned/ -o patch.safetensors --compression zstd
    ckpt delta base.pt tuned.pt --dry-run
    """  # noqa: D301 - \b is click's mark
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o': name the patch, or give --dry-run")
    with open_checkpoints(base, new, quiet=quiet) as (old, latest):
        both = [info.nbytes for checkpoint in (old, latest) for info in checkpoint.values() if has_stored_bytes(info)]
        packed = 2 * sum(info.nbytes for info in latest.values() if has_stored_bytes(info))
        with progress_bar(sum(both) + packed, "comparing", hidden=quiet) as progress:
            made = make_delta(
                old,
                latest,
                None if dry_run else output,
                compression=compression,
                only_tensors=only_tensors,
                force=force,
                progress=progress,
            )
    echo_result(report_format, made, expand=expand)
    if made.path and not quiet:
        print_message(f"wrote {printable(made.path)}: {human_bytes(made.nbytes)}")


@click.command(cls=Command, first=("--output", "--format", "--max-shard-size", "--force", "--verify"))
@path_argument("base")
@path_argument("patch")
@applied_output_options
def apply(base: str, patch: str, *, options: OutputOptions) -> None:
    """Make the checkpoint of which ckpt delta wrote a patch, of its base and the patch, bit by bit.

    Every tensor is hashed while it is written, and the output gets its name only if each has the recorded digest.
    Another base is refused, and so is a damaged patch. The base may have another format or other shards than when the
    patch was made.

    \b
    ckpt apply base.safetensors patch.safetensors -o tuned.safetensors
    ckpt apply llama/ patch.safetensors -o llama-tuned --max-shard-size 5GB
    ckpt apply s3://BUCKET/base.safetensors patch.safetensors -o tuned.pt --verify
    """  # noqa: D301 - \b is click's mark
    with open_checkpoints(base, patch, quiet=options.quiet, expected=[codes.PATCH]) as (old, packed):
        with default_error_path(patch):
            plan = plan_of_patch(old, packed)
        run_plan(plan, {BASE: old, PATCH: packed}, {BASE: base, PATCH: patch}, options)
