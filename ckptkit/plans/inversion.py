"""Undoing a plan: the plan that makes the input again out of the output."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.plans.plan import Plan, Source, Step
from ckptkit.plans.saved import SavedPlan, header_digest
from ckptkit.plans.steps import moved_modules
from ckptkit.tensor_ops import invert_chain
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["invert_plan"]

_ROLE = "source"
_MOST_NAMED = 4


def invert_plan(saved: SavedPlan) -> SavedPlan:
    """Return the plan that takes the output of ``saved`` for its source, and gives back the source, bit by bit.

    It is made from the recorded names and operations, never from the text of rules. Raises ``PlanError`` naming what
    is lossy: a tensor that was dropped or cast, an operation without an inverse, a part that is not in the output.
    What the source held besides tensors cannot come back, and is noted.
    """
    roles = {source.role for step in saved.plan.steps for source in step.sources}
    if roles != {_ROLE}:
        raise PlanError("lays one checkpoint over another, and what lay below is not in the output")
    lost: list[str] = []
    made: dict[str, Step] = {}
    for group in _groups(saved.plan):
        undone = _undo(group, saved)
        if isinstance(undone, str):
            lost.append(undone)
        else:
            made.update({step.out.key: step for step in undone if step.out.key not in made})
    lost[:0] = [
        f"{quoted(drop.key)} was dropped ({drop.reason})"
        for drop in saved.plan.dropped
        if not drop.entry and drop.key not in made
    ]
    if not lost and header_digest(step.out for step in made.values()) != saved.headers.get(_ROLE):
        lost.append("it does not name every tensor that it was made from")
    if lost:
        more = f", and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
        raise PlanError(f"cannot be undone: {'; '.join(lost[:_MOST_NAMED])}{more}")
    outs = [step.out for step in saved.plan.steps]
    inputs = {Source(_ROLE, info.key): TensorInfo(info.key, info.dtype, info.shape) for info in outs}
    entries = [drop.key for drop in saved.plan.dropped if drop.entry]
    notes = (f"not among the tensors, and gone: {', '.join(map(quoted, entries))}",) if entries else ()
    names = {step.sources[0].key: key for key, step in made.items() if step.recipe is None}
    moved = moved_modules(saved.plan.versions, names)
    versions = {old: saved.plan.versions[new] for new, old in moved.items()}
    plan = Plan(tuple(made.values()), (), saved.plan.metadata, notes, versions, keeps=saved.plan.keeps and _ROLE)
    return SavedPlan(plan, {_ROLE: header_digest(inputs.values())}, inputs)


def _groups(plan: Plan) -> Iterator[list[Step]]:
    """Yield the steps that one piece of work makes, together."""
    groups: dict[object, list[Step]] = {}
    for step in plan.steps:
        work = step.out.key if step.recipe is None else (step.sources, step.recipe.inputs, step.recipe.operations)
        groups.setdefault(work, []).append(step)
    yield from groups.values()


def _undo(group: list[Step], saved: SavedPlan) -> list[Step] | str:
    first = group[0]
    cast = next((step for step in group if step.operation.endswith("cast")), None)
    if cast is not None:
        return f"{quoted(cast.out.key)} was cast from {saved.inputs[cast.sources[0]].dtype} to {cast.out.dtype}"
    name = quoted(first.out.key)
    if first.recipe is None:
        return [_back(source, (first,), None, saved) for source in (*first.sources, *first.equals)]
    if any(isinstance(item, Recipe) for item in first.recipe.inputs):
        return f"{name} was made in several passes ({first.recipe.outline()})"
    sources = [first.sources[number] for number in first.recipe.inputs if isinstance(number, int)]
    chain = invert_chain(first.recipe.operations, [saved.inputs[source].shape for source in sources])
    if chain is None:
        return f"{name} was made by {first.recipe.outline()}, which loses something"
    parts = {step.recipe.part: step for step in group if step.recipe is not None}
    missing = first.recipe.operations[-1].outputs - len(parts)
    if missing:
        return (
            f"{name} is one of {missing + len(parts)} parts that {first.recipe.outline()} makes, and not all were kept"
        )
    news = tuple(parts[part] for part in sorted(parts))
    inputs = tuple(range(len(news)))
    return [_back(source, news, Recipe(inputs, chain, part), saved) for part, source in enumerate(sources)]


def _back(source: Source, news: tuple[Step, ...], recipe: Recipe | None, saved: SavedPlan) -> Step:
    info = saved.inputs[source]
    out = TensorInfo(source.key, info.dtype, info.shape)
    rule = f"undoes {quoted(news[0].rule)}" if news[0].rule else ""
    names = "copy" if recipe is None else recipe.outline()
    return Step(out, tuple(Source(_ROLE, step.out.key) for step in news), names, rule, recipe)
