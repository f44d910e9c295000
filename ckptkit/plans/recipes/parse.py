"""Parse a recipe of a merge: a TOML, JSON or YAML file, its content, or a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, cast

from ckptkit.core.arguments import refuse
from ckptkit.core.config_files import default_error_path, format_of, parse_table, read_text_file
from ckptkit.core.files.places import clean_path
from ckptkit.core.files.wildcards import expand_path
from ckptkit.core.text import did_you_mean, listed, quoted
from ckptkit.core.toml_lines import toml_lines
from ckptkit.errors import ArgumentError, PlanError, RecipeError
from ckptkit.plans.methods.table import METHODS, method_named
from ckptkit.plans.recipes.checks import checked
from ckptkit.plans.recipes.model import (
    COMPUTE,
    NON_FLOAT,
    NOT_PARAMETERS,
    ON_MISSING,
    ON_NONFINITE,
    Compute,
    CopiedKeys,
    MergeRecipe,
    NonFloat,
    OnMissingKey,
    OnNonfinite,
    Parameters,
    Places,
    RecipeInput,
    Setting,
    Slice,
)
from ckptkit.plans.recipes.paths import distinct_names, input_name, looks_like_path
from ckptkit.plans.recipes.tables import RecipeTable
from ckptkit.tensor_ops.mismatch import MISMATCH_NAMES, MismatchName

if TYPE_CHECKING:
    from ckptkit.plans.methods.model import Method

__all__ = ["INPUT_KEYS", "TOP_KEYS", "RecipeLike", "parse_recipe", "recipe_from_table", "recipe_from_text"]

# A recipe, the path of a TOML, JSON or YAML file of one, or its parsed content.
RecipeLike: TypeAlias = MergeRecipe | str | os.PathLike[str] | Mapping[str, object]

VERSION = 1
TOP_KEYS = (
    "version", "method", "base", "compute", "out_dtype", "seed", "device", "on_missing", "non_float", "on_nonfinite",
    "only", "copy", "dequantize", "layer_keys", "outer", "layer_count_field", "input", "set", "slice",
)  # fmt: skip
INPUT_KEYS = (
    "name", "path", "dequantize", "lora", "lora_scale", "strip", "rename", "rules", "on_mismatch", "last", "every",
)  # fmt: skip
_SET_KEYS = ("keys", "method", "take", "inputs")
_SLICE_KEYS = ("input", "layers")
_DEVICES = ("cpu",)
_COMMON = ("weight", "density")  # parameters of an input, which many methods have
_LATER = {
    "recipe": "merge that recipe first, and give its output as path",
    "vocab": "give all inputs as many rows first: ckpt remap PATH -o OUT --rules FILE, with pad or slice",
}


def parse_recipe(recipe: RecipeLike) -> MergeRecipe:
    """Return the checked recipe of a file, of its parsed content, or a recipe, which is checked again.

    The files of a path with wildcards are listed; no input is opened. Raises ``RecipeError``, with the line, where the
    recipe is not valid. Raises ``PathError`` where the file cannot be read, and ``RuleError`` where it is not a table.
    """
    if isinstance(recipe, MergeRecipe):
        return checked(recipe)
    if isinstance(recipe, Mapping):
        return recipe_from_table(recipe, Places())
    if not isinstance(recipe, str | os.PathLike):
        refuse(recipe, "recipe", "the path of a recipe, its content, or a MergeRecipe")
    path = clean_path(os.fsdecode(recipe))
    if "\n" in path:
        raise RecipeError("the recipe is a text, not the path of a file", hint="parse it first: tomllib.loads(text)")
    text_format = format_of(path)
    return recipe_from_text(read_text_file(path, text_format), text_format, path)


def recipe_from_text(text: str, text_format: str = "toml", path: str | None = None) -> MergeRecipe:
    """Return the recipe in a text of this format; ``path`` is its file, for messages. Raises as ``parse_recipe``."""
    with default_error_path(path):
        content = parse_table(text, text_format)
        return recipe_from_table(content, Places(path, toml_lines(text) if text_format == "toml" else {}))


def recipe_from_table(content: Mapping[str, object], places: Places) -> MergeRecipe:
    """Return the checked recipe with this content; ``places`` say where its parts are. Raises as ``parse_recipe``."""
    top = RecipeTable(content, places)
    if "version" in content and content["version"] != VERSION:
        raise top.error(f"version is {top.whole('version', VERSION, 0)}, and recipes have version {VERSION}", "version")
    _refuse_postponed(top)
    method = _method(top)
    if method is None:
        way = f'write method = "linear"; there are {", ".join(METHODS)}'
        error = top.error("the recipe names no method", hint=way)
        if "merge_method" in content:
            error.hint = "--from-mergekit FILE reads a configuration of mergekit"
            error.call = "only the command ckpt merge reads a configuration of mergekit"
        raise error
    methods = [method, *filter(None, map(_method, top.tables("set")))]
    known = _known(methods)
    top.refuse_unknown((*TOP_KEYS, *known), "a recipe")
    inputs = [each for table in top.tables("input") for each in _inputs(table, methods)]
    base, inputs, is_apart = _base(top, inputs)
    return checked(
        MergeRecipe(
            method.name,
            tuple(inputs),
            base,
            is_apart,
            _parameters(top, [name for name in content if name in known]),
            tuple(_setting(table, method) for table in top.tables("set")),
            cast("Compute", top.choice("compute", COMPUTE)),
            _dtype(top),
            top.whole("seed", 0, 0),
            _device(top),
            cast("OnMissingKey", top.choice("on_missing", ON_MISSING)),
            cast("NonFloat", top.choice("non_float", NON_FLOAT)),
            cast("OnNonfinite", top.choice("on_nonfinite", ON_NONFINITE)),
            top.patterns("only"),
            tuple(map(_copied, top.tables("copy"))),
            tuple(_slice(table, method) for table in top.tables("slice")),
            _layer_keys(top),
            top.text("outer"),
            top.text("layer_count_field"),
            _dequantize(top),
            places,
        )
    )


def _refuse_postponed(top: RecipeTable) -> None:
    for table in (top, *top.tables("input")):
        for name, way in _LATER.items():
            if name in table.content:
                raise table.error(f"{name} is not supported in a recipe yet", name, hint=way)


def _method(table: RecipeTable) -> type[Method] | None:
    name = table.text("method")
    try:
        return method_named(name) if name else None
    except ArgumentError as error:
        raise table.error(error.reason, "method", hint=error.hint) from None


def _known(methods: Sequence[type[Method]], *, of_inputs: bool = False) -> list[str]:
    """Return the names of the parameters of these methods, in order."""
    return list(
        dict.fromkeys(
            name
            for method in methods
            for name, parameter in method.parameters().items()
            if (parameter.is_per_input or not of_inputs) and name not in NOT_PARAMETERS
        )
    )


def _elsewhere(methods: Sequence[type[Method]]) -> dict[str, str]:
    """Return hints for parameters of the methods that no single input can have, and for keys of the recipe."""
    names = [name for name in (*_known(methods), *TOP_KEYS) if name not in _known(methods, of_inputs=True)]
    has = f"{methods[0].name} has {', '.join(_known(methods[:1])) or 'no parameters'}"
    absent = {name: f"{has}, and not {name}" for name in _COMMON if name not in _known(methods)}
    return absent | {name: f"{name} holds for all inputs: write it at the top" for name in names}


def _parameters(table: RecipeTable, names: Sequence[str]) -> Parameters:
    return {name: table.value(name) for name in names}


def _inputs(table: RecipeTable, methods: Sequence[type[Method]]) -> Iterator[RecipeInput]:
    """Yield the input of an ``[[input]]``, or one for each file of a path with wildcards."""
    per_input = _known(methods, of_inputs=True)
    table.refuse_unknown((*INPUT_KEYS, *per_input), "[[input]]", _elsewhere(methods))
    path = table.text("path")
    name = table.text("name", input_name(path) if path else "")
    if not name:
        raise table.error("an [[input]] has neither a name nor a path")
    number = table.path[-1]
    assert isinstance(number, int)  # noqa: S101 - of the table in its list
    found = RecipeInput(
        name,
        path,
        _parameters(table, [key for key in table.content if key in per_input]),
        _dequantize(table),
        table.text("lora"),
        table.number("lora_scale", 1.0),
        table.texts("strip"),
        table.texts("rename"),
        table.text("rules"),
        _on_mismatch(table),
        number,
    )
    if "lora_scale" in table.content and not found.lora:
        raise table.error("lora_scale without lora has no effect", "lora_scale")
    paths = expand_path(path)
    if paths is None:
        for key in ("last", "every"):
            if key in table.content:
                raise table.error(f"{key} chooses among the files of a path with wildcards", key)
        yield found
        return
    if "name" in table.content:
        raise table.error("several files of a path with wildcards cannot have one name", "name", hint="leave it out")
    chosen = paths[:: -table.whole("every", 1, 1)][::-1]  # the newest is always among them
    chosen = chosen[-table.whole("last", len(paths) or 1, 1) :]
    if not chosen:
        raise table.error(f"no file fits {quoted(path)}", "path")
    for own, each in zip(distinct_names(chosen), chosen, strict=True):
        yield replace(found, name=own, path=each)


def _on_mismatch(table: RecipeTable) -> MismatchName | Mapping[str, MismatchName]:
    given = table.content.get("on_mismatch", "")
    actions: Mapping[str, object] = given if isinstance(given, Mapping) else {"*": given}
    for pattern, action in actions.items():
        table.pattern("on_mismatch", pattern)
        if action not in MISMATCH_NAMES and "on_mismatch" in table.content:
            raise table.error(
                f"on_mismatch is {quoted(str(action))}, which is not an operation for other shapes",
                "on_mismatch",
                hint=did_you_mean(str(action), MISMATCH_NAMES, f"there are {', '.join(MISMATCH_NAMES)}"),
            )
    return cast("MismatchName | Mapping[str, MismatchName]", given)


def _base(top: RecipeTable, inputs: list[RecipeInput]) -> tuple[str, list[RecipeInput], bool]:
    """Return the name of the base, and the inputs, with a base that is given by its path before all others."""
    text = top.text("base")
    names = [each.name for each in inputs]
    if not text or text in names:
        return text, inputs, False
    if not looks_like_path(text):
        raise top.error(
            f"base is {quoted(text)}, which is neither the name of an input nor a path",
            "base",
            hint=did_you_mean(text, names, f"the inputs are {listed(names)}"),
        )
    same = next((each.name for each in inputs if each.path == text), None)
    if same is not None:
        return same, inputs, False
    name = input_name(text)
    return name, [RecipeInput(name, text, number=-1), *inputs], True


def _setting(table: RecipeTable, method: type[Method]) -> Setting:
    own = _method(table)
    known = _known([own or method])
    per_input = _known([own or method], of_inputs=True)
    table.refuse_unknown((*_SET_KEYS, *known), "[[set]]", dict.fromkeys(TOP_KEYS, "write it at the top"))
    keys = table.patterns("keys")
    if not keys:
        raise table.error("a [[set]] has no keys", hint='write keys = "model.layers.*"')
    inputs = table.table("inputs")
    by_input = {}
    for name in inputs.content:
        one = inputs.table(name)
        one.refuse_unknown(per_input, "an input", _elsewhere([own or method]))
        if one.content:
            by_input[name] = _parameters(one, list(one.content))
    parameters = _parameters(table, [name for name in table.content if name in known])
    take = table.text("take")
    if take and (own or parameters or by_input):
        raise table.error("take excludes a method and its parameters", "take", hint="leave out one of them")
    if not (take or own or parameters or by_input):
        raise table.error("a [[set]] sets nothing", hint="give a parameter, a method, or take")
    return Setting(keys, parameters, by_input, "" if own is None else own.name, take)


def _copied(table: RecipeTable) -> CopiedKeys:
    table.refuse_unknown(("keys", "from"), "an item of copy")
    keys, source = table.patterns("keys"), table.text("from")
    if not keys or not source:
        raise table.error("an item of copy needs keys and from", hint='copy = [{ keys = "lm_head.*", from = "A" }]')
    return CopiedKeys(keys, source)


def _slice(table: RecipeTable, method: type[Method]) -> Slice:
    known = _known([method])
    table.refuse_unknown((*_SLICE_KEYS, *known), "[[slice]]")
    layers = table.content.get("layers")
    if not isinstance(layers, list | tuple) or len(layers) != 2 or not all(type(one) is int for one in layers):
        raise table.error("layers must be two integers", "layers", hint="layers = [0, 24] is layers 0 to 23")
    first, end = layers
    if not 0 <= first < end:
        raise table.error(f"layers [{first}, {end}) are none", "layers", hint="layers = [0, 24] is layers 0 to 23")
    source = table.text("input")
    if not source:
        raise table.error("a [[slice]] names no input")
    return Slice(source, (first, end), _parameters(table, [name for name in table.content if name in known]))


def _layer_keys(top: RecipeTable) -> str:
    text = top.text("layer_keys")
    if text:
        top.pattern("layer_keys", text)
    return text


def _dtype(top: RecipeTable) -> str:
    text = top.text("out_dtype")
    return _float_dtype(top, "out_dtype", text) if text else ""


def _dequantize(table: RecipeTable) -> bool | str:
    given = table.flag_or_text("dequantize")
    return _float_dtype(table, "dequantize", given) if isinstance(given, str) else given


def _float_dtype(table: RecipeTable, name: str, text: str) -> str:
    from ckptkit.values.casting import float_dtype

    try:
        return float_dtype(text)
    except PlanError as error:
        raise table.error(f"{name}: {error.reason}", name, hint=error.hint) from None


def _device(top: RecipeTable) -> str:
    device = top.text("device", "cpu")
    if device not in _DEVICES:
        raise top.error(f"device is {quoted(device)}, and merges are computed on the CPU", "device")
    return device
