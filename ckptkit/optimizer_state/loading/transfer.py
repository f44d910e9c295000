"""The load of a state by torch, with the memory layouts and the groups of the live optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.torch_bridge import (
    in_layout_of,
    is_plain,
)
from ckptkit.core.torch_optim import OptimizerSchema
from ckptkit.core.torch_types import Optimizer
from ckptkit.errors import GroupsError
from ckptkit.optimizer_state.compatibility import StateMatch
from ckptkit.optimizer_state.forms import to_dict
from ckptkit.optimizer_state.loading.checking import refuse_other_layouts, refuse_other_values, unread_values
from ckptkit.optimizer_state.loading.policies import SkipAction
from ckptkit.optimizer_state.model import LazyTensor, OptimizerState
from ckptkit.param_groups.parameters import LiveModel
from ckptkit.param_groups.spec.fields import is_tensor
from ckptkit.plans.policies import Policy

__all__ = ["load_by_torch"]


def load_by_torch(
    optimizer: Optimizer,
    state: OptimizerState,
    match: StateMatch,
    live_model: LiveModel,
    schema: OptimizerSchema | None,
    *,
    on_unexpected: Policy[SkipAction],
) -> list[Finding]:
    """Load the state, and return findings about the values of no parameter that the optimizer did not take."""
    given = to_dict(state, "indexed")
    _follow_live_layouts(given, state, live_model, schema)
    for group, live in zip(given["param_groups"], optimizer.param_groups, strict=True):
        if "param_names" in live:
            group["param_names"] = list(live["param_names"])
        if schema is not None:  # another class decides by itself when a number becomes a tensor
            group.update({key: _like_live(value, live.get(key)) for key, value in group.items() if key != "params"})
    before = dict(optimizer.state)
    restore = _snapshot(optimizer)
    try:
        try:
            optimizer.load_state_dict(given)
        except Exception as error:  # hooks, and optimizers from other packages, can raise anything
            raise GroupsError(f"load_state_dict failed: {' '.join(str(error).split())}") from error
        # torch would cast this state, and drops state under keys that are not parameters, so it was not given to torch.
        kept = [live_model.by_name[name].tensor for name in (*match.missing, *match.dropped)]
        for key in (*kept, *(key for key in before if not is_tensor(key) and key not in optimizer.state)):
            if key in before:
                optimizer.state[key] = before[key]
        if schema is not None:
            _restore_scalar_dtypes(optimizer, match, live_model, schema)
        refuse_other_values(optimizer, match, live_model)
        refuse_other_layouts(optimizer, given, state, live_model)
        return unread_values(optimizer, state.more, on_unexpected)
    except BaseException:
        restore()
        raise


def _follow_live_layouts(
    given: Mapping[str, Any], state: OptimizerState, live_model: LiveModel, schema: OptimizerSchema | None
) -> None:
    """Lay each elementwise slot out as its parameter, because a fused step reads both in the order of memory.

    Nothing is known about the slots of other optimizers, so these keep the layout of the file, as in torch.
    """
    elementwise = {slot.name for slot in (schema.slots if schema else ()) if slot.layout == "elementwise"}
    for place, name in enumerate(state.names):
        parameter, slots = live_model.by_name[name].tensor, given["state"].get(place, {})
        if is_plain(parameter):
            for slot in elementwise & slots.keys():
                if is_plain(slots[slot]) and slots[slot].shape == parameter.shape:
                    slots[slot] = in_layout_of(slots[slot], parameter)


def _restore_scalar_dtypes(
    optimizer: Optimizer, match: StateMatch, live_model: LiveModel, schema: OptimizerSchema
) -> None:
    """Undo the cast of single numbers, because NAdam keeps a product in 32 bits for a parameter of any dtype."""
    scalars = {slot.name for slot in schema.slots if slot.layout == "scalar"} - {"step"}  # torch does not cast step
    for name, slots in match.state.items():
        loaded = optimizer.state.get(live_model.by_name[name].tensor, {})
        for slot in scalars & slots.keys() & loaded.keys():
            saved = slots[slot]
            value = saved.read() if isinstance(saved, LazyTensor) else None
            if value is not None and is_tensor(loaded[slot]) and loaded[slot].dtype != value.dtype:
                loaded[slot] = value.to(loaded[slot].device)


def _snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that restores groups and state; torch replaces both, but a hook can change them in place."""
    groups, state = optimizer.param_groups, optimizer.state
    tables = [(table, dict(table)) for table in (*groups, *state.values()) if isinstance(table, dict)]
    group_list, state_items = list(groups), dict(state)

    def restore() -> None:
        for table, content in tables:
            table.clear()
            table.update(content)
        groups[:] = group_list
        state.clear()
        state.update(state_items)
        optimizer.param_groups, optimizer.state = groups, state

    return restore


def _like_live(value: Any, live: Any) -> Any:
    """Return an option as a tensor or a number, whichever the live group has: a captured step needs a tensor."""
    import torch

    if isinstance(live, torch.Tensor) and isinstance(value, int | float | torch.Tensor):
        return torch.as_tensor(value, dtype=live.dtype, device=live.device).detach().clone()
    if isinstance(live, int | float) and isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(live, list | tuple) and isinstance(value, list | tuple) and len(live) == len(value):
        items = list(map(_like_live, value, live))
        return tuple(items) if isinstance(live, tuple) else items
    return value
