"""Write a recipe as the table or the TOML text that is parsed as the same recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from ckptkit.core.config_files import toml_key, toml_value
from ckptkit.plans.recipes.model import Gradient, MergeRecipe, Parameters, RecipeInput, Setting

__all__ = ["dump_recipe", "recipe_table"]

_VERSION = 1
_PLAIN = (
    "compute", "out_dtype", "seed", "device", "on_missing", "non_float", "on_nonfinite", "only", "dequantize",
    "layer_keys", "outer", "layer_count_field",
)  # fmt: skip
_OF_INPUT = ("path", "dequantize", "lora", "lora_scale", "strip", "rename", "rules", "on_mismatch")
_TABLES = ("input", "set", "slice")


def recipe_table(recipe: MergeRecipe) -> dict[str, Any]:
    """Return the table of a recipe as a TOML file has it, without fields that have their default.

    Example:
        >>> from ckptkit.plans.recipes.parse import parse_recipe
        >>> recipe = parse_recipe({"method": "linear", "input": [{"path": "a.pt"}, {"path": "b.pt", "weight": 2}]})
        >>> recipe_table(recipe)["input"][1]
        {'name': 'b', 'path': 'b.pt', 'weight': 2}
    """
    base = recipe.input(recipe.base).path if recipe.is_base_apart else recipe.base
    table: dict[str, Any] = {"version": _VERSION, "method": recipe.method, **({"base": base} if base else {})}
    table |= _values(recipe.parameters)
    table |= _given(recipe, _PLAIN)
    if recipe.copy:
        table["copy"] = [{"keys": _texts(each.keys), "from": each.source} for each in recipe.copy]
    listed = [each for each in recipe.inputs if not (recipe.is_base_apart and each.name == recipe.base)]
    table["input"] = list(map(_input, listed))
    if recipe.settings:
        table["set"] = list(map(_setting, recipe.settings))
    if recipe.slices:
        table["slice"] = [
            {"input": each.input, "layers": list(each.layers), **_values(each.parameters)} for each in recipe.slices
        ]
    return table


def dump_recipe(recipe: MergeRecipe) -> str:
    """Return a recipe as the text of a TOML file, which ``parse_recipe`` parses as the same recipe.

    Example:
        >>> from ckptkit.plans.recipes.parse import parse_recipe
        >>> recipe = parse_recipe({"method": "average", "input": [{"path": "a.pt"}, {"path": "b.pt"}]})
        >>> print(dump_recipe(recipe))
        version = 1
        method = "average"
        <BLANKLINE>
        [[input]]
        name = "a"
        path = "a.pt"
        <BLANKLINE>
        [[input]]
        name = "b"
        path = "b.pt"
        <BLANKLINE>
    """
    return "\n".join(_lines(recipe_table(recipe))) + "\n"


def _lines(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if key not in _TABLES:
            yield f"{key} = {toml_value(value)}"
    for kind in _TABLES:
        for inner in table.get(kind, ()):
            yield from ("", f"[[{kind}]]")
            for key, value in inner.items():
                if key == "inputs":  # one line for each parameter of each input
                    for name, parameters in value.items():
                        for parameter, one in parameters.items():
                            yield f"inputs.{toml_key(name)}.{toml_key(parameter)} = {toml_value(one)}"
                else:
                    yield f"{toml_key(key)} = {toml_value(value)}"


def _input(each: RecipeInput) -> dict[str, Any]:
    return {"name": each.name, **_given(each, _OF_INPUT), **_values(each.parameters)}


def _setting(each: Setting) -> dict[str, Any]:
    table: dict[str, Any] = {"keys": _texts(each.keys)}
    table |= {name: getattr(each, name) for name in ("method", "take") if getattr(each, name)}
    table |= _values(each.parameters)
    inputs = {name: _values(parameters) for name, parameters in each.inputs.items() if parameters}
    return {**table, **({"inputs": inputs} if inputs else {})}


def _given(owner: MergeRecipe | RecipeInput, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields that do not have their default; lists of one text are a text."""
    defaults = {item.name: item.default for item in fields(owner)}
    values = {name: getattr(owner, name) for name in names if getattr(owner, name) != defaults[name]}
    return {name: _texts(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _values(parameters: Parameters) -> dict[str, Any]:
    return {name: _value(value) for name, value in parameters.items()}


def _value(value: object) -> object:
    return {"over": value.over, "values": list(value.values)} if isinstance(value, Gradient) else value


def _texts(texts: tuple[str, ...]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)
