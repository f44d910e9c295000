"""A state by name, in each of the forms that torch loads: by position, by name, or flattened."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.model import FORMS, LazyTensor, OptimizerState, Slot, Unknown, held, map_tensors
from ckptkit.wrappers import FLAT_GROUPS, FLAT_STATE

__all__ = ["lay_out", "to_dict"]


def to_dict(state: OptimizerState, form: str = "indexed") -> dict[str, Any]:
    """Return the state as torch loads it, every tensor read into memory of its own.

    ``form`` is ``indexed`` for ``optimizer.load_state_dict``, whose positions are those of ``state.names``;
    ``param-names`` the same with torch's ``param_names``; ``named`` and ``flattened`` for
    ``torch.distributed.checkpoint.state_dict.set_optimizer_state_dict``. Raises ``PlanError`` for a name that is in two
    groups, and for a value that only code could make.
    """
    made: dict[str, Any] = _read(lay_out(state, form))
    return made


def lay_out(state: OptimizerState, form: str) -> dict[str, Slot]:
    """Return the state in one of ``FORMS``, its tensors still unread; raises ``PlanError`` for a name in two groups."""
    if form not in FORMS:
        raise PlanError(f"{quoted(str(form))} is no form of an optimizer state", hint=f"one of {', '.join(FORMS)}")
    twice = [name for name, count in Counter(held(state).names).items() if count > 1]
    if twice:
        raise PlanError(f"{quoted(twice[0])} is in the groups more than once")
    known = set(state.names)
    strays = [name for name in state.state if name not in known]
    if strays:
        raise PlanError(f"there is state of {quoted(strays[0])}, which is in no group")
    if form == "flattened":
        return _flattened(state)
    number: dict[str, Any] = {name: name if form == "named" else place for place, name in enumerate(state.names)}
    groups = []
    for group in state.groups:
        names = {"param_names": list(group.names)} if form == "param-names" else {}
        groups.append({**group.options, **names, "params": [number[name] for name in group.names]})
    slots = {number[name]: dict(state.state[name]) for name in state.names if name in state.state}
    return {"state": slots, "param_groups": groups}


def _flattened(state: OptimizerState) -> dict[str, Slot]:
    slots = {
        f"{FLAT_STATE}{name}.{slot}": value for name in state.names for slot, value in state.state.get(name, {}).items()
    }
    options = {
        f"{FLAT_GROUPS}{name}.{key}": value
        for group in state.groups
        for name in group.names
        for key, value in group.options.items()
    }
    return slots | options


def _read(value: Slot) -> Any:
    def live(tensor: LazyTensor) -> Any:
        return tensor.read()

    unknown = next(_unknown(value), None)
    if unknown is not None:
        raise PlanError(
            f"it holds a value of {quoted(unknown.type)}, which only code could make",
            hint="torch.load makes it: give what that returns",
        )
    return map_tensors(value, live)


def _unknown(value: Slot) -> Any:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Unknown):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
