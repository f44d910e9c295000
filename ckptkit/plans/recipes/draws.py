"""How many random numbers of torch are taken before each tensor, for masks that are those of mergekit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ckptkit.plans.methods.operation import Merge
from ckptkit.plans.methods.task_vectors.random import RandomVectors
from ckptkit.plans.plan import Step

__all__ = ["with_draws"]


def with_draws(steps: Iterable[Step]) -> list[Step]:
    """Return the steps; their merges know how many numbers were taken before. Keys take them in sorted order."""
    found = list(steps)
    drawn: dict[str, int] = {}
    total = 0
    for step in sorted(found, key=lambda step: step.out.key):
        drawing = _drawing(step)
        if drawing is not None and step.tied_to is None:
            drawn[step.out.key] = total
            total += drawing[1].draws(step.out.elements)
    return [_with_drawn(step, drawn.get(step.tied_to or step.out.key, 0)) for step in found]


def _drawing(step: Step) -> tuple[Merge, RandomVectors] | None:
    """Return the merge of a step and its method, if it takes random numbers of torch."""
    last = step.recipe.operations[-1] if step.recipe is not None else None
    if isinstance(last, Merge) and isinstance(last.method, RandomVectors) and last.method.masks == "torch":
        return last, last.method
    return None


def _with_drawn(step: Step, drawn: int) -> Step:
    drawing = _drawing(step)
    if drawing is None or step.recipe is None:
        return step
    merge, method = drawing
    made = replace(merge, method=replace(method, drawn=drawn))
    return replace(step, recipe=replace(step.recipe, operations=(*step.recipe.operations[:-1], made)))
