"""The command ``ckpt merge``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import click
from click.core import ParameterSource

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.donor_names import donor_weights
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import (
    dequantize_option,
    numbers_dtype_option,
    path_argument,
    requirement_options,
    skip_unread_option,
)
from ckptkit.cli.common.outputs import OutputOptions, plan_output_options, quantize_option, run_plan
from ckptkit.cli.common.policy_options import policy_option
from ckptkit.cli.common.rule_options import rule_options
from ckptkit.core.config_files import default_error_path, json_bytes
from ckptkit.formats import codes
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.state import Target
from ckptkit.plans.adapters.layers import AS_LAYER, AsLayer
from ckptkit.plans.inputs import roles_of
from ckptkit.plans.merge import plan_merge
from ckptkit.plans.output import Output
from ckptkit.plans.policies import (
    MISMATCH_ACTIONS,
    MISSING_ACTIONS,
    UNEXPECTED_ACTIONS,
    OnMismatch,
    OnMissing,
    OnUnexpected,
)
from ckptkit.plans.quantized.as_codes import QuantizeLike
from ckptkit.rules.model import Rules

__all__ = ["merge"]

_METHODS: Mapping[str, Sequence[str]] = {  # method -> the options that only this method takes
    "overlay": ("on_missing", "on_unexpected", "on_mismatch", "skip_unread"),
    "lora": ("scale", "weight", "on_unexpected"),
    "extract-lora": ("rank", "as_layer"),
}


@click.command(cls=Command, first=("--on-mismatch", "--rename", "--method"))
@path_argument("base")
@path_argument("donors", nargs=-1)
@plan_output_options
@rule_options(beside="donors", or_beside="base")
@click.option("--method", type=click.Choice(list(_METHODS)), default="overlay", show_default=True,
              help="overlay: copy the values of each DONOR. lora: add LoRA adapters of PEFT, kohya or diffusers. "
              "extract-lora: find the adapter nearest to the changes in a fine-tuned DONOR.")  # fmt: skip
@policy_option("--on-missing", MISSING_ACTIONS, "keep", "What to do with a key of BASE that no DONOR has.")
@policy_option(
    "--on-unexpected",
    UNEXPECTED_ACTIONS,
    "skip",
    "What to do with a key of a DONOR that BASE does not have. With --method lora the default is error, and add writes "
    "a tensor that the adapter saves whole.",
)
@policy_option(
    "--on-mismatch",
    MISMATCH_ACTIONS,
    "error",
    "What to do where shapes differ: refuse, keep the value of BASE, or change the shape.",
)
@requirement_options
@skip_unread_option
@dequantize_option
@quantize_option
@numbers_dtype_option
@click.option("--scale", type=float, default=1.0, show_default=True,
              help="lora only: multiply the scale of every adapter.")  # fmt: skip
@click.option("--weight", multiple=True, metavar="NAME=X",
              help="lora only: multiply the scale of one of several adapters; NAME is its path, its directory's name, "
              "or its file's name without the suffix.")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True,
              help="extract-lora only: the rank of the adapter.")  # fmt: skip
@policy_option(
    "--as-layer", AS_LAYER, "auto", "extract-lora only: which layer has the weight of a key, where a file cannot tell."
)
def merge(
    base: str,
    donors: tuple[str, ...],
    *,
    options: OutputOptions,
    rules: Rules,
    method: str,
    on_missing: OnMissing,
    on_unexpected: OnUnexpected,
    on_mismatch: OnMismatch,
    require: tuple[str, ...],
    min_coverage: float,
    skip_unread: bool,
    dequantize: bool,
    quantize: QuantizeLike | None,
    dtype: str | None,
    scale: float,
    weight: tuple[str, ...],
    rank: int,
    as_layer: AsLayer,
) -> None:
    """Copy the values of each DONOR into BASE where key and shape agree.

    The output has the keys, shapes and dtypes of BASE. The rules rename and filter the keys of the donors first. If
    several donors have a key, the last one counts. Refuses if nothing matches. With --method lora, each DONOR is an
    adapter of PEFT, kohya or diffusers, and every tensor of it must have a target in BASE.

    The three --on-... options are repeatable. PATTERN=ACTION is for the keys that match, as in 'fc.*=skip', and the
    first pattern that matches a key decides. ACTION alone is for all other keys; without it, they are an error. A
    pattern must decide about a key, unless --allow-unused is given. A key that a DONOR has in parts, as a stack of
    experts may be, is refused without --on-missing.

    The report ends with the share of BASE that got values from a DONOR, and the keys that stay as BASE has them.
    --require and --min-coverage refuse to write anything if too little would get them. With an adapter they are about
    the tensors of BASE that it changes.

    \b
    ckpt merge py:mynet:build pretrained.pth -o init.safetensors --on-mismatch 'fc.*=skip'
    ckpt merge base.safetensors ddp.pt -o out.safetensors --strip auto --dry-run
    ckpt merge base.safetensors adapter/ -o merged.safetensors --method lora
    ckpt merge unet.safetensors a.safetensors b.safetensors -o out.safetensors --method lora --weight a=0.7
    ckpt merge base.safetensors tuned.safetensors -o adapter/adapter_model.safetensors --method extract-lora
    """  # noqa: D301 - \b is click's mark
    _refuse_options_of_other_methods(method)
    if dtype is not None and not dequantize:
        raise click.UsageError("--dtype has no meaning without --dequantize: the output has the dtypes of BASE")
    numbers = dtype or dequantize
    keeps = _is_given("on_missing")
    if method == "extract-lora" and len(donors) > 1:
        raise click.UsageError(f"--method {method} takes one DONOR")
    weights = donor_weights(weight, donors)
    if method == "extract-lora" and quantize is not None:
        raise click.UsageError("--quantize has no meaning with --method extract-lora: the output is not a model")
    if method == "extract-lora" and options.carry:
        raise click.UsageError("--carry has no meaning with --method extract-lora: the output is not a model")
    expected = [codes.ADAPTER_BASE] if method == "lora" else []
    with (
        _adapter_config(options.output) if method == "extract-lora" else contextlib.nullcontext() as config,
        open_checkpoints(base, *donors, quiet=options.quiet, expected=expected) as (first, *others),
    ):
        with default_error_path(
            donors[0] if len(donors) == 1 else None
        ):  # an error does not say which of several donors
            if method == "lora":
                from ckptkit.plans.adapters.fold import plan_lora

                unexpected = on_unexpected if _is_given("on_unexpected") else "error"
                plan = plan_lora(
                    first,
                    others,
                    None,
                    rules,
                    scale=scale,
                    weights=weights,
                    on_unexpected=unexpected,
                    dequantize=numbers,
                    quantize=quantize,
                    require=require,
                    min_coverage=min_coverage,
                )
            elif method == "extract-lora":
                from ckptkit.plans.adapters.extract import plan_extract_lora

                plan = plan_extract_lora(
                    first, others[0], rank, rules,
                    as_layer=as_layer, dequantize=numbers, require=require, min_coverage=min_coverage,
                )  # fmt: skip
            else:
                plan = plan_merge(
                    first,
                    others,
                    rules,
                    on_missing=on_missing if keeps else None,
                    on_unexpected=on_unexpected,
                    on_mismatch=on_mismatch,
                    dequantize=numbers,
                    quantize=quantize,
                    skip_unread=skip_unread,
                    require=require,
                    min_coverage=min_coverage,
                )
        run_plan(plan, roles_of(first, others), options)
        if config is not None and not options.dry_run:
            from ckptkit.plans.adapters.peft_config import adapter_config

            write_small_file(config, json_bytes(adapter_config(plan, first)))


def _is_given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def _refuse_options_of_other_methods(method: str) -> None:
    for names in _METHODS.values():
        for name in names:
            if _is_given(name) and name not in _METHODS[method]:
                raise click.UsageError(f"--{name.replace('_', '-')} has no meaning with --method {method}")


def _adapter_config(output: Output) -> AbstractContextManager[Target]:
    from ckptkit.plans.adapters.peft_config import adapter_config_target

    return adapter_config_target(output)
