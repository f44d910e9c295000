"""What merges must know of all tensors of a plan: random numbers taken before, and elements that have one limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckptkit.core.text import option_text, quoted
from ckptkit.core.toml_lines import TomlPath
from ckptkit.plans.methods.limits import merges_of
from ckptkit.plans.methods.model import Method
from ckptkit.plans.methods.operation import Merge
from ckptkit.plans.methods.task_vectors.random import RandomVectors
from ckptkit.plans.methods.task_vectors.ties import Ties
from ckptkit.plans.plan import Step
from ckptkit.plans.recipes.model import MergeRecipe

__all__ = ["with_counts"]

_DENSITY = "density"


def with_counts(recipe: MergeRecipe, steps: Iterable[Step]) -> list[Step]:
    """Return the steps; their merges know what they must know of the others.

    Merges with masks of torch know how many numbers were taken before: keys take them in sorted order. Merges with one
    limit for all tensors of an input know how many elements these have. Raises ``RecipeError`` where these tensors
    do not have one density.
    """
    found = list(steps)
    merges = {merge.key: (step, merge) for step, merge in merges_of(found)}
    changed = {**_drawn(merges.values()), **_counted(recipe, list(merges.values()))}
    return [_with_method(step, changed) for step in found] if changed else found


def _drawn(merges: Iterable[tuple[Step, Merge]]) -> dict[str, Method]:
    """Return the methods by key that take random numbers of torch."""
    found: dict[str, Method] = {}
    total = 0
    for step, merge in sorted(merges, key=lambda each: each[1].key):
        method = merge.method
        if isinstance(method, RandomVectors) and method.masks == "torch":
            found[merge.key] = replace(method, drawn=total)
            total += method.draws(step.out.elements)
    return found


def _counted(recipe: MergeRecipe, merges: Sequence[tuple[Step, Merge]]) -> dict[str, Method]:
    """Return the methods by key with one limit for all tensors of an input."""
    densities: dict[int, tuple[float, str]] = {}
    totals: dict[int, int] = defaultdict(int)
    for step, merge in merges:
        for number, share in zip(merge.numbers, merge.method.shares(), strict=False):
            if share is None:
                continue
            density, key = densities.setdefault(number, (share.density, merge.key))
            if density != share.density:
                where = (
                    f"{option_text(density)} at {quoted(key)} and {option_text(share.density)} at {quoted(merge.key)}"
                )
                raise recipe.places.error(
                    f'density is {where}, and trim = "model" needs one for all keys of an input',
                    *_place_of_density(recipe),
                    hint=f"give {_DENSITY} to the inputs only",
                )
            totals[number] += step.out.elements
    return {
        merge.key: replace(
            merge.method,
            counted=tuple(totals[number] if share else 0 for number, share in zip(merge.numbers, shares, strict=True)),
        )
        for _, merge in merges
        if isinstance(merge.method, Ties) and (shares := merge.method.shares())
    }


def _place_of_density(recipe: MergeRecipe) -> TomlPath:
    """Return the first part of the recipe that gives a density to some keys only."""
    for number, setting in enumerate(recipe.settings):
        if _DENSITY in setting.parameters:
            return "set", number, _DENSITY
        for name, parameters in setting.inputs.items():
            if _DENSITY in parameters:
                return "set", number, "inputs", name, _DENSITY
    return (_DENSITY,)


def _with_method(step: Step, changed: dict[str, Method]) -> Step:
    last = step.recipe.operations[-1] if step.recipe is not None else None
    if step.recipe is None or not isinstance(last, Merge) or last.key not in changed:
        return step
    made = replace(last, method=changed[last.key])
    return replace(step, recipe=replace(step.recipe, operations=(*step.recipe.operations[:-1], made)))
