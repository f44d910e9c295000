"""What dtypes do to a step: an eps that is nothing, updates too small to be kept, parameters without gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_optim import SlotSchema, schema_of
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.loading.snapshot import named_tensors
from ckptkit.readiness.model import Memory, StateMemory

if TYPE_CHECKING:
    import torch

__all__ = ["check_dtypes", "estimate_memory"]


def check_dtypes(model: Module, frozen: frozenset[str], optimizers: Sequence[Any]) -> Iterator[Finding]:
    """Yield what the dtypes of the parameters do to training with these optimizers."""
    named = list(model.named_parameters())
    training = [(name, tensor) for name, tensor in named if name not in frozen]
    whole = [name for name, tensor in named if not (tensor.is_floating_point() or tensor.is_complex())]
    if whole:
        yield Finding(
            "preflight.integers",
            "note",
            whole[0],
            f"{plural(len(whole), 'parameter')} of whole numbers ({quoted(whole[0])}) can have no gradient",
            "quantised weights do not train; a counter is better a buffer",
        )
    counts: dict[str, list[str]] = {}
    for name, tensor in training:
        counts.setdefault(_called(tensor.dtype), []).append(name)
    if len(counts) > 1:
        told = ", ".join(f"{dtype} ({plural(len(names), 'parameter')})" for dtype, names in counts.items())
        yield Finding(
            "preflight.mixed-dtypes",
            "note",
            "",
            f"what trains is of several dtypes: {told}",
            "fused and foreach steps work on each apart; where it is not meant, cast the model as a whole",
        )
    for optimizer in optimizers:
        yield from _eps(optimizer)
    low = counts.get("bfloat16", [])
    if low and optimizers:
        yield Finding(
            "preflight.bf16-weights",
            "warning",
            low[0],
            f"{plural(len(low), 'parameter')} {'is' if len(low) == 1 else 'are'} stepped in bfloat16, which has 8 bits "
            "of precision: an update smaller than 1/256 of a weight is lost, as lr = 1e-3 is on a weight of 1",
            "keep the weights in float32 and use autocast, or an optimizer with master weights",
        )


def _eps(optimizer: Any) -> Iterator[Finding]:
    import torch

    for number, group in enumerate(optimizer.param_groups):
        eps = group.get("eps")
        low = [tensor for tensor in group["params"] if tensor.dtype == torch.float16]
        if not low or isinstance(eps, bool) or not isinstance(eps, float):
            continue
        if eps and float(torch.tensor(eps, dtype=torch.float16)) == 0:
            yield Finding(
                "preflight.eps",
                "error",
                "",
                f"group {number} has eps = {eps:g}, which is 0 in float16, for {plural(len(low), 'parameter')}: "
                f"{type(optimizer).__name__} divides 0 by 0 where a gradient is 0, and the weight is NaN",
                "keep the weights in float32 and use autocast, or set eps = 1e-4",
            )


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_NUMBER = 4  # torch keeps a step in F32, whatever the parameter is


def estimate_memory(model: Module, trainable: Iterable[Tensor], optimizers: Iterable[Any]) -> Memory:
    """Return what the model, the gradients of ``trainable`` and the states of ``optimizers`` take.

    What shares memory counts once. A state is that after the first step: its slots as torch makes them, in the dtype
    of the parameter, without the copies that a foreach step makes for a moment and without master weights.
    """
    import torch

    parameters = {id(tensor) for tensor in model.parameters()}
    sizes: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for tensor in named_tensors(model).values():
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
    if schema is None or schema.has_shared_state:
        return StateMemory(name, (), None)
    total = 0
    slots: dict[str, None] = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if not tensor.requires_grad:
                continue
            for slot in schema.slots_for(group, tuple(tensor.shape)):
                slots.setdefault(slot.name)
                total += _size(slot, tensor)
    return StateMemory(name, tuple(slots), total)


def _size(slot: SlotSchema, tensor: Tensor) -> int:
    shape = slot.shape(tuple(tensor.shape))
    if slot.layout == "scalar":
        return _NUMBER
    if shape is None:
        return 0
    return math.prod(shape) * tensor.element_size()
