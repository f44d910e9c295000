"""Combine the changes of one or several adapters into one step for each tensor of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from ckptkit.adapters.model import AdapterPlan, Fold
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import is_float
from ckptkit.core.patterns import drop_options
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.plans.adapters.inputs import BASE
from ckptkit.plans.plan import Dropped, Source, Step
from ckptkit.plans.steps import complete_step
from ckptkit.tensor_ops.adapters import FoldDora
from ckptkit.tensor_ops.arithmetic import Cast
from ckptkit.tensor_ops.joining import Concat, Split
from ckptkit.tensor_ops.moving import Slice
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["Combined", "PlacedAdapter", "combine"]

_REPLACED = "saved whole with the adapter"
_NONE: Mapping[str, str] = MappingProxyType({})
_WIDE = ("F32", "F64")  # a sum in one of these is not cast before it is rounded to the dtype of the base


@dataclass(frozen=True, slots=True)
class PlacedAdapter:
    """The changes of one adapter, the role of its file, and the key in that file of each key of the plan.

    ``ends_ties`` are the keys whose change is not that of what the base ties to them.
    """

    role: str
    plan: AdapterPlan
    names: Mapping[str, str]
    ends_ties: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Combined:
    """The steps of the tensors that the adapters change, by key, the tensors that no step uses, and notes."""

    steps: Mapping[str, Step]
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]


def combine(
    adapters: Sequence[PlacedAdapter], roles: Mapping[str, Checkpoint], absent: Mapping[str, str] = _NONE
) -> Combined:
    """Return the steps that add the update of every adapter, in their order, and round each sum once.

    ``absent`` maps a key that the base does not have to the key of the base that has its values.

    Of two adapters that replace one tensor the last counts, and a note says so. Raises ``PlanError`` where an adapter
    replaces a tensor that another one before it changes, whose update would be lost.
    """
    folds: dict[str, list[tuple[PlacedAdapter, Fold]]] = {}
    replaced: dict[str, Source] = {}
    dropped: list[Dropped] = []
    notes: list[str] = []
    for adapter in adapters:
        own = {fold.key: fold.replaced_by for fold in adapter.plan.folds if fold.replaced_by}
        for key, name in {**own, **adapter.plan.replacements}.items():
            if key in folds:
                first = folds[key][0][0].role
                raise PlanError(
                    f"{quoted(key)} is changed by {first}, and {adapter.role} replaces it: one of both would be lost",
                    hint=f"give {adapter.role} before {first}, or leave its tensor out: "
                    f"{drop_options([adapter.names[name]])} --allow-unused",
                )
            if key in replaced:
                before = replaced[key]
                notes.append(f"{before.role} and {adapter.role} both replace {quoted(key)}: the last one counts")
                dropped.append(Dropped(before.role, before.key, f"{adapter.role} replaces it too", key))
            replaced[key] = Source(adapter.role, adapter.names[name])
        for fold in adapter.plan.folds:
            folds.setdefault(fold.key, []).append((adapter, fold))
    steps = {}
    for key in dict.fromkeys((*folds, *replaced)):
        _refuse_two_norms(key, folds.get(key, ()))
        in_base = absent.get(key, key)
        first_source = replaced.get(key, Source(BASE, in_base))
        out = replace(roles[BASE][in_base], key=key)
        steps[key] = complete_step(_step(out, first_source, folds.get(key, ()), roles), roles)
    return Combined(steps, tuple(dropped), tuple(notes))


def _refuse_two_norms(key: str, folds: Sequence[tuple[PlacedAdapter, Fold]]) -> None:
    """Raise ``PlanError`` for a DoRA among several folds: its norm is that of the weight without the others."""
    dora = next((adapter.role for adapter, fold in folds if isinstance(fold.operation, FoldDora)), None)
    if dora is not None and len(folds) > 1:
        raise PlanError(
            f"{quoted(key)} has the DoRA of {dora} and another adapter, and the norm of a DoRA does not count others",
            hint="merge with peft (merge_and_unload)",
        )


def _step(
    out: TensorInfo, first: Source, folds: Sequence[tuple[PlacedAdapter, Fold]], roles: Mapping[str, Checkpoint]
) -> Step:
    """Return the step of a tensor that begins as ``first``, and to which the folds add in order."""
    out = replace(out, shape=roles[first.role][first.key].shape)
    if not folds:
        return Step(out, (first,), "", _REPLACED)
    dtype = roles[first.role][first.key].dtype
    sources, recipe = [first], None
    if len(folds) > 1 and is_float(dtype) and dtype not in _WIDE:
        recipe = Recipe((0,), (Cast("F32"),))
    for adapter, fold in folds:
        numbers = range(len(sources), len(sources) + len(fold.factors))
        sources += [Source(adapter.role, adapter.names[factor]) for factor in fold.factors]
        recipe = _folded(0 if recipe is None else recipe, list(numbers), fold, out.shape)
    label = " + ".join(fold.label for _, fold in folds)
    return Step(out, tuple(sources), "", label, recipe)


def _folded(weight: int | Recipe, factors: list[int], fold: Fold, shape: Shape) -> Recipe:
    """Return the recipe of a weight of this shape after the fold, which can be one of some rows only."""
    inputs: list[int | Recipe] = list(factors)
    if fold.up_rows is not None:
        inputs[1] = Recipe((factors[1],), (Slice(0, *fold.up_rows),))
    if fold.rows is None:
        return Recipe((weight, *inputs), (fold.operation,))
    first, end = fold.rows
    split = Split(0, (first, end - first, shape[0] - end))
    above, rows, below = (Recipe((weight,), (split,), part) for part in range(3))
    return Recipe((above, Recipe((rows, *inputs), (fold.operation,)), below), (Concat(0),))
