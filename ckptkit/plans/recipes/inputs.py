"""The inputs of a recipe: opened, with numbers for quantised weights, an adapter folded in, and other names of keys."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptkit.adapters.keys import is_adapter
from ckptkit.core.checkpoint import Checkpoint, TensorInfo, under_key
from ckptkit.core.config_files import read_settings
from ckptkit.core.text import listed, plural, printable, quoted
from ckptkit.core.toml_lines import TomlPath
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import OPTION, PathError, RecipeError, RuleError
from ckptkit.formats.directories.model_files import MODEL_CONFIG
from ckptkit.formats.directories.side_files import file_beside
from ckptkit.formats.directories.tied_head import TiedHead, tied_head
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.plans.plan import Dropped, Plan, Source
from ckptkit.plans.recipes.model import MergeRecipe, RecipeInput
from ckptkit.plans.steps import dropped_entries, refuse_suspicious
from ckptkit.quantized import quantized_weights
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Derivation, Rules, describe_output
from ckptkit.rules.parse import parse_rules

if TYPE_CHECKING:
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = [
    "AlignedInput",
    "Ingredient",
    "adapter_role",
    "align_input",
    "input_path",
    "joined",
    "opened_recipe",
    "reference_of",
]

_ADAPTER = ".lora"  # ends the role of an adapter


@dataclass(frozen=True, slots=True)
class Ingredient:
    """What one input has for one key: the description, and what it is made of (a recipe of None: a copy).

    ``dtype`` is the dtype that the input has for the key, where ``info`` is wider so that nothing is rounded twice.
    """

    info: TensorInfo
    sources: tuple[Source, ...]
    recipe: Recipe | None = None
    equals: tuple[Source, ...] = ()
    dtype: str = ""

    @property
    def own_dtype(self) -> str:
        """The dtype that the input has for the key."""
        return self.dtype or self.info.dtype


@dataclass(frozen=True, slots=True)
class AlignedInput:
    """An input with the keys that it has in the output.

    ``tensors`` has them in order; ``dropped`` is what its rules leave out, and ``notes`` what they say. ``renamed`` has
    the new key of each key that is only renamed. ``head`` is the tie of its output weights by its ``config.json``.
    """

    each: RecipeInput
    checkpoint: Checkpoint
    tensors: dict[str, Ingredient]
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    head: TiedHead | None = None

    @property
    def name(self) -> str:
        """The name of the input, which is its role."""
        return self.each.name


def adapter_role(name: str) -> str:
    """Return the role of the adapter that is folded into an input."""
    return f"{name}{_ADAPTER}"


def reference_of(recipe: MergeRecipe) -> str:
    """Return the name of the input that has the order of keys, the dtypes and the ties: the base, or the first."""
    return recipe.base or recipe.outer or recipe.inputs[0].name


@contextlib.contextmanager
def opened_recipe(
    recipe: MergeRecipe, given: Mapping[str, CheckpointLike]
) -> Iterator[tuple[dict[str, Checkpoint], dict[str, str]]]:
    """Give the inputs by role, the base first, and their paths; what is opened here is closed at the end.

    ``given`` has inputs in place of their paths. Raises ``RecipeError`` for a path of the recipe that cannot be read,
    for an input without a path, and for a name in ``given`` that no input has. Raises what ``opened`` raises besides.
    """
    names = [each.name for each in recipe.inputs]
    for name in given:
        if name not in names:
            raise RecipeError(f"the recipe has no input {quoted(name)}", hint=f"its inputs are {listed(names)}")
    first = reference_of(recipe)
    paths: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        roles: dict[str, Checkpoint] = {}
        for each in sorted(recipe.inputs, key=lambda one: one.name != first):
            if each.name not in given and not each.path:
                raise recipe.places.error(
                    f"{quoted(each.name)} has no path", "input", each.number, hint='path = "model.safetensors"'
                )
            values: dict[str, CheckpointLike] = {each.name: given.get(each.name, each.path)}
            if each.lora:
                values[adapter_role(each.name)] = each.lora
            for role, value in values.items():
                of_recipe = role not in given and recipe.places.is_named  # a path on the command line has no line
                with _errors_of_recipe(recipe, each.name, role) if of_recipe else contextlib.nullcontext():
                    roles[role] = stack.enter_context(opened(value, role))
                refuse_suspicious(roles[role], role)
                if isinstance(value, str):
                    paths[role] = value
        yield roles, paths


def input_path(recipe: MergeRecipe, name: str) -> TomlPath:
    """Return the place of an input in the recipe, for messages."""
    number = recipe.input(name).number
    return ("base",) if number < 0 else ("input", number)


@contextlib.contextmanager
def _errors_of_recipe(recipe: MergeRecipe, name: str, role: str) -> Iterator[None]:
    """Make an error about the path of an input, or of its adapter, one about that line of the recipe."""
    try:
        yield
    except PathError as error:
        is_adapter_path = role != name
        place = input_path(recipe, name)
        of_path = place if place == ("base",) else (*place, "lora" if is_adapter_path else "path")
        what = f"lora of input {quoted(name)}" if is_adapter_path else f"input {quoted(name)}"
        where = f": {printable(error.path)}" if error.path else ""
        raise recipe.places.error(f"{what}: {error.reason}{where}", *of_path, hint=error.hint) from None


def align_input(
    recipe: MergeRecipe, each: RecipeInput, roles: Mapping[str, Checkpoint], views: Mapping[str, Checkpoint]
) -> AlignedInput:
    """Return an input with its adapter folded in, and the names that its rules give its keys.

    ``views`` has the inputs with numbers in place of quantised weights. Raises ``RecipeError`` where it has quantised
    weights that the recipe does not dequantise, ``RuleError`` for its rules, and what ``plan_lora`` raises.
    """
    checkpoint = views[each.name]
    _refuse_quantized(recipe, each, checkpoint)
    if is_adapter(checkpoint):
        raise recipe.places.error(
            f"{quoted(each.name)} is an adapter, and the mean of factors is not the factor of a mean",
            "input",
            each.number,
            hint=f"fold it into its base: give the path of the base as {quoted(each.name)}, and the adapter as "
            f"{recipe.places.setting('lora', 'PATH', each.name)}",
        )
    notes: list[str] = []
    dropped: list[Dropped] = list(dropped_entries(roles[each.name], each.name))
    tensors = {key: Ingredient(info, (Source(each.name, key),)) for key, info in checkpoint.items()}
    names: Checkpoint = checkpoint
    if each.lora:
        folded = _fold(each, checkpoint, roles[adapter_role(each.name)])
        tensors = {
            step.out.key: _ingredient(step.out, step.sources, step.recipe, views, roles) for step in folded.steps
        }
        notes += folded.notes
        dropped += [drop for drop in folded.dropped if drop not in dropped]
        names = as_checkpoint({key: under_key(one.info, key) for key, one in tensors.items()}, each.name)
    rules = _rules(recipe, each, checkpoint)
    if not rules.stages:
        found = AlignedInput(each, checkpoint, tensors, tuple(dropped), tuple(notes), {key: key for key in tensors})
        return replace(found, head=_head(found))
    try:
        key_map = apply_rules(rules, names)
        made = {key: _made(key, one, tensors) for key, one in key_map.outputs().items()}
    except RuleError as error:
        raise _rules_error(recipe, each, error) from None
    dropped += [
        Dropped(source.role, source.key, reason)
        for key, reason in key_map.dropped.items()
        for source in tensors[key].sources
    ]
    notes += key_map.notes
    found = AlignedInput(each, checkpoint, made, tuple(dropped), tuple(notes), key_map.renamed)
    return replace(found, head=_head(found))


def _refuse_quantized(recipe: MergeRecipe, each: RecipeInput, checkpoint: Checkpoint) -> None:
    weights = quantized_weights(checkpoint).weights
    if weights:
        count = plural(len(weights), "quantised weight")
        raise recipe.places.error(
            f"{quoted(each.name)} has {count} ({weights[0].scheme}), such as {quoted(weights[0].key)}",
            "input",
            each.number,
            hint=f"{recipe.places.setting('dequantize', value=True, of_input=each.name)} merges them as numbers"
            + ("" if recipe.places.is_named else ", and --dequantize those of all inputs"),
        )


def _fold(each: RecipeInput, checkpoint: Checkpoint, adapter: Checkpoint) -> Plan:
    """Return the plan that folds the adapter of an input, with the roles that both have in the recipe."""
    from ckptkit.plans.adapters.fold import plan_folds
    from ckptkit.plans.adapters.inputs import BASE, DONOR
    from ckptkit.plans.policies import UNEXPECTED_ACTIONS, parse_policy

    policy = parse_policy("on_unexpected", "error", UNEXPECTED_ACTIONS)
    plan = plan_folds({BASE: checkpoint, DONOR: adapter}, [None], None, [each.lora_scale], policy)
    roles = {BASE: each.name, DONOR: adapter_role(each.name)}
    steps = [
        replace(step, sources=tuple(Source(roles[one.role], one.key) for one in step.sources)) for step in plan.steps
    ]
    dropped = [replace(drop, role=roles[drop.role]) for drop in plan.dropped]
    return replace(plan, steps=tuple(steps), dropped=tuple(dropped))


def _ingredient(
    out: TensorInfo,
    sources: tuple[Source, ...],
    recipe: Recipe | None,
    views: Mapping[str, Checkpoint],
    roles: Mapping[str, Checkpoint],
) -> Ingredient:
    """Return what a step of a fold makes, in float32 where it computes with 16-bit numbers."""
    if recipe is None:
        return Ingredient(out, sources)
    from ckptkit.tensor_ops.recipes import recipe_dtype, with_float32_inputs

    dtypes = [(views.get(one.role) or roles[one.role])[one.key].dtype for one in sources]
    wide = with_float32_inputs(recipe, dtypes)
    return Ingredient(TensorInfo(out.key, recipe_dtype(wide, dtypes), out.shape), sources, wide, dtype=out.dtype)


def _rules(recipe: MergeRecipe, each: RecipeInput, checkpoint: Checkpoint) -> Rules:
    try:
        own = parse_rules(rename=each.rename, strip=each.strip)
        file = rules_for(each.rules, checkpoint) if each.rules else Rules()
    except RuleError as error:
        raise _rules_error(recipe, each, error) from None
    return Rules((*own.stages, *file.stages), file.allow_unused)


def _rules_error(recipe: MergeRecipe, each: RecipeInput, error: RuleError) -> RecipeError:
    """Return the error about the rules of an input; a recipe has no option that allows unused rules."""
    hint = (error.hint or "").partition("or pass --allow-unused")[0].rstrip("; ")
    parts = [part for part in hint.split("; ") if not part.startswith("--keep ")]  # an input has no such key
    hint = OPTION.sub(lambda match: _way(recipe, each, match), "; ".join(parts))
    return recipe.places.error(f"{quoted(each.name)}: {error.reason}", "input", each.number, hint=hint or None)


def _way(recipe: MergeRecipe, each: RecipeInput, match: re.Match[str]) -> str:
    """Return how an input says what an option of ``ckpt remap`` says; other options stay."""
    if match["name"] not in ("rename", "strip"):
        return match[0]
    if match["value"] is None:
        return match["name"]
    value = shlex.split(match["value"])[0]
    places = recipe.places
    return places.renaming(value, each.name) if match["name"] == "rename" else places.setting("strip", value, each.name)


def _made(key: str, derivation: Derivation, tensors: Mapping[str, Ingredient]) -> Ingredient:
    """Return what the rules make for a key of the tensors before them."""
    parts = [tensors[name] for name in derivation.sources]
    equals = tuple(source for name in derivation.equals for source in tensors[name].sources)
    if derivation.recipe is None:
        return replace(parts[0], equals=(*parts[0].equals, *equals))
    info = describe_output(key, [part.info for part in parts], derivation.recipe, derivation.rule)
    sources, inner = joined(parts)
    from ckptkit.tensor_ops.recipes import substituted

    return Ingredient(info, sources, substituted(derivation.recipe, inner), equals)


def joined(parts: Iterable[Ingredient]) -> tuple[tuple[Source, ...], list[int | Recipe]]:
    """Return the sources of several ingredients, and each of these as an input of a recipe over all sources."""
    sources: list[Source] = []
    inner: list[int | Recipe] = []
    for part in parts:
        first = len(sources)
        sources += part.sources
        if part.recipe is None:
            inner.append(first)
        else:
            from ckptkit.tensor_ops.recipes import renumbered

            inner.append(renumbered(part.recipe, range(first, len(sources))))
    return tuple(sources), inner


def _head(found: AlignedInput) -> TiedHead | None:
    """Return the tie of the output weights that the ``config.json`` beside an input states."""
    checkpoint = found.checkpoint
    beside = file_beside(checkpoint.path, MODEL_CONFIG) if checkpoint.files else None
    if beside is None:
        return None
    head = tied_head({key: one.info.shape for key, one in found.tensors.items()}, read_settings(beside, MODEL_CONFIG))
    return head if head is not None and head.is_sure and head.embedding in found.tensors else None
