"""Make a recipe of the options of a command line: inputs in order, a base, weights and other parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence

from ckptkit.core.files.places import clean_path, kind_at
from ckptkit.core.files.wildcards import expand_path
from ckptkit.core.text import did_you_mean, listed, quoted, shell_word
from ckptkit.errors import ArgumentError, RecipeError
from ckptkit.plans.methods.table import method_named
from ckptkit.plans.recipes.model import MergeRecipe, Places
from ckptkit.plans.recipes.parse import INPUT_KEYS, TOP_KEYS, recipe_from_table
from ckptkit.plans.recipes.paths import distinct_names, input_name, looks_like_path

__all__ = ["SETTINGS", "named_input", "recipe_from_options"]

SETTINGS = ("compute", "on_missing", "non_float", "on_nonfinite", "seed")  # of a recipe, beside the parameters
_OPTIONS = {"out_dtype": "--dtype", "dequantize": "--dequantize", "only": "--only", "base": "--base"}
_FILTERS = ("keep", "drop")  # of ckpt remap


def recipe_from_options(
    method: str,
    inputs: Sequence[str],
    *,
    base: str = "",
    weights: Sequence[str] = (),
    parameters: Sequence[str] = (),
    others: Mapping[str, object] | None = None,
) -> MergeRecipe:
    """Return the recipe that a command line describes.

    ``inputs`` are paths in order, or ``NAME=PATH``. ``base`` is the name of one of them, or a further path. ``weights``
    and ``parameters`` are ``NAME=VALUE``: of ``weights``, the name is that of an input. A parameter for each input can
    also be ``INPUT.NAME=VALUE``; an input has its name or its path. ``INPUT.rename=OLD=NEW`` can be repeated. A
    parameter can also be one of ``SETTINGS``, which a recipe has at its top. ``others`` are fields of the top of a
    recipe, such as ``out_dtype``.

    Raises ``RecipeError`` as ``parse_recipe`` does, and where a text has no ``=`` or names no input, or gives a value
    that an earlier one gives.

    Example:
        >>> recipe = recipe_from_options("linear", ["a.pt", "B=b.pt"], weights=["B=2"], parameters=["normalize=false"])
        >>> [each.name for each in recipe.inputs], dict(recipe.inputs[1].parameters), dict(recipe.parameters)
        (['a', 'B'], {'weight': 2}, {'normalize': False})
    """
    try:
        found = method_named(method)
    except ArgumentError as error:
        raise RecipeError(error.reason, hint=error.hint) from None
    known = found.parameters()
    of_input = [name for name, parameter in known.items() if parameter.is_per_input]
    tables: list[dict[str, object]] = []
    for text in inputs:
        name, path = named_input(text)
        tables.append({"path": path} if name is None else {"name": name, "path": clean_path(path)})
    by_name = {str(table["path"]): table for table in tables}
    unnamed = [table for table in tables if "name" not in table]
    taken = [str(table["name"]) for table in tables if "name" in table]
    if base and base not in (*taken, *by_name) and looks_like_path(base):
        taken.append(input_name(base))
    for each, own in zip(unnamed, distinct_names([str(each["path"]) for each in unnamed], taken), strict=True):
        by_name[own] = each
        if own != input_name(str(each["path"])) and expand_path(str(each["path"])) is None:
            each["name"] = own
    by_name |= {str(each["name"]): each for each in tables if "name" in each}
    table: dict[str, object] = {"method": method, "input": tables, **(others or {})}
    if base:
        table["base"] = base
    example = _weight_options(tables, weights)
    for text in weights:
        name, value = _pair(text, "--weight", example)
        if "weight" not in known:
            raise _no_parameter(method, "weight", known)
        _give(_of_input(by_name, name, "--weight"), "weight", value, "--weight", text)
    renames: dict[str, list[str]] = {}
    for text in parameters:
        renamed, _, rename = text.partition(".rename=")
        if rename:
            renames.setdefault(renamed, []).append(rename)
            _of_input(by_name, renamed, "--param")["rename"] = renames[renamed]
            continue
        name, value = _pair(text, "--param", "density=0.5")
        owner, _, inner = name.rpartition(".")
        if owner and name not in known:
            if inner not in (*known, *INPUT_KEYS, *TOP_KEYS):
                raise _no_parameter(method, inner, of_input, INPUT_KEYS)
            _give(_of_input(by_name, owner, "--param"), inner, value, "--param", text)
        else:
            if name not in known and name not in SETTINGS:
                raise _no_parameter(method, name, known, SETTINGS)
            _give(table, name, value, "--param", text)
    return recipe_from_table(table, Places(is_named=False))


def _no_parameter(method: str, name: str, known: Iterable[str], settings: Sequence[str] = ()) -> RecipeError:
    """Return the error about a parameter that the method does not have, with the option or a name that is near it."""
    parameters = list(known)
    hint = did_you_mean(name, (*parameters, *settings), f"it has {', '.join(parameters) or 'none'}")
    hint = f"{_OPTIONS[name]} sets it" if name in _OPTIONS else hint
    hint = f"{_OPTIONS['only']} chooses keys of all inputs" if name in _FILTERS else hint
    return RecipeError(f"{method} has no parameter {quoted(name)}", hint=hint)


def named_input(text: str) -> tuple[str | None, str]:
    """Return the name and the path of an input that is given as ``PATH`` or ``NAME=PATH``."""
    name, sign, path = text.partition("=")
    if not sign or not name or not path or "/" in name or ":" in name or kind_at(text):
        return None, text
    return name, path


def _pair(text: str, option: str, example: str) -> tuple[str, object]:
    name, sign, value = text.rpartition("=")
    if not sign or not name or not value:
        raise RecipeError(f"{option} {quoted(text)} is not of the form NAME=VALUE", hint=f"{option} {example}")
    return name, _value(value)


def _weight_options(tables: Sequence[Mapping[str, object]], weights: Sequence[str]) -> str:
    """Return the values of --weight, for a hint. A number among the inputs is a weight without a name."""
    paths = [str(table["path"]) for table in tables]
    names = [str(table.get("name") or input_name(path)) for table, path in zip(tables, paths, strict=True)]
    merged = [name for name, path in zip(names, paths, strict=True) if not _is_number(path)]
    values = [text for text in (*weights, *paths) if _is_number(text)]
    if len(values) != len(merged):
        merged, values = merged[-1:] or ["B"], ["0.5"]
    return " --weight ".join(shell_word(f"{name}={value}") for name, value in zip(merged, values, strict=True))


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def _give(table: dict[str, object], name: str, value: object, option: str, text: str) -> None:
    if name in table:
        raise RecipeError(f"{option} {quoted(text)}: {name} is given already, as {table[name]}", hint="give it once")
    table[name] = value


def _of_input(inputs: Mapping[str, dict[str, object]], name: str, option: str) -> dict[str, object]:
    if name not in inputs:
        hint = did_you_mean(name, inputs, f"the inputs are {listed(list(inputs))}")
        raise RecipeError(f"{option}: there is no input {quoted(name)}", hint=hint)
    return inputs[name]


def _value(text: str) -> object:
    """Return a number, true or false where the text is one, else the text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
