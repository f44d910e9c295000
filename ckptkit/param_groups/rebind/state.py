"""The state that an optimizer keeps for one parameter, made to fit what that parameter has become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptkit.core.text import quoted
from ckptkit.core.torch_optim import OptimizerSchema
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import GroupsError
from ckptkit.param_groups.parameters import LiveParameter
from ckptkit.param_groups.spec import is_tensor
from ckptkit.tensor_ops.resizing import Pad

__all__ = ["ConvertedState", "OnShape", "convert_state"]

OnShape = Literal["drop", "pad", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedState:
    """The slots as they will be (the same objects where nothing changes; none where they are dropped), and why."""

    slots: Mapping[str, Any]
    converted: Mapping[str, str]  # slot -> what was done with it
    dropped: tuple[str, ...] = ()
    reason: str = ""


def convert_state(
    slots: Mapping[str, Any],
    live: LiveParameter,
    *,
    older: Tensor | None,
    schema: OptimizerSchema | None,
    options: Mapping[str, Any],
    on_shape: OnShape,
) -> ConvertedState:
    """Return what becomes of the state of a parameter that is ``live`` now and was ``older``, or the same object.

    All slots stay or none does: a step fails beside half a state. With ``on_shape="pad"`` rows are added, with what a
    fresh state begins with, where the parameter provably grew by rows: the same object, or one that begins with the
    rows of the older. Raises ``GroupsError`` where a shape does not fit and that is an error.
    """
    without = next((reason for value in slots.values() if (reason := _beyond(value, live)) is not None), None)
    if without is not None:
        return ConvertedState({}, {}, tuple(slots), without)
    wrong = _misshapen(slots, live, older, schema)
    if not wrong:
        return ConvertedState(*_converted(slots, live, older, schema, options))
    shown = ", ".join(f"{slot} {tuple(next(_tensors_in(slots[slot])).shape)}" for slot in wrong)
    reason = f"{shown} does not fit {live.shape}"
    if on_shape == "error":
        raise GroupsError(
            f"the state of {quoted(live.name)} does not fit: {reason}",
            hint='on_shape="drop" starts it anew, "pad" adds rows to it',
        )
    if on_shape == "pad":
        fault = _no_padding(slots, wrong, live, older, schema)
        if fault is None:
            padded = {slot: _padded(slots[slot], live.shape[0], _beginning(slot, schema, options)) for slot in wrong}
            done, converted = _converted({**slots, **padded}, live, older, schema, options)
            return ConvertedState(done, {**dict.fromkeys(wrong, f"padded to {live.shape}"), **converted})
        reason = f"{reason}, and {fault}"
    return ConvertedState({}, {}, tuple(slots), reason)


def _beyond(value: Any, live: LiveParameter) -> str | None:
    """Return why a slot cannot go along whatever its shape."""
    if live.lazy:
        return "the parameter has no shape yet"
    for tensor in _tensors_in(value):
        if tensor.is_meta and not live.tensor.is_meta:
            return "it is on the meta device, where there are no values"
        if hasattr(live.tensor, "device_mesh") != hasattr(tensor, "device_mesh"):
            return "the parameter is a DTensor now, and its state is none"
    return None


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield what has dims in a slot, also within lists and dicts, as other people's optimizers keep it."""
    if is_tensor(value):
        if value.ndim:
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(inner)


def _misshapen(
    slots: Mapping[str, Any], live: LiveParameter, older: Tensor | None, schema: OptimizerSchema | None
) -> tuple[str, ...]:
    """Return the slots whose shape is not that which the parameter asks for."""
    tensors = {name: value for name, value in slots.items() if is_tensor(value) and value.ndim}
    if schema is not None:
        known = {slot.name: slot for slot in schema.slots}
        return tuple(
            name
            for name, value in tensors.items()
            if name in known and known[name].mismatch(value, tuple(value.shape), live.shape) is not None
        )
    # Of other people's optimizers nothing is known but that their state was right beside the older parameter.
    if older is None or tuple(older.shape) == live.shape:
        return ()
    return tuple(name for name, value in slots.items() if next(_tensors_in(value), None) is not None)


def _no_padding(
    slots: Mapping[str, Any],
    wrong: tuple[str, ...],
    live: LiveParameter,
    older: Tensor | None,
    schema: OptimizerSchema | None,
) -> str | None:
    """Return why rows cannot be added, or None where they can."""
    import torch

    if schema is None or not schema.is_elementwise:
        return "the optimizer has no state to begin new rows with"
    for name in wrong:
        was = tuple(slots[name].shape)
        if not live.shape or was[1:] != live.shape[1:] or was[0] > live.shape[0]:
            return "it did not grow by rows"
    if older is not None:
        rows = live.tensor.detach()[: older.shape[0]]
        if older.is_meta or not torch.equal(rows, older.detach().to(rows.device, rows.dtype)):
            return "the parameter does not begin with the rows of the older one"
    return None


def _beginning(name: str, schema: OptimizerSchema | None, options: Mapping[str, Any]) -> float:
    slot = None if schema is None else schema.slot(name)
    return 0.0 if slot is None else float(options.get(slot.initial_value_option, 0.0))


def _padded(value: Tensor, rows: int, fill: float) -> Tensor:
    (grown,) = Pad(size=rows, fill=fill or "zeros").apply([value.cpu()])
    return grown.to(value.device)


def _converted(
    slots: Mapping[str, Any],
    live: LiveParameter,
    older: Tensor | None,
    schema: OptimizerSchema | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the slots in the dtype and on the device of the parameter, as torch does when it loads them."""
    done: dict[str, Any] = {}
    said: dict[str, str] = {}
    tensor = live.tensor
    for name, value in slots.items():
        done[name] = value
        if not is_tensor(value):
            continue
        known = schema is not None and schema.slot(name) is not None
        # Counters stay as they are, as in torch, which has them on the device only for its fused and captured steps.
        counter = name == "step"
        placed = not counter or bool(options.get("fused") or options.get("capturable"))
        follows = known or (older is not None and value.dtype == older.dtype)
        to_dtype = not counter and follows and value.is_floating_point() and value.dtype != tensor.dtype
        moves = placed and value.device != tensor.device and (known or older is None or value.device == older.device)
        if to_dtype or moves:
            done[name] = value.to(tensor.device if moves else value.device, tensor.dtype if to_dtype else value.dtype)
            said[name] = " and ".join(
                part
                for part in (
                    f"cast from {value.dtype} to {tensor.dtype}" if to_dtype else "",
                    f"moved from {value.device} to {tensor.device}" if moves else "",
                )
                if part
            )
    return done, said
