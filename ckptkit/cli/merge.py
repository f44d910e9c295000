"""The command ``ckpt merge``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import click

from ckptkit.cli.common.commands import Command
from ckptkit.cli.common.donor_names import donor_weights
from ckptkit.cli.common.inputs import open_checkpoints
from ckptkit.cli.common.options import (
    dequantize_option,
    path_argument,
    requirement_options,
    skip_unread_option,
)
from ckptkit.cli.common.options.policies import policy_option
from ckptkit.cli.common.options.rules import rule_options
from ckptkit.cli.common.outputs import OutputOptions, plan_output_options, quantize_option, run_plan
from ckptkit.cli.common.printing import print_message
from ckptkit.cli.merging.completing import COPYING
from ckptkit.cli.merging.options import (
    MergeOptions,
    is_given,
    merge_options,
    missing_argument,
    refuse_others,
)
from ckptkit.cli.merging.written_recipes import recipe_options
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import default_error_path, json_bytes
from ckptkit.core.text import quoted
from ckptkit.formats import codes
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.plans.adapters.layers import AS_LAYER
from ckptkit.plans.inputs import roles_of
from ckptkit.plans.plan import Plan
from ckptkit.plans.policies import MISMATCH_ACTIONS, MISSING_ACTIONS, UNEXPECTED_ACTIONS
from ckptkit.rules.model import Rules

__all__ = ["merge"]


@click.command(
    cls=Command,
    first=("--on-mismatch", "--rename", "--method", "--recipe"),
    usage=("BASE", "DONORS...", "-o OUTPUT"),
)
@path_argument("base", required=False, metavar="BASE")
@path_argument("donors", nargs=-1, required=False, metavar="DONORS...")
@recipe_options
@functools.partial(plan_output_options, is_required=False)
@rule_options(beside="donors", or_beside="base")
@merge_options
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
@click.option("--scale", type=float, default=1.0, show_default=True,
              help="lora only: multiply the scale of every adapter.")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), default=8, show_default=True,
              help="extract-lora only: the rank of the adapter.")  # fmt: skip
@policy_option(
    "--as-layer", AS_LAYER, "auto", "extract-lora only: which layer has the weight of a key, where a file cannot tell."
)
def merge(base: str | None, donors: tuple[str, ...], *, options: OutputOptions, rules: Rules, **words: Any) -> None:
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

    With a method such as linear, slerp or ties, each path is an input with a name: that of its file without the
    suffix, that of its directory, or the NAME of NAME=PATH. --help-methods lists the methods and their parameters.

    \b
    ckpt merge py:mynet:build pretrained.pth -o init.safetensors --on-mismatch 'fc.*=skip'
    ckpt merge base.safetensors ddp.pt -o out.safetensors --strip auto --dry-run
    ckpt merge base.safetensors adapter/ -o merged.safetensors --method lora
    ckpt merge unet.safetensors a.safetensors b.safetensors -o out.safetensors --method lora --weight a=0.7
    ckpt merge base.safetensors tuned.safetensors -o adapter/adapter_model.safetensors --method extract-lora
    ckpt merge a.safetensors b.safetensors -o out.safetensors --method slerp --param t=0.5
    ckpt merge --recipe merge.toml -o out.safetensors
    """  # noqa: D301 - \b is click's mark
    given = MergeOptions(**words)
    form_name = next((name for name, param in _BY_OPTION.items() if is_given(param)), "")
    form = _FORMS[form_name or (given.method if given.method in COPYING else _COMPUTING)]
    given_as = f"--{form_name}" if form_name else f"--method {given.method}"
    taken = form.takes if form_name else ("method", *form.takes)
    refuse_others(given_as, taken, _ALL_NAMES, form.why)
    form.run([*([] if base is None else [base]), *donors], options, rules, given)


def _overlay(paths: Sequence[str], options: OutputOptions, rules: Rules, given: MergeOptions) -> None:
    from ckptkit.plans.merge import plan_merge

    def planned(first: Checkpoint, others: list[Checkpoint]) -> Plan:
        plan = plan_merge(
            first,
            others,
            rules,
            on_missing=given.on_missing if is_given("on_missing") else None,
            on_unexpected=given.on_unexpected,
            on_mismatch=given.on_mismatch,
            dequantize=given.numbers,
            quantize=given.quantize,
            skip_unread=given.skip_unread,
            require=given.require,
            min_coverage=given.min_coverage,
        )
        if first.files and not options.quiet and not is_given("method"):
            for note in _copies_one_input(plan):
                print_message(note)
        return plan

    _run(paths, options, given, planned)


def _copies_one_input(plan: Plan) -> Iterator[str]:
    """Yield a note if all tensors are those of one donor: a user with snapshots of a run may want their mean."""
    roles = {source.role for step in plan.steps for source in step.sources}
    if len(roles) == 1:
        yield f"all tensors are those of {roles.pop()}, and none of another input; --method average computes the mean"


def _lora(paths: Sequence[str], options: OutputOptions, rules: Rules, given: MergeOptions) -> None:
    from ckptkit.plans.adapters.fold import plan_lora

    weights = donor_weights(given.weight, paths[0], paths[1:])

    def planned(first: Checkpoint, others: list[Checkpoint]) -> Plan:
        return plan_lora(
            first,
            others,
            None,
            rules,
            scale=given.scale,
            weights=weights,
            on_unexpected=given.on_unexpected if is_given("on_unexpected") else "error",
            dequantize=given.numbers,
            quantize=given.quantize,
            require=given.require,
            min_coverage=given.min_coverage,
        )

    _run(paths, options, given, planned)


def _extract_lora(paths: Sequence[str], options: OutputOptions, rules: Rules, given: MergeOptions) -> None:
    from ckptkit.plans.adapters.extract import plan_extract_lora
    from ckptkit.plans.adapters.peft_config import adapter_config, adapter_config_target

    if len(paths) > 2:
        raise click.UsageError(f"--method {given.method} takes one DONOR")

    def planned(first: Checkpoint, others: list[Checkpoint]) -> Plan:
        return plan_extract_lora(
            first, others[0], given.rank, rules,
            as_layer=given.as_layer, dequantize=given.numbers, require=given.require, min_coverage=given.min_coverage,
        )  # fmt: skip

    with adapter_config_target(options.output) as config:
        _run(
            paths,
            options,
            given,
            planned,
            lambda plan, first: write_small_file(config, json_bytes(adapter_config(plan, first))),
        )


def _run(
    paths: Sequence[str],
    options: OutputOptions,
    given: MergeOptions,
    planned: Callable[[Checkpoint, list[Checkpoint]], Plan],
    finish: Callable[[Plan, Checkpoint], None] | None = None,
) -> None:
    """Open BASE and the donors, and run the plan that is made of them; ``finish`` follows what was written."""
    if len(paths) < 2:
        raise missing_argument("donors" if paths else "base")
    if given.dtype is not None and not given.dequantize:
        raise click.UsageError("--dtype has no meaning without --dequantize: the output has the dtypes of BASE")
    expected = [codes.ADAPTER_BASE] if given.method == "lora" else []
    with open_checkpoints(*paths, quiet=options.quiet, expected=expected) as (first, *others):
        # An error does not say which of several donors it is about.
        with default_error_path(paths[1] if len(others) == 1 else None):
            plan = planned(first, others)
        run_plan(plan, roles_of(first, others), roles_of(paths[0], paths[1:]), options)
        if finish is not None and not options.dry_run:
            finish(plan, first)


def _computed(paths: Sequence[str], options: OutputOptions, _rules: Rules, given: MergeOptions) -> None:
    from ckptkit.cli.merging.recipes import recipe_of_options, run_recipe

    if not paths:
        raise missing_argument("base")
    run_recipe(recipe_of_options(paths, given), options, has_recipe=not given.no_recipe)


def _from_recipe(paths: Sequence[str], options: OutputOptions, _rules: Rules, given: MergeOptions) -> None:
    from ckptkit.cli.merging.recipes import run_recipe
    from ckptkit.plans.recipes.parse import parse_recipe

    _refuse_paths(paths)
    run_recipe(parse_recipe(given.recipe_file or ""), options, has_recipe=not given.no_recipe)


def _from_mergekit(paths: Sequence[str], options: OutputOptions, _rules: Rules, given: MergeOptions) -> None:
    from ckptkit.cli.merging.recipes import recipe_of_mergekit, run_recipe

    _refuse_paths(paths)
    recipe = recipe_of_mergekit(given.mergekit_file or "", quiet=options.quiet)
    run_recipe(recipe, options, has_recipe=not given.no_recipe)


def _refuse_paths(paths: Sequence[str]) -> None:
    if paths:
        raise click.UsageError(f"the file names all inputs: leave {quoted(paths[0])} out")


class _Form(NamedTuple):
    """One form of the command: the options that not every form takes, its function, and why it lacks some options."""

    takes: Sequence[str]
    run: Callable[[Sequence[str], OutputOptions, Rules, MergeOptions], None]
    why: Mapping[str, str] = {}


_RULES: Final = ("rename", "keep", "drop", "strip", "rules_file", "settings", "allow_unused")
_NO_MODEL: Final = "the output is not a model"
_OF_INPUTS: Final = {
    "strip": "--param NAME.strip=PREFIX is for one input",
    "on_mismatch": "--param NAME.on_mismatch=ACTION is for one input",
    "rules_file": "--param NAME.rules=FILE is for one input",
    "rename": "--param NAME.rename=OLD=NEW is for one input",
}
_IN_FILE: Final = dict.fromkeys(
    ("method", "base_input", "weight", "density", "parameters", "only", "dequantize", "dtype"),
    "write it in the file",
)
_COMPUTING: Final = "computing"
_FORMS: Final[Mapping[str, _Form]] = {
    "overlay": _Form(
        (*_RULES, "require", "min_coverage", "on_missing", "on_unexpected", "on_mismatch", "skip_unread", "dequantize",
         "dtype", "quantize", "carry"),
        _overlay,
    ),
    "lora": _Form(
        (*_RULES, "require", "min_coverage", "on_unexpected", "dequantize", "dtype", "quantize", "carry", "scale",
         "weight"),
        _lora,
    ),
    "extract-lora": _Form(
        (*_RULES, "require", "min_coverage", "dequantize", "dtype", "rank", "as_layer"),
        _extract_lora,
        {"quantize": _NO_MODEL, "carry": _NO_MODEL},
    ),
    _COMPUTING: _Form(
        ("base_input", "weight", "density", "parameters", "only", "dequantize", "dtype", "carry", "no_recipe"),
        _computed,
        {**_OF_INPUTS, "on_missing": "--param on_missing=base, present or drop", "keep": "--only chooses keys",
         "drop": "--only chooses keys"},
    ),
    "recipe": _Form(("recipe_file", "carry", "no_recipe"), _from_recipe, _IN_FILE),
    "from-mergekit": _Form(("mergekit_file", "carry", "no_recipe"), _from_mergekit, _IN_FILE),
}  # fmt: skip
_ALL_NAMES: Final = ("method", *dict.fromkeys(name for form in _FORMS.values() for name in form.takes))
_BY_OPTION: Final = {
    "recipe": "recipe_file",
    "from-mergekit": "mergekit_file",
}  # a form that an option chooses, whatever the method
