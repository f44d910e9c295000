"""The checks of a recipe that need no input, however the recipe was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ckptkit.core.patterns import parse_pattern
from ckptkit.core.text import did_you_mean, listed, plural, quoted, shell_word
from ckptkit.core.toml_lines import TomlPath
from ckptkit.errors import ArgumentError
from ckptkit.plans.methods.table import method_named
from ckptkit.plans.recipes.model import Gradient, MergeRecipe, Parameters

if TYPE_CHECKING:
    from ckptkit.plans.methods.model import Method

__all__ = ["checked", "merged_inputs"]


def checked(recipe: MergeRecipe) -> MergeRecipe:
    """Return the recipe; raise ``RecipeError`` where it contradicts itself or its methods."""
    _check_names(recipe)
    _check_references(recipe)
    _check_slices(recipe)
    _check_methods(recipe)
    for path, method, parameters, where in _given(recipe):
        _check_values(recipe, path, method, parameters, where)
    _check_required(recipe)
    return recipe


def merged_inputs(recipe: MergeRecipe, method: type[Method]) -> list[str]:
    """Return the names of the inputs that a method merges, in order; its base is not one of them."""
    is_apart = recipe.is_base_apart or method.uses_base != "never"
    return [each.name for each in recipe.inputs if not (is_apart and each.name == recipe.base)]


def _check_names(recipe: MergeRecipe) -> None:
    adapters = {f"{each.name}.lora": each for each in recipe.inputs if each.lora}
    for each in recipe.inputs:
        if each.name in adapters:
            raise recipe.places.error(
                f"{quoted(each.name)} is also the name of the adapter of {quoted(adapters[each.name].name)}",
                "input",
                each.number,
                hint='give it another: name = "..."',
            )
    counts = Counter(each.name for each in recipe.inputs)
    for each in recipe.inputs:
        if counts[each.name] > 1:
            first, second = [other for other in recipe.inputs if other.name == each.name][:2]
            raise recipe.places.error(
                f"two inputs have the name {quoted(each.name)}: {quoted(first.path)} and {quoted(second.path)}",
                "input",
                second.number,
                hint='give one of them another: name = "..."'
                if recipe.places.is_named
                else f"NAME=PATH gives another name, as in {shell_word(f'other={second.path}')}",
            )


def _check_references(recipe: MergeRecipe) -> None:
    """Raise ``RecipeError`` for the name of an input that does not exist."""
    names = [each.name for each in recipe.inputs]
    used: list[tuple[str, TomlPath]] = [(recipe.base, ("base",)), (recipe.outer, ("outer",))]
    used += [(each.source, ("copy", number, "from")) for number, each in enumerate(recipe.copy)]
    used += [(each.take, ("set", number, "take")) for number, each in enumerate(recipe.settings)]
    used += [(name, ("set", at, "inputs", name)) for at, each in enumerate(recipe.settings) for name in each.inputs]
    used += [(each.input, ("slice", number, "input")) for number, each in enumerate(recipe.slices)]
    for name, path in used:
        if name and name not in names:
            raise recipe.places.error(
                f"there is no input {quoted(name)}",
                *path,
                hint=did_you_mean(name, names, f"the inputs are {listed(names)}"),
            )


def _check_slices(recipe: MergeRecipe) -> None:
    places = recipe.places
    if not recipe.slices:
        for name in ("layer_keys", "outer", "layer_count_field"):
            if getattr(recipe, name):
                raise places.error(f"{name} without a [[slice]] has no effect", name)
        return
    if recipe.method != "passthrough":
        raise places.error(f"a [[slice]] needs passthrough, not {recipe.method}", "slice", 0)
    if not recipe.layer_keys:
        raise places.error(
            "slices need layer_keys, which say what a layer is",
            "slice",
            0,
            hint='layer_keys = "model.layers.{i:int}.*"',
        )
    for name, given in (("only", recipe.only), ("copy", recipe.copy)):
        if given:
            raise places.error(f"{name} and slices exclude each other", name, hint="outer has all keys outside layers")
    for number, setting in enumerate(recipe.settings):
        if setting.method:
            raise places.error("with slices, a [[set]] can only have a scale or take", "set", number)
    captures = [name for name, is_int in parse_pattern(recipe.layer_keys).captures.items() if is_int]
    if len(captures) != 1:
        raise places.error("layer_keys must have one capture of a number, such as {i:int}", "layer_keys")
    if not (recipe.outer or recipe.base or len(recipe.inputs) == 1):
        raise places.error(
            "nothing says which input has the keys outside the layers", "slice", 0, hint='outer = "NAME", or base'
        )


def _check_methods(recipe: MergeRecipe) -> None:
    """Raise ``RecipeError`` where a method lacks its base, or gets too few or too many inputs."""
    uses: list[tuple[str, TomlPath]] = [(recipe.method, ("method",))]
    uses += [(each.method, ("set", at, "method")) for at, each in enumerate(recipe.settings) if each.method]
    for name, path in uses:
        method = method_named(name)
        if method.uses_base == "always" and not recipe.base:
            option = 'base = "NAME"' if recipe.places.is_named else "--base"
            raise recipe.places.error(
                f"{name} needs a base", *path, hint=f"{option} is the name of one of the inputs, or a path"
            )
        if recipe.slices:
            continue
        count = len(merged_inputs(recipe, method))
        most = None if recipe.on_missing == "present" or name == "passthrough" else method.most
        if count < method.fewest or (most is not None and count > most):
            wanted = _words(method.fewest, method.most)
            beside = " beside the base" if method.uses_base != "never" and recipe.base else ""
            hint = method.for_more if count > method.fewest else None
            raise recipe.places.error(f"{name} merges {wanted}{beside}, and there {_are(count)}", *path, hint=hint)


def _words(least: int, most: int | None) -> str:
    if most == least:
        return plural(least, "input")
    return f"at least {plural(least, 'input')}" if most is None else f"{least} to {plural(most, 'input')}"


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"


_Given = tuple[TomlPath, str, Parameters, str]


def _given(recipe: MergeRecipe) -> Iterator[_Given]:
    """Yield every table of parameters: its place, its method (empty for any of the recipe), and its input."""
    yield (), "", recipe.parameters, ""
    for each in recipe.inputs:
        yield ("input", each.number), "", each.parameters, each.name
    for number, setting in enumerate(recipe.settings):
        method = setting.method or recipe.method
        yield ("set", number), method, setting.parameters, ""
        for name, parameters in setting.inputs.items():
            yield ("set", number, "inputs", name), method, parameters, name
    for number, each_slice in enumerate(recipe.slices):
        yield ("slice", number), recipe.method, each_slice.parameters, ""


def _check_values(recipe: MergeRecipe, path: TomlPath, method: str, parameters: Parameters, of_input: str) -> None:
    methods = [method] if method else [recipe.method, *(each.method for each in recipe.settings if each.method)]
    for name, value in parameters.items():
        known = [row for row in map(method_named, dict.fromkeys(methods)) if name in row.parameters()]
        if not known:
            raise recipe.places.error(f"{' and '.join(methods)} has no parameter {quoted(name)}", *path, name)
        if of_input and all(row.uses_base != "never" and of_input == recipe.base for row in known):
            raise recipe.places.error(
                f"{name} of {quoted(of_input)} has no effect, because it is the base of {known[0].name}", *path, name
            )
        for row in known:
            _check_value(recipe, (*path, name), row, name, value)


def _check_gradient(recipe: MergeRecipe, path: TomlPath, name: str, value: Gradient) -> None:
    """Raise ``RecipeError`` unless every pattern of the keys of a gradient has the capture that it goes over."""
    if path[0] != "set":
        raise recipe.places.error(
            f"{name} is a gradient, which needs the keys of a [[set]] to go over",
            *path,
            hint='[[set]] with keys = "model.layers.{i:int}.*"',
        )
    number = path[1]
    assert isinstance(number, int)  # noqa: S101 - of a table in a list
    for text in recipe.settings[number].keys:
        if not parse_pattern(text).captures.get(value.over):
            raise recipe.places.error(
                f"{name} goes over {quoted(value.over)}, and {quoted(text)} has no {{{value.over}:int}}",
                *path,
                hint=f"write the number that counts as {{{value.over}:int}}",
            )


def _check_value(recipe: MergeRecipe, path: TomlPath, method: type[Method], name: str, value: object) -> None:
    parameter = method.parameters()[name]
    if isinstance(value, Gradient) and parameter.kind not in ("number", "count"):
        raise recipe.places.error(f"{name} is not a number, and cannot be a gradient", *path)
    if isinstance(value, Gradient):
        _check_gradient(recipe, path, name, value)
    for one in value.values if isinstance(value, Gradient) else (value,):
        try:
            parameter.check(one)
        except ArgumentError as error:
            raise recipe.places.error(error.reason, *path, hint=error.hint) from None


def _check_required(recipe: MergeRecipe) -> None:
    """Raise ``RecipeError`` for a parameter without a default that nothing in the recipe gives to an input."""
    if recipe.slices:
        return
    for number, name in [(None, recipe.method), *((at, each.method) for at, each in enumerate(recipe.settings))]:
        if not name:
            continue
        method = method_named(name)
        names = merged_inputs(recipe, method)
        settings = [each for each in recipe.settings if (each.method or recipe.method) == name]
        anywhere: set[str] = {*recipe.parameters, *(key for each in settings for key in each.parameters)}
        for key, parameter in method.parameters().items():
            if parameter.default is not None or key in anywhere:
                continue
            by_input: Mapping[str, bool] = {
                each.name: key in each.parameters or any(key in one.inputs.get(each.name, {}) for one in settings)
                for each in recipe.inputs
            }
            lacking = [each for each in names if not by_input[each]] if parameter.is_per_input else [""]
            if lacking:
                of = f" for {listed(lacking)}" if parameter.is_per_input and len(lacking) < len(names) else ""
                path = ("method",) if number is None else ("set", number, "method")
                hint = f"{key} is {parameter.range_text}: {parameter.meaning}"
                if parameter.kind == "number":
                    hint += f", such as {recipe.places.setting(key, 0.5, lacking[0])}"
                raise recipe.places.error(f"{name} needs {key}{of}", *path, hint=hint)
