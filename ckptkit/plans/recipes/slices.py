"""Layers of inputs one after the other: which layer of which input each layer of the output is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ckptkit.core.patterns import Pattern, parse_pattern, parse_template
from ckptkit.core.text import listed, plural, quoted
from ckptkit.plans.plan import LayerCount
from ckptkit.plans.recipes.alignment import Decision, Decisions
from ckptkit.plans.recipes.inputs import AlignedInput, Ingredient
from ckptkit.plans.recipes.model import MergeRecipe
from ckptkit.plans.recipes.parameters import KeySettings, index_of

__all__ = ["decide_slices", "layer_count", "outer_of"]

_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class _Placed:
    """A tensor of the output: the input that has it, what it is there, and the number of its slice."""

    name: str
    one: Ingredient
    slice_number: int | None = None


def outer_of(recipe: MergeRecipe) -> str:
    """Return the name of the input that has the keys outside the layers."""
    return recipe.outer or recipe.base or recipe.inputs[0].name


def decide_slices(recipe: MergeRecipe, inputs: Mapping[str, AlignedInput]) -> Decisions:
    """Return what each key of the output is: the layers of the slices, numbered anew, and all else of the outer input.

    Raises ``RecipeError`` where an input has no layers, or lacks a layer of a slice.
    """
    pattern = parse_pattern(recipe.layer_keys)
    outer = inputs[outer_of(recipe)]
    if not any(pattern.match(key) for key in outer.tensors):
        reason = f"{quoted(recipe.layer_keys)} fits no key of {quoted(outer.name)}"
        raise recipe.places.error(reason, "layer_keys", hint=f"it has {listed(list(outer.tensors), 3)}")
    layers: dict[str, _Placed] = {}
    start = 0
    for number, each in enumerate(recipe.slices):
        layers |= _layers(recipe, number, pattern, inputs[each.input], start)
        start += each.layers[1] - each.layers[0]
    placed: dict[str, _Placed] = {}
    for key, one in outer.tensors.items():  # the layers are where the outer input has its own
        placed |= layers if pattern.match(key) else {key: _Placed(outer.name, one)}
    settings = KeySettings(recipe, list(placed))
    by_key: dict[str, Decision] = {}
    for key, found in list(placed.items()):
        chosen = settings.chosen(key)
        at = found.slice_number
        if chosen.take:
            placed[key] = _taken(recipe, key, chosen.take, at, inputs)
            by_key[key] = Decision("taken", (chosen.take,), chosen.rule, chosen)
            continue
        place = "" if at is None else recipe.places.of("slice", at) or f"[[slice]] {at + 1}"
        rule = f"{chosen.rule} ({place})" if place else f"outside the layers, from {quoted(found.name)}"
        own = {} if at is None else recipe.slices[at].parameters
        by_key[key] = Decision("merged", (found.name,), rule, chosen, own=own)
    moved = {key: found.one for key, found in placed.items()}
    return Decisions(by_key, settings, moved=moved)


def _taken(recipe: MergeRecipe, key: str, source: str, at: int | None, inputs: Mapping[str, AlignedInput]) -> _Placed:
    """Return the tensor of another input for a key outside the layers."""
    number = next(number for number, each in enumerate(recipe.settings) if each.take == source)
    if at is not None:
        raise recipe.places.error(f"{quoted(key)} is of a slice, and cannot be taken from another input", "set", number)
    if key not in inputs[source].tensors:
        raise recipe.places.error(f"{quoted(key)} is not in {quoted(source)}, which it is taken from", "set", number)
    return _Placed(source, inputs[source].tensors[key])


def _layers(recipe: MergeRecipe, number: int, pattern: Pattern, owner: AlignedInput, start: int) -> dict[str, _Placed]:
    """Return the tensors of one slice by the keys that they have in the output, where it begins at layer ``start``."""
    (counter,) = (name for name, is_int in pattern.captures.items() if is_int)
    first, end = recipe.slices[number].layers
    shift = start - first
    template = parse_template(recipe.layer_keys.replace(f"{{{counter}:int}}", f"{{{counter}{shift:+d}}}"), pattern)
    found: dict[str, _Placed] = {}
    there: set[int] = set()
    for key, one in owner.tensors.items():
        match = pattern.match(key)
        if match is None:
            continue
        layer = index_of(match, counter)
        there.add(layer)
        if first <= layer < end:
            found[template.expand(match)] = _Placed(owner.name, one, number)
    missing = list(islice((layer for layer in range(first, end) if layer not in there), _MOST_NAMED + 1))
    if missing:
        has = f"has {plural(max(there) + 1, 'layer')}" if there else "has no layers"
        reason = f"{quoted(owner.name)} lacks {_named(missing)} of layers [{first}, {end}): it {has}"
        raise recipe.places.error(reason, "slice", number, "layers")
    return found


def _named(layers: Sequence[int]) -> str:
    shown = listed([str(one) for one in layers[:_MOST_NAMED]], show=str)
    return f"layer {shown}" if len(layers) == 1 else f"layers {shown}{' and more' if layers[_MOST_NAMED:] else ''}"


def layer_count(recipe: MergeRecipe, inputs: Mapping[str, AlignedInput]) -> LayerCount:
    """Return how many layers the outer input has, and which of them each layer of the output was in its own input."""
    pattern = parse_pattern(recipe.layer_keys)
    (counter,) = (name for name, is_int in pattern.captures.items() if is_int)
    found = [match for key in inputs[outer_of(recipe)].tensors if (match := pattern.match(key)) is not None]
    before = 1 + max(index_of(match, counter) for match in found)
    order = tuple(layer for each in recipe.slices for layer in range(*each.layers))
    return LayerCount(before, order, recipe.layer_count_field)
