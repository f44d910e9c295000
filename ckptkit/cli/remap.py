"""``$ ckpt remap``."""

from __future__ import annotations

import click

from ckptkit.cli.options import about, opened, path_argument
from ckptkit.cli.outputs import Job, carry_out, output_options
from ckptkit.cli.rules import rule_options
from ckptkit.remapping import plan_remap
from ckptkit.rules import Rules

__all__ = ["remap"]


@click.command()
@path_argument("source")
@output_options
@rule_options(beside="source")
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors, as in BF16 or bfloat16.")
def remap(source: str, *, job: Job, rules: Rules, dtype: str | None) -> None:
    """Rename, keep, drop and cast the tensors of a checkpoint, and write the rest.

    A pattern fits the whole key: * is any run of characters, {name} one segment, {i:int} a segment of
    digits; re:... is a regex. Two keys with one new name, and a rule that matches nothing, are errors.

    \b
    ckpt remap ddp.pt -o plain.safetensors --rename 'module.*=*'
    ckpt remap model.safetensors -o encoder.safetensors --keep 'encoder.*' --dry-run
    ckpt remap a.pt -o b.pt --rename 'h.{i:int}.*=layers.{i+1}.*'
    """  # noqa: D301 - \b is click's mark
    with opened(source, quiet=job.quiet) as (checkpoint,):
        with about(source):
            plan = plan_remap(checkpoint, rules, dtype=dtype)
        carry_out("remap", plan, {"source": checkpoint}, job)
