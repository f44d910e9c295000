"""``$ ckpt remap``."""

from __future__ import annotations

import contextlib

import click

from ckptkit.cli.options import about, opened, path_argument
from ckptkit.cli.outputs import Job, carry_out, output_options, planned
from ckptkit.cli.rules import rule_options
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.formats import open_checkpoint
from ckptkit.plans.plan import Plan
from ckptkit.plans.remap import plan_remap
from ckptkit.rules.model import Rules

__all__ = ["remap"]


@click.command()
@path_argument("source")
@output_options
@rule_options(beside="source")
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors, as in BF16 or bfloat16.")
@click.option("--like", type=click.Path(), metavar="EXPECTED",
              help="Write exactly the keys, shapes and dtypes of EXPECTED; refuse what cannot be filled.")  # fmt: skip
@click.option("--apply", "apply_file", type=click.Path(), metavar="FILE", help="Do what a --plan FILE says again.")
@click.option("--invert", "invert_file", type=click.Path(), metavar="FILE",
              help="Undo what a --plan FILE says: SOURCE is its output.")  # fmt: skip
def remap(
    source: str, *, job: Job, rules: Rules, dtype: str | None, like: str | None, apply_file: str | None,
    invert_file: str | None,
) -> None:  # fmt: skip
    """Rename, keep, drop and cast the tensors of a checkpoint, and write the rest.

    A pattern fits the whole key: * is any run of characters, {name} one segment, {i:int} a segment of
    digits; re:... is a regex. Two keys with one new name, and a rule that matches nothing, are errors.
    A torch file made of a torch file keeps what else is in it (epoch, optimizer), unless --only-tensors.

    \b
    ckpt remap ddp.pt -o plain.safetensors --rename 'module.*=*'
    ckpt remap model.safetensors -o encoder.safetensors --keep 'encoder.*' --dry-run
    ckpt remap a.pt -o b.pt --rename 'h.{i:int}.*=layers.{i+1}.*'
    ckpt remap hf.safetensors -o mine.safetensors --rules mine.toml --plan plan.json
    ckpt remap mine.safetensors -o hf.safetensors --invert plan.json
    """  # noqa: D301 - \b is click's mark
    with opened(source, quiet=job.quiet) as (checkpoint,):
        if apply_file is None and invert_file is None:
            plan = _plan(checkpoint, source, rules, dtype, like)
        else:
            if rules.stages or dtype or like or (apply_file and invert_file):
                raise click.UsageError("--apply and --invert each take the whole plan from a file: give nothing else")
            plan = planned({"source": checkpoint}, apply_file=apply_file, invert_file=invert_file)
        carry_out("remap", plan, {"source": checkpoint}, job)


def _plan(checkpoint: Checkpoint, source: str, rules: Rules, dtype: str | None, like: str | None) -> Plan:
    with contextlib.ExitStack() as stack:
        wanted = None if like is None else stack.enter_context(open_checkpoint(like))
        with about(source):
            return plan_remap(checkpoint, rules, dtype=dtype, like=wanted)
