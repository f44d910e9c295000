"""The command ``ckpt convert``."""

from __future__ import annotations

from dataclasses import replace

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import path_argument, skip_unread_option
from ckptkit.cli.common.outputs import OutputOptions, plan_output_options, run_plan
from ckptkit.core.config_files import default_error_path
from ckptkit.plans.remap import plan_remap

__all__ = ["convert"]


@click.command(cls=Command, first=("--dtype", "--format", "--max-shard-size"))
@path_argument("source")
@plan_output_options
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors, for example to BF16 or bfloat16.")
@skip_unread_option
def convert(source: str, *, options: OutputOptions, dtype: str | None, skip_unread: bool) -> None:
    """Write a checkpoint in another format, in shards, or with another dtype.

    \b
    ckpt convert pytorch_model.bin -o model.safetensors
    ckpt convert model.safetensors -o sharded --max-shard-size 2GB
    ckpt convert model.safetensors -o half.safetensors --dtype BF16
    ckpt convert llama/ -o half/model.safetensors --dtype BF16 --carry
    ckpt convert model.safetensors -o dcp --format dcp
    """  # noqa: D301 - \b is click's mark
    with open_checkpoints(source, quiet=options.quiet) as (checkpoint,):
        with default_error_path(source):
            plan = replace(plan_remap(checkpoint, dtype=dtype, skip_unread=skip_unread), command="convert")
        run_plan(plan, {"source": checkpoint}, options)
