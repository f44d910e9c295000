"""What the shell completes for ``ckpt merge``: methods, names of inputs, and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import CompletionItem

from ckptkit.cli.common.completing import given_words

if TYPE_CHECKING:
    from ckptkit.plans.methods.model import Parameter

__all__ = ["COPYING", "complete_base", "complete_methods", "complete_parameters", "complete_values"]

COPYING: Final = ("overlay", "lora", "extract-lora")  # the methods with one BASE, whose dtypes the output has


def complete_methods(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the methods, each with the title of its paper."""
    from ckptkit.plans.methods.table import METHODS

    papers = {name: method.paper for name, method in METHODS.items()}
    titles = {**dict.fromkeys(COPYING), **{name: paper.title if paper else None for name, paper in papers.items()}}
    return [CompletionItem(name, help=title) for name, title in titles.items() if name.startswith(incomplete)]


def complete_base(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the names of the inputs on the line, or files."""
    names = [name for name in _names(context) if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def complete_values(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return completions of ``NAME=X`` up to the number: the names of the inputs on the line."""
    return [f"{name}=" for name in _names(context) if name.startswith(incomplete)]


def complete_parameters(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return completions of ``NAME=VALUE`` and ``INPUT.NAME=VALUE`` for the method on the line."""
    from ckptkit.plans.methods.table import METHODS

    method = METHODS.get((given_words(context).get("method") or [""])[0])
    if method is None:
        return []
    known = dict(method.parameters())
    of_inputs = {
        f"{name}.{key}": parameter
        for name in _names(context)
        for key, parameter in known.items()
        if parameter.is_per_input
    }
    name, sign, value = incomplete.partition("=")
    if sign:
        parameter = {**known, **of_inputs}.get(name)
        return [f"{name}={word}" for word in _words(parameter) if word.startswith(value)]
    inputs = [f"{each}=" for each in of_inputs if "." in incomplete]
    return [each for each in (*(f"{each}=" for each in known), *inputs) if each.startswith(incomplete)]


def _words(parameter: Parameter | None) -> Sequence[str]:
    if parameter is None:
        return ()
    return ("true", "false") if parameter.kind == "flag" else parameter.choices


def _names(context: click.Context) -> list[str]:
    """Return the names of the inputs on the line, as a recipe gives them."""
    from ckptkit.plans.recipes.options import named_input
    from ckptkit.plans.recipes.paths import distinct_names

    given = given_words(context)
    pairs = list(map(named_input, (*given.get("base", ()), *given.get("donors", ()))))
    named = [name for name, _ in pairs if name]
    return [*named, *distinct_names([path for name, path in pairs if not name], named)]
