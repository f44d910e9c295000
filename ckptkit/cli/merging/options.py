"""The options of ``ckpt merge`` that say how, and the refusal of those that the form of the command does not have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import click
from click.core import ParameterSource

from ckptkit.cli.common.completing import complete_keys
from ckptkit.cli.common.hints import OTHER_METHODS
from ckptkit.cli.common.options import PATH_TYPE, CommandFunction, add_options
from ckptkit.cli.merging.completing import (
    COPYING,
    complete_base,
    complete_methods,
    complete_parameters,
    complete_values,
)
from ckptkit.core.text import nearest, quoted
from ckptkit.errors import ArgumentError
from ckptkit.plans.adapters.layers import AsLayer
from ckptkit.plans.policies import OnMismatch, OnMissing, OnUnexpected
from ckptkit.plans.quantized.as_codes import QuantizeLike

__all__ = ["MergeOptions", "is_given", "merge_options", "missing_argument", "option_text", "refuse_others"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What the options of ``ckpt merge`` say, beside the output and the rules."""

    method: str
    on_missing: OnMissing
    on_unexpected: OnUnexpected
    on_mismatch: OnMismatch
    require: tuple[str, ...]
    min_coverage: float
    skip_unread: bool
    dequantize: bool
    quantize: QuantizeLike | None
    dtype: str | None
    scale: float
    weight: tuple[str, ...]
    rank: int
    as_layer: AsLayer
    base_input: str
    density: tuple[str, ...]
    parameters: tuple[str, ...]
    only: tuple[str, ...]
    recipe_file: str | None
    mergekit_file: str | None
    no_recipe: bool

    @property
    def numbers(self) -> bool | str:
        """What quantised weights become, as the functions that plan take it."""
        return self.dtype or self.dequantize


_ALL_METHODS = "all"


def _check_method(context: click.Context, _option: click.Parameter, name: str) -> str:
    if name in COPYING or context.resilient_parsing:
        return name
    from ckptkit.plans.methods.table import METHODS

    if name not in METHODS:
        near = OTHER_METHODS.get(name) or nearest(name, [*COPYING, *METHODS])
        start = f"did you mean {near}? " if near else ""
        raise ArgumentError(f"there is no method {quoted(name)}", hint=f"{start}see ckpt merge --help-methods")
    return name


def _show_methods(context: click.Context, option: click.Parameter, name: str | None) -> None:
    """Show the method that is named, or all of them."""
    if name is not None and not context.resilient_parsing:
        from ckptkit.cli.common.printing import ReportFormat, echo_report
        from ckptkit.render.merging.methods import methods_page

        if name in COPYING:
            raise ArgumentError(f"{name} has no parameters of its own", hint="ckpt merge --help-all has its options")
        chosen = () if name == _ALL_METHODS else (_check_method(context, option, name),)
        echo_report(ReportFormat.TABLE, lambda: methods_page(chosen), dict)
        context.exit()


_method_option = click.option(
    "--method", default="overlay", show_default=True, metavar="METHOD", callback=_check_method,
    shell_complete=complete_methods,
    help="overlay: copy the values of each DONOR. lora: add LoRA adapters of PEFT, kohya or diffusers. extract-lora: "
    "find the adapter nearest to the changes in a fine-tuned DONOR. Others, such as linear, slerp and ties, compute "
    "with the values of all paths: see --help-methods.",
)  # fmt: skip
_recipe_option = click.option(
    "--recipe", "recipe_file", type=PATH_TYPE, metavar="FILE",
    help="Merge as a TOML file says, which names inputs, method and parameters for each key. Give no paths beside it.",
)  # fmt: skip
_base_option = click.option(
    "--base", "base_input", default="", metavar="NAME|PATH", shell_complete=complete_base,
    help="The model that the others are compared with: the name of an input, or a further path.",
)  # fmt: skip
_weight_option = click.option(
    "--weight", multiple=True, metavar="NAME=X", shell_complete=complete_values,
    help="The weight of one adapter or input. NAME is its path, its directory's name, or its file's name without the "
    "suffix. Repeatable.",
)  # fmt: skip
_density_option = click.option(
    "--density", multiple=True, metavar="[NAME=]X", shell_complete=complete_values,
    help="The share of the changes that each input keeps, or that one input keeps. Repeatable.",
)  # fmt: skip
_param_option = click.option(
    "--param", "parameters", multiple=True, metavar="NAME=VALUE", shell_complete=complete_parameters,
    help="A parameter of the method, as in t=0.5, or of one input: INPUT.NAME=VALUE. Also a setting of a recipe, as in "
    "on_missing=base. Repeatable.",
)  # fmt: skip
_only_option = click.option(
    "--only", multiple=True, metavar="PATTERN", shell_complete=complete_keys,
    help="Merge only matching keys; all others have the values of the base, or of the first input. Repeatable.",
)  # fmt: skip
_dtype_option = click.option(
    "--dtype", metavar="DTYPE",
    help="The dtype of the output, for a method that computes. With overlay, lora and extract-lora: the dtype of the "
    "numbers that --dequantize reads.",
)  # fmt: skip
_mergekit_option = click.option(
    "--from-mergekit", "mergekit_file", type=PATH_TYPE, metavar="FILE",
    help="Merge as the configuration of mergekit says. With --print, write the recipe that means the same.",
)  # fmt: skip
_no_recipe_option = click.option(
    "--no-recipe", is_flag=True, help="Write only the digests of the inputs into the output, and not the recipe."
)
_help_methods_option = click.option(
    "--help-methods", is_flag=False, flag_value=_ALL_METHODS, is_eager=True, expose_value=False, metavar="[METHOD]",
    callback=_show_methods, shell_complete=complete_methods,
    help="Show every method with its parameters, or one of them, and exit.",
)  # fmt: skip


def merge_options(command: CommandFunction) -> CommandFunction:
    """Add the options that choose a method, and the parameters of methods that compute with all inputs."""
    return add_options(
        command, _method_option, _help_methods_option, _recipe_option, _base_option, _weight_option, _density_option,
        _param_option, _only_option, _dtype_option, _mergekit_option, _no_recipe_option,
    )  # fmt: skip


def missing_argument(name: str) -> click.MissingParameter:
    """Return the error about a parameter of the command that is not given, as click words it."""
    context = click.get_current_context()
    param = next(each for each in context.command.params if each.name == name)
    return click.MissingParameter(ctx=context, param=param)


def is_given(name: str) -> bool:
    """Return whether a parameter of the command is given, and not left to its default."""
    context = click.get_current_context()
    # Older versions of click say that arguments without any word come from the command line.
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT and context.params.get(name) != ()


def option_text(name: str) -> str:
    """Return the option of a parameter as the user writes it, or the name of an argument."""
    param = next(each for each in click.get_current_context().command.params if each.name == name)
    return max(param.opts, key=len) if isinstance(param, click.Option) else param.human_readable_name


def refuse_others(given_as: str, taken: Collection[str], all_names: Collection[str], why: Mapping[str, str]) -> None:
    """Raise ``UsageError`` for a parameter of another form of the command; ``why`` has the reason of some.

    ``given_as`` is the option that says which form it is, such as ``--method lora``.
    """
    for name in all_names:
        if name not in taken and is_given(name):
            reason = f": {why[name]}" if name in why else ""
            raise click.UsageError(f"{option_text(name)} has no meaning with {given_as}{reason}")
