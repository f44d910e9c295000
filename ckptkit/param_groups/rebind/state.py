"""Convert the state of one parameter to the shape, dtype and device that the parameter has now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptkit.core.text import quoted
from ckptkit.core.torch_bridge import has_same_layout, in_layout_of, is_plain, shape_or_none
from ckptkit.core.torch_optim import OptimizerSchema
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import GroupsError
from ckptkit.param_groups.parameters import LiveParameter
from ckptkit.param_groups.spec.fields import is_tensor
from ckptkit.tensor_ops.resizing import Pad

__all__ = ["ConvertedState", "OnShape", "convert_state"]

OnShape = Literal["drop", "pad", "error"]


@dataclass(frozen=True, slots=True, eq=False)
class ConvertedState:
    """The converted state of one parameter.

    ``slots`` are the new slots: the same objects where nothing changes, empty where the state is dropped. ``changes``
    says what was done, by slot. ``dropped`` are the names of the dropped slots, for ``reason``.
    """

    slots: Mapping[str, Any]
    changes: Mapping[str, str]
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
    """Return the state of ``live``, converted from ``slots``.

    ``older`` is the tensor that ``live`` replaced, or None where it is the same object. All slots are
    kept or all are dropped, because a step fails if some slots are missing. With ``on_shape="pad"``, rows with initial
    values are added where the parameter grew by rows: ``live`` must be the same object, or begin with the rows of
    ``older``. With ``on_shape="error"``, a shape that does not fit raises ``GroupsError``.
    """
    reason = next((reason for value in slots.values() if (reason := _unusable(value, live)) is not None), None)
    if reason is not None:
        return ConvertedState({}, {}, tuple(slots), reason)
    wrong = _wrong_shapes(slots, live, older, schema)
    if not wrong:
        return ConvertedState(*_converted(slots, live, older, schema, options))
    shapes = ", ".join(f"{slot} {shape_or_none(next(_tensors_in(slots[slot])))}" for slot in wrong)
    reason = f"{shapes} does not fit {live.shape}"
    if on_shape == "error":
        raise GroupsError(
            f"the state of {quoted(live.name)} does not fit: {reason}",
            hint='on_shape="drop" drops the state, on_shape="pad" adds rows to it',
        )
    if on_shape == "pad":
        fault = _padding_fault(slots, wrong, live, older, schema)
        if fault is None:
            padded = {slot: _pad(slots[slot], live.shape[0], _initial_value(slot, schema, options)) for slot in wrong}
            converted, changes = _converted({**slots, **padded}, live, older, schema, options)
            return ConvertedState(converted, {**dict.fromkeys(wrong, f"padded to {live.shape}"), **changes})
        reason = f"{reason}, and {fault}"
    return ConvertedState({}, {}, tuple(slots), reason)


def _unusable(value: object, live: LiveParameter) -> str | None:
    """Return why no state can be kept, whatever its shape, or None."""
    if live.lazy:
        return "the parameter has no shape yet"
    for tensor in _tensors_in(value):
        if tensor.is_meta and not live.tensor.is_meta:
            return "it is on the meta device, which has no values"
        if hasattr(live.tensor, "device_mesh") != hasattr(tensor, "device_mesh"):
            return "only one of the parameter and its state is a DTensor"
    return None


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors with dimensions in a slot; optimizers outside torch keep lists and dicts of them."""
    seen: set[int] = set()  # a list may contain itself
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if is_tensor(inner):
            if inner.ndim:
                yield inner
        elif isinstance(inner, Mapping | list | tuple) and id(inner) not in seen:
            seen.add(id(inner))
            waiting.extend(reversed([*(inner.values() if isinstance(inner, Mapping) else inner)]))


def _wrong_shapes(
    slots: Mapping[str, Any], live: LiveParameter, older: Tensor | None, schema: OptimizerSchema | None
) -> tuple[str, ...]:
    """Return the slots with a shape that does not fit the parameter."""
    tensors = {name: value for name, value in slots.items() if is_tensor(value) and value.ndim}
    if schema is not None:
        known = {slot.name: slot for slot in schema.slots}
        return tuple(
            name
            for name, value in tensors.items()
            if name in known and known[name].mismatch(value, shape_or_none(value), live.shape) is not None
        )
    # The state of an optimizer outside torch fitted the older parameter; nothing else is known about it.
    if older is None or tuple(older.shape) == live.shape:
        return ()
    return tuple(name for name, value in slots.items() if next(_tensors_in(value), None) is not None)


def _padding_fault(
    slots: Mapping[str, Any],
    wrong: tuple[str, ...],
    live: LiveParameter,
    older: Tensor | None,
    schema: OptimizerSchema | None,
) -> str | None:
    """Return why rows cannot be added, or None where they can."""
    import torch

    if schema is None or not schema.is_elementwise:
        return "the initial value of a new row is not known for this optimizer"
    for name in wrong:
        was = tuple(slots[name].shape)
        if not live.shape or was[1:] != live.shape[1:] or was[0] > live.shape[0]:
            return "the parameter did not grow by rows"
    if older is not None:
        rows = live.tensor.detach()[: older.shape[0]]
        if older.is_meta or not torch.equal(rows, older.detach().to(rows.device, rows.dtype)):
            return "the new parameter does not begin with the rows of the older one"
    return None


def _initial_value(name: str, schema: OptimizerSchema | None, options: Mapping[str, Any]) -> float:
    slot = None if schema is None else schema.slot(name)
    return 0.0 if slot is None else float(options.get(slot.initial_value_option, 0.0))


def _pad(value: Tensor, rows: int, fill: float) -> Tensor:
    (grown,) = Pad(size=rows, fill=fill or "zeros").apply([value.cpu()])
    return grown.to(value.device)


def _converted(
    slots: Mapping[str, Any],
    live: LiveParameter,
    older: Tensor | None,
    schema: OptimizerSchema | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the slots in the dtype, on the device and in the layout of the parameter, and the changes."""
    converted: dict[str, Any] = {}
    changes: dict[str, str] = {}
    tensor = live.tensor
    for name, value in slots.items():
        converted[name] = value
        if not is_tensor(value):
            continue
        is_known = schema is not None and schema.slot(name) is not None
        # As in torch, counters keep their dtype, and only fused and captured steps keep them on the device.
        is_counter = name == "step"
        is_on_device = not is_counter or bool(options.get("fused") or options.get("capturable"))
        follows_dtype = is_known or (older is not None and value.dtype == older.dtype)
        to_dtype = not is_counter and follows_dtype and value.is_floating_point() and value.dtype != tensor.dtype
        moves = (
            is_on_device
            and value.device != tensor.device
            and (is_known or older is None or value.device == older.device)
        )
        new = value.to(tensor.device if moves else value.device, tensor.dtype if to_dtype else value.dtype)
        if _follows_layout(name, value, older, schema) and is_plain(tensor) and value.shape == tensor.shape:
            new = in_layout_of(new, tensor)
        if new is not value:
            converted[name] = new
            changes[name] = " and ".join(
                part
                for part in (
                    f"cast from {value.dtype} to {tensor.dtype}" if to_dtype else "",
                    f"moved from {value.device} to {tensor.device}" if moves else "",
                    f"given the strides {tuple(new.stride())}" if new.stride() != value.stride() else "",
                )
                if part
            )
    return converted, changes


def _follows_layout(name: str, value: Tensor, older: Tensor | None, schema: OptimizerSchema | None) -> bool:
    """Return whether a slot has the layout of its parameter: a fused step reads both in the order of memory."""
    if not is_plain(value):
        return False
    if schema is None:  # nothing is known about the slot, unless it had the layout of the older parameter
        return is_plain(older) and value.shape == older.shape and has_same_layout(value, older)
    slot = schema.slot(name)
    return slot is not None and slot.layout == "elementwise"
