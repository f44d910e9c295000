"""The command ``ckpt convert``."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import PATH_TYPE, dequantize_option, path_argument, skip_unread_option
from ckptkit.cli.common.outputs import OutputOptions, plan_output_options, quantize_option, run_plan
from ckptkit.core.config_files import default_error_path, json_bytes
from ckptkit.formats import codes
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.plans.adapters.adapter_formats import ADAPTER_FORMATS, AdapterFormat
from ckptkit.plans.quantized.as_codes import QuantizeLike
from ckptkit.plans.remap import plan_remap

__all__ = ["convert"]


@click.command(cls=Command, first=("--dtype", "--format", "--max-shard-size"))
@path_argument("source")
@plan_output_options
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors, for example to BF16 or bfloat16.")
@dequantize_option
@quantize_option
@click.option("--adapter", type=click.Choice(ADAPTER_FORMATS),
              help="SOURCE is a LoRA adapter: write it for this library. peft: OUT is a directory.")  # fmt: skip
@click.option("--base", type=PATH_TYPE, metavar="BASE",
              help="--adapter only: the model of the adapter, whose names a kohya file needs.")  # fmt: skip
@skip_unread_option
def convert(
    source: str,
    *,
    options: OutputOptions,
    dtype: str | None,
    dequantize: bool,
    quantize: QuantizeLike | None,
    adapter: AdapterFormat | None,
    base: str | None,
    skip_unread: bool,
) -> None:
    """Write a checkpoint in another format, in shards, or with another dtype.

    With --adapter, SOURCE is a LoRA adapter of PEFT, kohya or diffusers, and OUT has the names of one of them.

    \b
    ckpt convert pytorch_model.bin -o model.safetensors
    ckpt convert model.safetensors -o sharded --max-shard-size 2GB
    ckpt convert model.safetensors -o half.safetensors --dtype BF16
    ckpt convert llama/ -o half/model.safetensors --dtype BF16 --carry
    ckpt convert model.safetensors -o dcp --format dcp
    ckpt convert model-Q8_0.gguf -o plain.safetensors --dequantize --dtype BF16
    ckpt convert kohya.safetensors -o adapter --adapter peft --base unet.safetensors
    """  # noqa: D301 - \b is click's mark
    if adapter is not None:
        if (
            dtype is not None
            or dequantize
            or quantize
            or skip_unread
            or options.carry
            or options.output.max_shard_size is not None
        ):
            without = "--dtype, --dequantize, --quantize, --skip-unread, --carry and --max-shard-size"
            raise click.UsageError(f"{without} have no meaning with --adapter")
        _convert_adapter(source, options, adapter, base)
        return
    if base is not None:
        raise click.UsageError("--base has no meaning without --adapter")
    with open_checkpoints(source, quiet=options.quiet) as (checkpoint,):
        with default_error_path(source):
            plan = plan_remap(
                checkpoint, dtype=dtype, dequantize=dequantize, quantize=quantize, skip_unread=skip_unread
            )
            plan = replace(plan, command="convert")
        run_plan(plan, {"source": checkpoint}, {"source": source}, options)


def _convert_adapter(source: str, options: OutputOptions, adapter: AdapterFormat, base: str | None) -> None:
    from ckptkit.plans.adapters.convert import plan_conversion
    from ckptkit.plans.adapters.peft_config import adapter_config_target

    expected = [codes.ADAPTER_BASE]
    with (
        adapter_config_target(options.output) if adapter == "peft" else contextlib.nullcontext() as config,
        open_checkpoints(source, *([base] if base else []), quiet=options.quiet, expected=expected) as (first, *others),
    ):
        with default_error_path(source):
            conversion = plan_conversion(first, adapter, others[0] if others else None, None)
        run_plan(conversion.plan, {"source": first}, {"source": source}, options)
        if config is not None and conversion.config is not None and not options.dry_run:
            write_small_file(config, json_bytes(conversion.config))
