"""What DeepSpeed's files say of a ZeRO checkpoint: taken from their inert trees, each thing of its right kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import FormatError
from ckptkit.formats.torch.naming import type_name
from ckptkit.formats.torch.objects import TensorRef

__all__ = ["ModelStates", "OptimStates", "Shapes", "model_states", "optim_states"]

Shapes = Mapping[str, tuple[int, ...]]
_PARTS = "optimizer_state_dict"
_LARGEST = 2**62
_MOST_DIMENSIONS = 1024


@dataclass(frozen=True, slots=True)
class ModelStates:
    """One file of model states: the names and shapes of what the ranks hold in parts, and what it holds whole."""

    tree: Mapping[object, object]
    module: Mapping[object, object]
    whole: Mapping[str, TensorRef]  # by name, those of the module that have elements
    groups: tuple[Shapes, ...]
    frozen: Shapes
    fragments: Mapping[str, TensorRef]
    shared: Mapping[str, str]  # a name, and the name whose weight it shares
    step: int | None


@dataclass(frozen=True, slots=True)
class OptimStates:
    """One rank's file of optimizer states: its part of each group of fp32 weights."""

    stage3: bool
    parts: tuple[TensorRef, ...]
    count: int  # of ranks
    paddings: tuple[tuple[int, ...], ...] | None  # elements behind each parameter, by group
    steps: Mapping[str, object]  # of the optimizer, by place


def model_states(tree: object) -> ModelStates:
    """Return what a file of model states says; raises ``FormatError`` where it is none of ZeRO."""
    top = _mapping(tree, "the file")
    missing = [key for key in ("module", "param_shapes") if key not in top]
    if missing:
        raise FormatError(f"is no file of model states of ZeRO: it has no {missing[0]}")
    module = _mapping(top["module"], "module")
    groups = top["param_shapes"]
    if not isinstance(groups, list | tuple):
        raise FormatError(f"param_shapes is no list but {quoted(type_name(groups))}")
    fragments = _mapping(top.get("frozen_param_fragments") or {}, "frozen_param_fragments")
    shared = _mapping(top.get("shared_params") or {}, "shared_params")
    step = top.get("global_steps")
    return ModelStates(
        tree=top,
        module=module,
        whole={
            name: value
            for name, value in module.items()
            if isinstance(name, str) and isinstance(value, TensorRef) and 0 not in value.shape
        },
        groups=tuple(_shapes(group) for group in groups),
        frozen=_shapes(top.get("frozen_param_shapes") or {}),
        fragments={str(name): value for name, value in fragments.items() if isinstance(value, TensorRef)},
        shared={one: two for one, two in shared.items() if isinstance(one, str) and isinstance(two, str)},
        step=step if type(step) is int and 0 <= step < _LARGEST else None,
    )


def optim_states(tree: object) -> OptimStates:
    """Return what a rank's file of optimizer states says; raises ``FormatError`` where it is none of ZeRO."""
    states = _mapping(_mapping(tree, "the file").get(_PARTS), _PARTS)
    stage3 = "fp32_flat_groups" in states
    key = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
    parts = states.get(key)
    if not isinstance(parts, list | tuple) or not all(isinstance(part, TensorRef) for part in parts):
        raise FormatError(f"holds no fp32 weights: {_PARTS} has no list {key} of tensors")
    stated = states.get("partition_count")
    counts: Sequence[Any] = stated if isinstance(stated, list | tuple) else [stated]
    if not counts or not all(type(n) is int and 0 < n < _LARGEST for n in counts):
        raise FormatError(f"{_PARTS} has no partition_count")
    if len(set(counts)) > 1:
        raise FormatError(
            "its groups are cut among different numbers of ranks, as those of experts are: not read",
            hint="ds_to_universal.py of DeepSpeed converts it",
        )
    return OptimStates(stage3, tuple(parts), counts[0], _paddings(states), dict(_steps(states)))


def _mapping(value: object, what: str) -> Mapping[object, object]:
    if not isinstance(value, Mapping):
        raise FormatError(f"{what} is no mapping but {quoted(type_name(value))}")
    return value


def _shapes(value: object) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _mapping(value, "param_shapes").items():
        sizes = tuple(shape) if isinstance(shape, list | tuple) and len(shape) <= _MOST_DIMENSIONS else None
        if not isinstance(name, str) or sizes is None or not all(type(n) is int and 0 <= n < _LARGEST for n in sizes):
            raise FormatError(f"param_shapes has no shape for {quoted(str(name))}")
        if math.prod(size or 1 for size in sizes) >= _LARGEST:
            raise FormatError(f"{quoted(name)}: the shape {str(list(sizes))[:80]} overflows")
        shapes[name] = sizes
    return shapes


def _paddings(states: Mapping[object, object]) -> tuple[tuple[int, ...], ...] | None:
    groups = states.get("param_alignment_paddings")
    if groups is None:
        return None
    if not isinstance(groups, list | tuple) or not all(
        isinstance(group, list | tuple) and all(type(n) is int and 0 <= n < _LARGEST for n in group) for group in groups
    ):
        raise FormatError("param_alignment_paddings are no lists of numbers")
    return tuple(tuple(group) for group in groups)


def _steps(states: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    # The optimizer's own state has the key "base_optimizer_state" in the first two stages.
    base = states.get("base_optimizer_state", states.get(_PARTS))
    inner = base.get("state") if isinstance(base, Mapping) else None
    for key, state in inner.items() if isinstance(inner, Mapping) else ():
        step = state.get("step") if isinstance(state, Mapping) else None
        if type(step) is int or (isinstance(step, TensorRef) and not step.shape):
            yield str(key), step
