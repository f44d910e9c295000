"""The command ``ckpt remap``."""

from __future__ import annotations

import contextlib

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import PATH_TYPE, dequantize_option, path_argument, skip_unread_option
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.outputs import OutputOptions, plan_output_options, quantize_option, run_plan
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import default_error_path
from ckptkit.plans.plan import Plan
from ckptkit.plans.quantized.as_codes import QuantizeLike
from ckptkit.plans.remap import plan_remap
from ckptkit.rules.model import Rules

__all__ = ["remap"]


@click.command(cls=Command, first=("--rename", "--keep", "--like"))
@path_argument("source")
@plan_output_options
@rule_options(beside="source", or_beside="like")
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors, for example to BF16 or bfloat16.")
@dequantize_option
@quantize_option
@click.option("--like", type=PATH_TYPE, metavar="EXPECTED",
              help="Write exactly the keys, shapes and dtypes of EXPECTED, or refuse.")  # fmt: skip
@skip_unread_option
@click.option("--apply", "apply_file", type=PATH_TYPE, metavar="FILE", help="Apply the plan in a --plan FILE again.")
@click.option("--invert", "invert_file", type=PATH_TYPE, metavar="FILE",
              help="Undo the plan in a --plan FILE; SOURCE is its output.")  # fmt: skip
def remap(
    source: str,
    *,
    options: OutputOptions,
    rules: Rules,
    dtype: str | None,
    dequantize: bool,
    quantize: QuantizeLike | None,
    like: str | None,
    apply_file: str | None,
    invert_file: str | None,
    skip_unread: bool,
) -> None:
    """Rename, keep, drop and cast the tensors of a checkpoint, and write the result.

    A pattern must match the whole key: * matches any characters, {name} one segment, {i:int} a segment of digits;
    re:... is a regular expression. A rule that matches nothing is an error, and so are two keys with one new name.
    A torch file made from a torch file keeps its other entries (epoch, optimizer), unless --only-tensors.

    \b
    ckpt remap ddp.pt -o plain.safetensors --rename 'module.*=*'
    ckpt remap model.safetensors -o encoder.safetensors --keep 'encoder.*' --dry-run
    ckpt remap a.pt -o b.pt --rename 'h.{i:int}.*=layers.{i+1}.*'
    ckpt remap hf.safetensors -o mine.safetensors --rules mine.toml --plan plan.json
    ckpt remap mine.safetensors -o hf.safetensors --invert plan.json
    """  # noqa: D301 - \b is click's mark
    with open_checkpoints(source, quiet=options.quiet) as (checkpoint,):
        plan_file = invert_file if apply_file is None else apply_file
        if plan_file is None:
            plan = _plan(
                checkpoint, source, rules, dtype, like,
                dequantize=dequantize, quantize=quantize, skip_unread=skip_unread, quiet=options.quiet,
            )  # fmt: skip
        else:
            if (
                rules.stages
                or dtype
                or dequantize
                or quantize
                or like
                or skip_unread
                or (apply_file is not None and invert_file is not None)
            ):
                raise click.UsageError("--apply and --invert each read the whole plan from a file: give nothing else")
            from ckptkit.plans.saved import load_plan

            plan = load_plan(plan_file, {"source": checkpoint}, invert=apply_file is None)
        run_plan(plan, {"source": checkpoint}, {"source": source}, options)


def _plan(
    checkpoint: Checkpoint,
    source: str,
    rules: Rules,
    dtype: str | None,
    like: str | None,
    *,
    dequantize: bool,
    quantize: QuantizeLike | None,
    skip_unread: bool,
    quiet: bool,
) -> Plan:
    with contextlib.ExitStack() as stack:
        expected = None if like is None else stack.enter_context(open_checkpoints(like, quiet=quiet))[0]
        with default_error_path(source):
            return plan_remap(
                checkpoint,
                rules,
                dtype=dtype,
                dequantize=dequantize,
                quantize=quantize,
                like=expected,
                skip_unread=skip_unread,
            )
