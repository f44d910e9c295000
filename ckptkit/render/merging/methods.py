"""The methods of merging with their parameters, as a page."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator

from ckptkit.core.text import plural
from ckptkit.plans.methods.model import Method, Parameter
from ckptkit.plans.methods.table import METHODS
from ckptkit.render.page import Block, Line, Listing, Page

__all__ = ["inputs_text", "methods_page", "parameter_rows", "summary_of"]

_FOUND = ("drawn",)  # parameters that a plan finds


def methods_page(names: Collection[str] = ()) -> Page:
    """Return every method, or those in ``names``: what it computes, its paper, its inputs, and its parameters."""
    return [block for name in names or METHODS for block in _method(METHODS[name])]


def summary_of(method: type[Method]) -> str:
    """Return what a method computes: the first paragraph of its description, without marks of code."""
    first = inspect.cleandoc(method.__doc__ or "").partition("\n\n")[0]
    return " ".join(first.split()).replace("``", "")


def inputs_text(method: type[Method]) -> str:
    """Return how many inputs a method takes, and what it does with a base."""
    fewest, most = method.fewest, method.most
    if most is None:
        inputs = f"{plural(fewest, 'input')} or more"
    else:
        inputs = plural(fewest, "input") if most == fewest else f"{fewest} to {plural(most, 'input')}"
    base = {"always": " and a base", "optional": ", with or without a base", "never": ""}[method.uses_base]
    return f"{inputs}{base}"


def parameter_rows(method: type[Method]) -> list[tuple[str, str, str, str]]:
    """Return the name of each parameter that a user can give, its values, its default, and what it is."""
    return [_row(parameter) for name, parameter in method.parameters().items() if name not in _FOUND]


def _row(parameter: Parameter) -> tuple[str, str, str, str]:
    default = parameter.default
    shown = str(default).lower() if isinstance(default, bool) else str(default).removesuffix(".0")
    meaning = f"{parameter.meaning}, for each input" if parameter.is_per_input else parameter.meaning
    return parameter.name, parameter.range_text, "required" if default is None else f"default {shown}", meaning


def _method(method: type[Method]) -> Iterator[Block]:
    yield Line((method.name,))
    yield Line((summary_of(method),), indented=True)
    yield Line((f"{inputs_text(method)}{f'; {method.paper}' if method.paper else ''}",), indented=True)
    rows = parameter_rows(method)
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if not rows:
        yield Line(("",))
    else:
        yield Listing(tuple(f"    {'  '.join(map(str.ljust, row, sizes))}".rstrip() for row in rows))
