"""The options of ``ckpt merge`` that write a recipe in place of an output."""

from __future__ import annotations

import functools
from collections.abc import Collection

import click

from ckptkit.cli.common.options import PATH_TYPE, CommandFunction, add_options
from ckptkit.cli.merging.options import is_given, missing_argument, option_text

__all__ = ["recipe_options"]

_print_option = click.option(
    "--print", "prints_recipe", is_flag=True,
    help="--from-mergekit only: write the recipe to the output or to stdout, and merge nothing.",
)  # fmt: skip
_again_option = click.option(
    "--again", type=PATH_TYPE, metavar="MERGED",
    help="Write the recipe that a merged checkpoint was made by to the output or to stdout, and merge nothing.",
)  # fmt: skip


def recipe_options(command: CommandFunction) -> CommandFunction:
    """Add the options that write a recipe in place of an output; without one, the command needs ``--output``."""

    @functools.wraps(command)
    def with_recipe_options(
        *, output: str | None, prints_recipe: bool, again: str | None, mergekit_file: str | None, force: bool,
        quiet: bool, **others: object,
    ) -> object:  # fmt: skip
        if again is not None:
            from ckptkit.cli.merging.recipes import write_recipe_of

            _refuse_beside("again", ("again", "output", "force", "quiet"))
            write_recipe_of(again, output, force=force)
            return None
        if prints_recipe:
            from ckptkit.cli.merging.recipes import write_recipe_of_mergekit

            if mergekit_file is None:
                raise click.UsageError("--print writes the recipe of a file, so it needs --from-mergekit")
            _refuse_beside("prints_recipe", ("prints_recipe", "mergekit_file", "output", "force", "quiet"))
            write_recipe_of_mergekit(mergekit_file, output, force=force, quiet=quiet)
            return None
        if output is None:
            raise missing_argument("output")
        return command(output=output, mergekit_file=mergekit_file, force=force, quiet=quiet, **others)

    return add_options(with_recipe_options, _print_option, _again_option)


def _refuse_beside(name: str, allowed: Collection[str]) -> None:
    """Raise ``UsageError`` for a parameter that is given beside an option that merges nothing."""
    for param in click.get_current_context().command.params:
        if param.expose_value and param.name and param.name not in allowed and is_given(param.name):
            raise click.UsageError(f"{option_text(param.name)} has no meaning with {option_text(name)}")
