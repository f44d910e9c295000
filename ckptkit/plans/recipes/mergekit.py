"""Recipes from configurations of mergekit: what means the same, and sentences about what has no equal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeGuard

from ckptkit.core.config_files import default_error_path, parse_table
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.text import listed, quoted
from ckptkit.errors import ArgumentError, PlanError, RecipeError
from ckptkit.plans.methods.model import Method
from ckptkit.plans.methods.table import method_named
from ckptkit.plans.recipes.model import NOT_PARAMETERS, Gradient, MergeRecipe, Places, Value
from ckptkit.plans.recipes.parse import recipe_from_table
from ckptkit.plans.recipes.paths import input_name
from ckptkit.plans.recipes.writing import recipe_table

__all__ = ["LAYER_KEYS", "ImportedRecipe", "recipe_from_mergekit"]

LAYER_KEYS: Final = "model.layers.{i:int}.*"  # of Llama and most other language models
_KNOWN = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype")
_NO_EQUAL = {
    "tokenizer_source": "no tokenizer is read; --carry copies that of the base",
    "tokenizer": "no tokenizer is read; --carry copies that of the base",
    "chat_template": "no chat template is read; --carry copies that of the base",
}
_IGNORED = {"int8_mask": "it has no effect on the numbers"}
_NAMES = {"normalize_weights": "normalize", "filter_wise": "per"}
_AXIS = ("nuslerp_flatten", "nuslerp_row_wise")
_RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
_TRIMMED = ("ties", "breadcrumbs", "breadcrumbs_ties", *_RANDOM)  # all elements are kept where there is no density
_BASE_FIRST = ("slerp",)  # the base is the first of two inputs
_AFTER_LAYERS = ("model.norm.*", "lm_head.*")  # of the last slice in mergekit

# What holds for keys that have a text in them, or for all others: in order, the first that fits decides.
_Chain: TypeAlias = list[tuple[str | None, Any]]


@dataclass(frozen=True, slots=True)
class ImportedRecipe:
    """A recipe that means what a configuration of mergekit means, and sentences about what has no equal."""

    recipe: MergeRecipe
    notes: tuple[str, ...] = ()


def recipe_from_mergekit(text: str, path: str | None = None, *, layer_keys: str = LAYER_KEYS) -> ImportedRecipe:
    """Return the recipe that means what the YAML of mergekit in ``text`` means; ``path`` is its file, for messages.

    ``layer_keys`` is the pattern of the keys of a layer, which gradients go over and slices count. A note names each
    line that has no equal. Raises ``RecipeError`` for a configuration whose merge has no equal. Raises ``RuleError``
    where the text is not YAML, or where ruamel.yaml is not installed.

    Example:
        >>> text = '''
        ... merge_method: linear
        ... models:
        ...   - {model: a.safetensors, parameters: {weight: 1}}
        ...   - {model: b.safetensors, parameters: {weight: [{filter: mlp, value: 0}, {value: 2}]}}
        ... '''
        >>> recipe = recipe_from_mergekit(text).recipe
        >>> recipe.settings[0].keys, recipe.settings[0].inputs, recipe.inputs[1].parameters
        (('*mlp*',), {'b': {'weight': 0}}, {'weight': 2})
    """
    with default_error_path(path):
        content = parse_table(text, "yaml")
        return _Importer(content, _Lines.of(text), layer_keys).imported(path)


@dataclass(frozen=True, slots=True)
class _Lines:
    """The lines of keys and items of a YAML text, by their path."""

    found: Mapping[tuple[str | int, ...], int]

    @classmethod
    def of(cls, text: str) -> _Lines:
        from ruamel.yaml import YAML

        found: dict[tuple[str | int, ...], int] = {}
        waiting: list[tuple[tuple[str | int, ...], Any]] = [((), YAML(pure=True).load(text))]
        while waiting:
            path, value = waiting.pop()
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
            for key, inner in pairs:
                places = value.lc.data or {}
                if key in places:
                    found[*path, key] = places[key][0] + 1
                waiting.append(((*path, key), inner))
        return cls(found)

    def of_path(self, path: Sequence[str | int]) -> str:
        """Return the words for a place: ``line 3: ``, or nothing."""
        for end in range(len(path), 0, -1):
            if tuple(path[:end]) in self.found:
                return f"line {self.found[tuple(path[:end])]}: "
        return ""


@dataclass(slots=True)
class _Importer:
    content: Mapping[str, Any]
    lines: _Lines
    layer_keys: str
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # of the inputs, by their reference in mergekit
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the inputs, by name
    sets: dict[tuple[str, ...], list[dict[str, Any]]] = field(default_factory=dict)

    def imported(self, path: str | None) -> ImportedRecipe:
        """Return the recipe and the notes."""
        name = self.content.get("merge_method")
        if name is None:
            raise self.error(
                "the configuration has no merge_method", hint="one file has one merge, not several modules"
            )
        try:
            method = method_named(str(name))
        except ArgumentError as error:
            raise self.error(f"{error.reason}, or none that has an equal", "merge_method", hint=error.hint) from None
        for key in self.content:
            if key in _NO_EQUAL:
                self.note(f"{key} has no equal: {_NO_EQUAL[key]}", key)
            elif key not in _KNOWN:
                self.note(f"{key} has no equal", key)
        table: dict[str, Any] = {"method": method.name}
        models = self.models(method)
        base = self.base(method, models)
        table |= {} if not base else {"base": base}
        table |= self.dtypes()
        if method.name == "passthrough":
            table |= self.slices(base)
        else:
            table |= self.parameters(method, models, base)
        table["input"] = list(self.tables.values())
        if self.sets:
            table["set"] = [table for rows in self.sets.values() for table in rows]
        if method.name in _RANDOM:
            self.note(
                "the seed is not in the configuration: what mergekit takes as random-seed is seed here", "merge_method"
            )
        recipe = recipe_from_table(table, Places(path))
        return ImportedRecipe(recipe_from_table(recipe_table(recipe), Places(path)), tuple(self.notes))

    def error(self, reason: str, *path: str | int, hint: str | None = None) -> RecipeError:
        """Return the error about a place of the configuration."""
        return RecipeError(self.lines.of_path(path) + reason, hint=hint)

    def note(self, sentence: str, *path: str | int) -> None:
        """Add a note about a place of the configuration."""
        self.notes.append(self.lines.of_path(path) + sentence)

    def models(self, method: type[Method]) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the names of the inputs and their parameters, in order."""
        given = self.content.get("models")
        if given is None:
            given = self.models_of_slices(method)
        rows = [row for row in given if isinstance(row, Mapping)] if isinstance(given, list) else []
        if method.name == "passthrough" and "slices" in self.content:
            return []
        if not rows:
            raise self.error("the configuration has no models", "models")
        return [(self.name(row.get("model")), _mapping(row.get("parameters"))) for row in rows]

    def models_of_slices(self, method: type[Method]) -> list[Mapping[str, Any]]:
        """Return the sources of slices that are the same layers of all models, as if they were models."""
        slices = self.content.get("slices")
        if not isinstance(slices, list) or method.name == "passthrough":
            return []
        found = [_mapping(one).get("sources") for one in slices]
        sources = [list(map(_mapping, one)) if isinstance(one, list) else [] for one in found]
        end = 0
        for number, rows in enumerate(sources):
            given = [row.get("layer_range") for row in rows]
            ranges = {tuple(one) for one in given if _is_range(one)} if all(map(_is_range, given)) else set()
            same = [{k: v for k, v in row.items() if k != "layer_range"} for row in rows]
            first = [{k: v for k, v in row.items() if k != "layer_range"} for row in sources[0]]
            is_next = len(ranges) == 1 and next(iter(ranges))[0] == end
            if not is_next or same != first or _mapping(slices[number]).keys() != {"sources"}:
                raise self.error(
                    f"slices of {method.name} that differ in their layers or parameters have no equal",
                    "slices",
                    number,
                    hint="write models in place of slices, and a [[set]] for the layers that differ",
                )
            end = next(iter(ranges))[1]
        self.note(f"layer_range [0, {end}] is taken to be all layers", "slices", 0, "sources", 0, "layer_range")
        return [{key: value for key, value in row.items() if key != "layer_range"} for row in sources[0]]

    def name(self, model: object) -> str:
        """Return the name of an input, and make its table."""
        if isinstance(model, Mapping):
            inner = model.get("model", model)
            path = inner.get("path") if isinstance(inner, Mapping) else inner
            lora = model.get("lora")
            lora = lora.get("path") if isinstance(lora, Mapping) else lora
            model = f"{path}+{lora}" if path and lora else path
        if not isinstance(model, str) or not model:
            raise self.error(f"{model!r} is not the name of a model", "models")
        if model not in self.names:
            path, _, lora = model.partition("+")
            name = own = input_name(path)
            number = 2
            while name in self.tables:
                name, number = f"{own}{number}", number + 1
            self.names[model] = name
            self.tables[name] = {"name": name, "path": path, **({"lora": lora} if lora else {})}
        return self.names[model]

    def base(self, method: type[Method], models: list[tuple[str, Mapping[str, Any]]]) -> str:
        """Return the name of the base, or nothing where the method has none."""
        given = self.content.get("base_model")
        if given is None:
            return ""
        known = {name for name, _ in models}
        name = self.name(given)
        if method.name in _BASE_FIRST or method.name == "passthrough":
            self.tables = {name: self.tables[name], **self.tables}
            return name if method.name == "passthrough" else ""
        if method.uses_base == "never" and name not in known:
            del self.tables[name]
            self.note(f"{method.name} has no base here: {quoted(str(given))} is left out", "base_model")
            return ""
        return name if method.uses_base != "never" else ""

    def dtypes(self) -> dict[str, str]:
        """Return the dtype of the output; mergekit also rounds its inputs to ``dtype``."""
        from ckptkit.values.casting import float_dtype

        found = {}
        for key in ("dtype", "out_dtype"):
            if self.content.get(key) is not None:
                try:
                    found[key] = float_dtype(str(self.content[key]))
                except PlanError as error:
                    raise self.error(f"{key}: {error.reason}", key, hint=error.hint) from None
        if "dtype" in found and DTYPES[found["dtype"]].bits < 32:
            self.note(
                f"dtype: mergekit computes in {self.content['dtype']}; here in float32, with one rounding", "dtype"
            )
        out = found.get("out_dtype", found.get("dtype"))
        wide = {"compute": "float64"} if found.get("dtype") == "F64" else {}
        return {**wide, **({"out_dtype": out} if out else {})}

    def parameters(
        self, method: type[Method], models: list[tuple[str, Mapping[str, Any]]], base: str
    ) -> dict[str, Any]:
        """Return the parameters for all keys; those of inputs and of some keys are put where they belong."""
        at_top = self.translated(method, _mapping(self.content.get("parameters")), "parameters")
        found: dict[str, Any] = {}
        own = {}
        for number, (name, given) in enumerate(models):
            own[name] = self.translated(method, given, "models", number, "parameters")
        for name, parameter in method.parameters().items():
            if name in NOT_PARAMETERS:
                continue
            if not parameter.is_per_input:
                found |= self.placed(name, at_top.get(name, []), "")
                continue
            for each, of_input in own.items():
                chain = of_input.get(name, [])
                if not any(condition is None for condition, _ in chain):
                    chain = [*chain, *at_top.get(name, [])]
                if each != base:
                    self.tables[each] |= self.placed(name, chain, each)
        if method.name in _TRIMMED:
            for each in own:
                if each != base and "density" in method.parameters():
                    self.tables[each].setdefault("density", 1.0)
        if method.name in _RANDOM:
            found = {"masks": "torch", **found}
            found.setdefault("rescale", "l1")
        return found

    def translated(self, method: type[Method], given: Mapping[str, Any], *path: str | int) -> dict[str, _Chain]:
        """Return what parameters of mergekit are here, by their names here."""
        known = method.parameters()
        found: dict[str, _Chain] = {}
        for key, value in given.items():
            name = _NAMES.get(key, key)
            if key in _IGNORED:
                self.note(f"{key} is left out: {_IGNORED[key]}", *path, key)
            elif key in _AXIS and "axis" in known:
                continue
            elif name in known and name not in NOT_PARAMETERS:
                found[name] = [(condition, _word(key, one)) for condition, one in _chain(value)]
            else:
                self.note(f"{key} has no equal in {method.name}", *path, key)
        if "axis" in known and given.get("nuslerp_flatten", True) is False:
            found["axis"] = [(None, "columns" if given.get("nuslerp_row_wise") else "rows")]
        return found

    def placed(self, name: str, chain: _Chain, of_input: str) -> dict[str, Any]:
        """Add the sets of a parameter, and return its value for all other keys."""
        rows: list[tuple[str, Any]] = []
        rest: dict[str, Any] = {}
        for condition, value in chain:
            values = [_number(one) for one in value] if isinstance(value, list) else []
            outside = values[0] if values else value  # the value of the keys outside layers
            if len(values) > 1:
                over = next(each for each, is_int in _captures(self.layer_keys).items() if is_int)
                rows.append((self.in_layers(condition), Gradient(over, tuple(values))))
                if condition is not None:
                    why = "in mergekit, keys outside layers get the first value of the gradient"
                    self.notes.append(f"{name} for {quoted(condition)}: {why}")
                    continue
            if condition is None:
                rest = {name: outside}
                break
            rows.append((_containing(condition), outside))
        self.add_sets(name, rows, of_input)
        return rest

    def add_sets(self, name: str, rows: list[tuple[str, Any]], of_input: str) -> None:
        """Add a set for each row; parameters with the same patterns in the same order share their sets."""
        keys = tuple(key for key, _ in rows)
        if not keys:
            return
        tables = self.sets.setdefault(keys, [{"keys": key} for key in keys])
        for table, (_, value) in zip(tables, rows, strict=True):
            if of_input:
                table.setdefault("inputs", {}).setdefault(of_input, {})[name] = _plain(value)
            else:
                table[name] = _plain(value)

    def in_layers(self, text: str | None, layers: str = "") -> str:
        """Return the pattern of the keys of layers that have a text in them, of all or of some, as in ``2..5``."""
        pattern = self.layer_keys
        if layers:
            counter = next(name for name, is_int in _captures(pattern).items() if is_int)
            pattern = pattern.replace(f"{{{counter}:int}}", f"{{{layers}}}")
        before = self.layer_keys.partition("{")[0]
        if text is None or text in before:
            return pattern
        if re.search(r"[*{}]", text) or not pattern.endswith("*"):
            raise RecipeError(f"the filter {quoted(text)} together with layers has no equal")
        return f"{pattern}{text}*"

    def slices(self, base: str) -> dict[str, Any]:
        """Return what slices of layers are here."""
        given = self.content.get("slices")
        if not isinstance(given, list) or not given:
            raise self.error(
                "passthrough without slices has no equal", "merge_method", hint="join files with on_missing"
            )
        rows: list[dict[str, Any]] = []
        start = 0
        for number, one in enumerate(given):
            sources = _mapping(one).get("sources")
            if not isinstance(sources, list) or len(sources) != 1:
                raise self.error("a slice of passthrough has one source", "slices", number)
            source = _mapping(sources[0])
            layers = source.get("layer_range")
            if not _is_range(layers):
                raise self.error(
                    "a slice without two layers as layer_range has no equal", "slices", number, "sources", 0
                )
            count = layers[1] - layers[0]
            row = {"input": self.name(source.get("model")), "layers": list(layers)}
            place = ("slices", number, "sources", 0, "parameters")
            scales = self.translated(method_named("passthrough"), _mapping(source.get("parameters")), *place)
            numbers = str(start) if count == 1 else f"{start}..{start + count - 1}"
            for condition, value in scales.get("scale", []):
                if isinstance(value, list):
                    raise self.error("a gradient of a slice has no equal", *place)
                if condition is None:
                    row["scale"] = value
                    break
                self.add_sets("scale", [(self.in_layers(condition, numbers), value)], "")
            if number in (0, len(given) - 1) and row.get("scale", 1) != 1:
                self.note("scale of the first and the last slice holds for layers only", *place)
            rows.append(row)
            start += count
        first, last = rows[0]["input"], rows[-1]["input"]
        if last != first:
            self.sets["outside"] = [{"keys": list(_AFTER_LAYERS), "take": last}]  # type: ignore[index]
            sentence = f"{listed(_AFTER_LAYERS)} are taken to be what is after the layers, from {quoted(last)}"
            self.note(sentence, "slices", len(given) - 1, "sources", 0, "model")
        return {"layer_keys": self.layer_keys, "outer": first, "slice": rows} | ({"base": base} if base else {})


def _is_range(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _chain(value: Any) -> Iterator[tuple[str | None, Any]]:
    """Yield the text that keys must have, or None for all keys, and the value, up to the first that fits all."""
    if not (isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value)):
        yield None, value
        return
    for one in value:
        condition = one.get("filter")
        is_all = condition in (None, "", "*")
        yield (None if is_all else str(condition)), one.get("value")
        if is_all:
            return


def _word(key: str, value: Any) -> Any:
    """Return a value of mergekit as it is written here."""
    if key == "rescale":
        return "l1" if value else "none"
    if key == "filter_wise":
        return "row" if value else "tensor"
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{value!r} is not a number of a gradient")
    return value


def _plain(value: Value) -> object:
    return {"over": value.over, "values": list(value.values)} if isinstance(value, Gradient) else value


def _captures(pattern: str) -> Mapping[str, bool]:
    from ckptkit.core.patterns import parse_pattern

    return parse_pattern(pattern).captures


def _containing(text: str) -> str:
    """Return the pattern of all keys that have a text in them."""
    return f"re:.*{re.escape(text)}.*" if re.search(r"[*{}]", text) else f"*{text}*"
