"""How much memory training will take beside activations: counted from shapes and dtypes, nothing allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ckptkit.core.torch_optim import Slot, schema_of
from ckptkit.loading.snapshot import registered
from ckptkit.readiness.model import Memory, StateMemory

if TYPE_CHECKING:
    import torch
    from torch.nn import Module

__all__ = ["estimate_memory"]

_NUMBER = 4  # torch keeps a step in F32, whatever the parameter is


def estimate_memory(model: Module, trainable: Iterable[torch.Tensor], optimizers: Iterable[Any]) -> Memory:
    """Return what the model, the gradients of ``trainable`` and the states of ``optimizers`` take.

    What shares memory counts once. A state is that after the first step: its slots as torch makes them, in the dtype
    of the parameter, without the copies that a foreach step makes for a moment and without master weights.
    """
    import torch

    parameters = {id(tensor) for tensor in model.parameters()}
    sizes: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for tensor in registered(model).values():
        known = sizes[id(tensor) in parameters]
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            known[storage._cdata] = storage.nbytes()  # noqa: SLF001 - torch's own test of identity
        else:  # a sparse one has no storage of its own: as if it were dense, which is the most that it can take
            known[id(tensor)] = tensor.numel() * tensor.element_size()
    buffers = sum(size for place, size in sizes[False].items() if place not in sizes[True])
    gradients = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in trainable}.values())
    return Memory(sum(sizes[True].values()), buffers, gradients, tuple(map(_state, optimizers)))


def _state(optimizer: Any) -> StateMemory:
    schema = schema_of(type(optimizer))
    name = type(optimizer).__name__
    if schema is None or schema.shared:
        return StateMemory(name, (), None)
    total = 0
    slots: dict[str, None] = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if not tensor.requires_grad:
                continue
            for slot in schema.wanted(group, tuple(tensor.shape)):
                slots.setdefault(slot.name)
                total += _size(slot, tensor)
    return StateMemory(name, tuple(slots), total)


def _size(slot: Slot, tensor: torch.Tensor) -> int:
    shape = slot.shape(tuple(tensor.shape))
    if slot.layout == "scalar":
        return _NUMBER
    if shape is None:
        return 0
    return math.prod(shape) * tensor.element_size()
