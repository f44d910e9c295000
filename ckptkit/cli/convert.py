"""``$ ckpt convert``."""

from __future__ import annotations

import click

from ckptkit.cli.options import about, opened, path_argument
from ckptkit.cli.outputs import Job, carry_out, output_options
from ckptkit.plans.remap import plan_remap

__all__ = ["convert"]


@click.command()
@path_argument("source")
@output_options
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors, as in BF16 or bfloat16.")
def convert(source: str, *, job: Job, dtype: str | None) -> None:
    """Write a checkpoint in another format, in shards, or with another dtype.

    \b
    ckpt convert pytorch_model.bin -o model.safetensors
    ckpt convert model.safetensors -o sharded --max-shard-size 2GB
    ckpt convert model.safetensors -o half.safetensors --dtype BF16
    """  # noqa: D301 - \b is click's mark
    with opened(source, quiet=job.quiet) as (checkpoint,):
        with about(source):
            plan = plan_remap(checkpoint, dtype=dtype)
        carry_out("convert", plan, {"source": checkpoint}, job)
