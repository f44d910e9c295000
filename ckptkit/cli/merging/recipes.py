"""Merges with recipes: made of options, read from a file, translated from mergekit, or written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptkit.cli.common.inputs import open_checkpoints, print_warnings
from ckptkit.cli.common.outputs import OutputOptions, run_plan
from ckptkit.cli.common.printing import print_line, print_message
from ckptkit.cli.merging.options import MergeOptions
from ckptkit.core.config_files import read_text_file
from ckptkit.core.text import printable
from ckptkit.formats import codes
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.targets import prepare_side_file
from ckptkit.plans.recipes.model import MergeRecipe

__all__ = ["recipe_of_mergekit", "recipe_of_options", "run_recipe", "write_recipe_of", "write_recipe_of_mergekit"]


def recipe_of_options(paths: Sequence[str], given: MergeOptions) -> MergeRecipe:
    """Return the recipe that the words of the command describe. Raises ``RecipeError`` as ``parse_recipe`` does."""
    from ckptkit.plans.recipes.options import recipe_from_options

    others: Mapping[str, object] = {
        "dequantize": given.dequantize, "out_dtype": given.dtype, "only": list(given.only)
    }  # fmt: skip
    densities = [
        f"{name}.density={share}" if name else f"density={share}" for name, share in map(_named, given.density)
    ]
    return recipe_from_options(
        given.method,
        paths,
        base=given.base_input,
        weights=given.weight,
        parameters=[*densities, *given.parameters],
        others={name: value for name, value in others.items() if value},
    )


def _named(text: str) -> tuple[str, str]:
    name, _, share = text.rpartition("=")
    return name, share


def recipe_of_mergekit(path: str, *, quiet: bool) -> MergeRecipe:
    """Return the recipe that means what a configuration of mergekit means; print what has no equal unless ``quiet``."""
    from ckptkit.plans.recipes.mergekit import recipe_from_mergekit

    imported = recipe_from_mergekit(read_text_file(path, "yaml"), path)
    for note in () if quiet else imported.notes:
        print_message(f"ckpt: {printable(path)}: note: {note}")
    return imported.recipe


def run_recipe(recipe: MergeRecipe, options: OutputOptions, *, has_recipe: bool) -> None:
    """Open the inputs, then print the plan, or execute it; without ``has_recipe``, the output has only digests."""
    from ckptkit.plans.recipes.inputs import opened_recipe
    from ckptkit.plans.recipes.planning import plan_opened

    with opened_recipe(recipe, {}) as (roles, paths):
        for checkpoint in roles.values():
            print_warnings(checkpoint, quiet=options.quiet, expected=[codes.ADAPTER_BASE])  # the recipe has its base
        run_plan(plan_opened(recipe, roles, paths, record_recipe=has_recipe), roles, paths, options)


def write_recipe_of(merged: str, output: str | None, *, force: bool) -> None:
    """Write the recipe that a merged checkpoint was made by to a file, or print it."""
    from ckptkit.plans.recipes.provenance import recorded_recipe

    with open_checkpoints(merged, quiet=True) as (checkpoint,):
        _write(recorded_recipe(checkpoint), output, checkpoint.files, force=force)


def write_recipe_of_mergekit(path: str, output: str | None, *, force: bool, quiet: bool) -> None:
    """Write the recipe that means what a configuration of mergekit means to a file, or print it."""
    _write(recipe_of_mergekit(path, quiet=quiet), output, [path], force=force)


def _write(recipe: MergeRecipe, output: str | None, inputs: Sequence[str], *, force: bool) -> None:
    from ckptkit.plans.recipes.writing import dump_recipe

    text = dump_recipe(recipe)
    if output is None:
        print_line(text.rstrip("\n"))
    else:
        write_small_file(prepare_side_file(output, inputs, force=force), text.encode())
