"""States that cannot be loaded by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.core.torch_optim import OptimizerSchema
from ckptkit.core.torch_types import Optimizer
from ckptkit.errors import PlanError
from ckptkit.optimizer_state.model import NamedGroup, OptimizerState, tensors_in
from ckptkit.param_groups.spec.fields import is_tensor

__all__ = ["refuse_hidden_parameters", "refuse_moved_elements", "refuse_state_of_wrapper", "wrapper_error"]

_DROP_STATE = "drop its state first: ckpt optim prune PATH -o OUT --reset PATTERN"


def refuse_state_of_wrapper(optimizer: Optimizer, inner: Optimizer) -> None:
    """Raise ``PlanError`` if a wrapper saves more than the optimizer inside, as slow weights."""
    if optimizer is inner:
        return
    try:
        keys = [_keys_of(each.state_dict()) for each in (optimizer, inner)]
    except Exception:  # noqa: BLE001 - accelerate and others have conditions of their own
        return
    if keys[0] != keys[1]:
        raise wrapper_error(optimizer, inner)


def wrapper_error(optimizer: Optimizer, inner: Optimizer) -> PlanError:
    """Return the error for an optimizer around another one that saves more than that one."""
    outer = type(optimizer).__name__
    return PlanError(
        f"{outer} keeps state of its own around {type(inner).__name__}, which cannot be loaded by name",
        hint=f"load it with the load_state_dict() of {outer}",
    )


def _keys_of(saved: Mapping[str, Any]) -> object:
    """Return the keys of a state, and the slots of each of its entries."""
    entries = saved.get("state", {})
    return set(saved), {key: set(slots) if isinstance(slots, Mapping) else None for key, slots in entries.items()}


def refuse_moved_elements(saved: OptimizerState, schema: OptimizerSchema | None) -> None:
    """Raise ``PlanError`` if rules moved elements, and the optimizer computes its update from the whole parameter."""
    moved = [change for change in saved.changes if change.moves_elements]
    if schema is not None and not schema.is_elementwise and moved:
        raise PlanError(
            f"the rules made {quoted(moved[0].name)} by {moved[0].operation}, but {schema.name} computes each update "
            "from the whole parameter, so the moved state would train otherwise",
            hint=_DROP_STATE,
        )


def refuse_hidden_parameters(saved: OptimizerState, live_groups: Sequence[NamedGroup]) -> None:
    """Raise ``PlanError`` if values of no parameter seem to be of parameters after all: by tensor, or by position.

    By position, they are loaded only into an optimizer of the same parameters in the same order.
    """
    live = [name for group in live_groups for name in group.names]
    values = {**saved.more.keys, **saved.more.state}
    by_tensor = [key for key, value in values.items() if isinstance(value, Mapping) and any(map(is_tensor, value))]
    if by_tensor:
        raise PlanError(
            f"the state has tensors as the keys of {quoted(by_tensor[0])}, which are not those of the optimizer",
            hint="load it with the load_state_dict() of the optimizer",
        )
    with_tensors = [key for key, value in values.items() if next(tensors_in(value), None) is not None]
    if with_tensors and (live != list(saved.names) or any(change.moves_elements for change in saved.changes)):
        raise PlanError(
            f"the state has tensors in {quoted(with_tensors[0])}, which can be by position, and the optimizer has "
            "other parameters or another order",
            hint="build the optimizer with the same parameters in the same order, or remove the key from the state",
        )
