"""The comparison of a loaded optimizer with the state that it was given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.patterns import literal
from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import (
    has_same_layout,
    is_composite,
    is_plain,
    same_composites,
    same_values,
)
from ckptkit.core.torch_types import Optimizer
from ckptkit.errors import GroupsError, PlanError
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.compatibility import StateMatch
from ckptkit.optimizer_state.loading.policies import SkipAction
from ckptkit.optimizer_state.model import LazyTensor, MoreValues, OptimizerState, SlotValue
from ckptkit.param_groups.parameters import LiveModel
from ckptkit.param_groups.spec.fields import is_tensor
from ckptkit.plans.policies import Policy

__all__ = ["refuse_other_layouts", "refuse_other_values", "unread_values"]


def unread_values(optimizer: Optimizer, more: MoreValues, on_unexpected: Policy[SkipAction]) -> list[Finding]:
    """Return a finding for each value of no parameter that the loaded optimizer would not save again."""
    if not more:
        return []
    try:
        now: object = optimizer.state_dict()
    except Exception:  # noqa: BLE001 - hooks of the user, and optimizers that gather their state from other processes
        return []
    found = now if isinstance(now, Mapping) else {}
    in_state = found.get("state")
    pairs = [(key, value, found) for key, value in more.keys.items()]
    pairs += [(key, value, in_state) for key, value in more.state.items() if isinstance(in_state, Mapping)]
    findings = []
    for key, value, saved_again in pairs:
        if key in saved_again and _is_same(saved_again[key], value):
            continue
        if key not in saved_again and on_unexpected.action(key) == "error":
            raise PlanError(
                f"the state has {quoted(key)}, which the optimizer does not have",
                hint=f'leave it out: on_unexpected={{"{literal(key)}": "skip"}}',
            )
        if key in saved_again or not _has_own_load(optimizer):
            reason = "is not that of the file after loading" if key in saved_again else "was not loaded"
            hint = "torch reads it only in a hook: optimizer.register_load_state_dict_pre_hook()"
            findings.append(codes.KEY_UNREAD.finding(key, f"{quoted(key)} of the optimizer {reason}", hint))
        else:
            message = f"the optimizer was given {quoted(key)} of the file, and its state_dict() has no such key"
            findings.append(codes.KEY_UNREAD.finding(key, message, severity="note"))
    return findings


def _has_own_load(optimizer: Optimizer) -> bool:
    """Return whether code outside of torch sees the state before it is loaded: a hook, or a method of the class."""
    return _loads_by_itself(optimizer) or bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))


def _loads_by_itself(optimizer: Optimizer) -> bool:
    """Return whether the class has a ``load_state_dict()`` of its own, which decides how it keeps its state."""
    import torch

    return type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict


def refuse_other_layouts(
    optimizer: Optimizer, given: Mapping[str, Any], state: OptimizerState, live_model: LiveModel
) -> None:
    """Raise ``GroupsError`` if a slot has another memory layout than torch was given."""
    if _loads_by_itself(optimizer):
        return
    for place, name in enumerate(state.names):
        loaded = optimizer.state.get(live_model.by_name[name].tensor, {})
        for slot, value in given["state"].get(place, {}).items():
            found = loaded.get(slot)
            if is_plain(value) and is_plain(found) and not has_same_layout(found, value):
                raise GroupsError(
                    f"{slot} of {quoted(name)} has the strides {tuple(found.stride())} after loading, not the saved "
                    f"{tuple(value.stride())}",
                    hint="a hook of the optimizer changed its memory layout",
                )


def refuse_other_values(optimizer: Optimizer, match: StateMatch, live_model: LiveModel) -> None:
    """Raise ``GroupsError`` if the optimizer does not have the saved values."""
    for name, slots in match.state.items():
        loaded = optimizer.state.get(live_model.by_name[name].tensor, {})
        expected = _unwrapped(slots, loaded) if _loads_by_itself(optimizer) else slots
        for slot, value in expected.items():
            if not _is_same(loaded.get(slot), value):
                raise GroupsError(
                    f"{slot} of {quoted(name)} does not have the saved value after loading",
                    hint="a hook of the optimizer changed it, or load_state_dict() of torch, which keeps no strings",
                )


def _unwrapped(slots: Mapping[str, SlotValue], loaded: Mapping[str, object]) -> dict[str, SlotValue]:
    """Return the slots with the content of each dict that the class put in its place, as bitsandbytes does."""
    unwrapped: dict[str, SlotValue] = {}
    for slot, value in slots.items():
        unwrapped |= value if isinstance(value, Mapping) and slot not in loaded else {slot: value}
    return unwrapped


def _is_same(loaded: object, value: SlotValue) -> bool:
    """Return whether a loaded slot has the saved value, cast to the dtype of the parameter as torch does."""
    if isinstance(value, LazyTensor):
        if not is_tensor(loaded) or tuple(loaded.shape) != value.shape:
            return False
        return same_values(loaded.detach().to("cpu").resolve_conj().resolve_neg(), value.read_shared())
    if is_composite(value):
        return same_composites(loaded, value)
    if isinstance(value, list | tuple):
        return isinstance(loaded, list | tuple) and len(loaded) == len(value) and all(map(_is_same, loaded, value))
    if isinstance(value, Mapping):
        return isinstance(loaded, Mapping) and all(_is_same(loaded.get(key), inner) for key, inner in value.items())
    if isinstance(value, float) and math.isnan(value):
        return isinstance(loaded, float) and math.isnan(loaded)
    return bool(loaded == value)  # works for a tensor too, which torch makes of the plain step of an old file
