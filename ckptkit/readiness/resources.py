"""Check the dtypes of the parameters, and estimate the memory of parameters, gradients and optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted, short_number
from ckptkit.core.torch_optim import SlotSchema
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.loading.watch import named_tensors
from ckptkit.param_groups.live import LiveOptimizer
from ckptkit.readiness import codes
from ckptkit.readiness.model import Memory, StateMemory

if TYPE_CHECKING:
    import torch

__all__ = ["check_dtypes", "estimate_memory"]

_STEP_BYTES = 4  # torch keeps scalar slots in float32, whatever the dtype of the parameter


def check_dtypes(model: Module, frozen: frozenset[str], optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    """Yield findings about dtypes that cannot train, or that lose the updates of an optimizer."""
    named = list(model.named_parameters())
    integers = [name for name, tensor in named if not (tensor.is_floating_point() or tensor.is_complex())]
    if integers:
        yield codes.INTEGERS.finding(
            integers[0],
            f"{plural(len(integers), 'parameter')} of an integer dtype ({quoted(integers[0])}) cannot have a gradient",
            "quantised weights do not train; register a counter as a buffer",
            keys=integers,
        )
    by_dtype: dict[str, list[str]] = {}
    for name, tensor in named:
        if name not in frozen:
            by_dtype.setdefault(_dtype_name(tensor.dtype), []).append(name)
    if len(by_dtype) > 1:
        counts = ", ".join(f"{dtype} ({plural(len(names), 'parameter')})" for dtype, names in by_dtype.items())
        yield codes.MIXED_DTYPES.finding(
            "",
            f"the parameters that train have several dtypes: {counts}",
            "fused and foreach kernels run once for each dtype; cast the whole model if this is not intended",
        )
    for optimizer in optimizers:
        yield from _eps_findings(optimizer)
    low = by_dtype.get("bfloat16", [])
    if low and optimizers:
        yield codes.BF16_WEIGHTS.finding(
            low[0],
            f"{plural(len(low), 'parameter')} {'is' if len(low) == 1 else 'are'} updated in bfloat16, which has 8 bits "
            "of precision: an update below 1/256 of the weight is lost",
            "keep the weights in float32 and use autocast, or an optimizer with master weights",
            keys=low,
        )


def _eps_findings(optimizer: LiveOptimizer) -> Iterator[Finding]:
    import torch

    for number, group in enumerate(optimizer.groups):
        eps = group.options.get("eps")
        low = [member for member in optimizer.members_of(group) if member.tensor.dtype == torch.float16]
        if not low or isinstance(eps, bool) or not isinstance(eps, float):
            continue
        if eps and float(torch.tensor(eps, dtype=torch.float16, device="cpu")) == 0:
            yield codes.EPS.finding(
                "",
                f"group {number} has {plural(len(low), 'parameter')} in float16, where its eps = {short_number(eps)} "
                f"is 0: {optimizer.class_name} divides 0 by 0 for a gradient of 0, and the weight becomes NaN",
                "keep the weights in float32 and use autocast, or set eps = 1e-4",
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def estimate_memory(model: Module, trainable: Iterable[Tensor], optimizers: Iterable[LiveOptimizer]) -> Memory:
    """Return the bytes of the model, of the gradients of ``trainable``, and of the states of ``optimizers``.

    Shared memory counts once. The size of a state is its size after the first step, with slots in the dtype of the
    parameter. Master weights, and copies that a foreach step makes for a short time, are not included.
    """
    import torch

    parameters = {id(tensor) for tensor in model.parameters()}
    sizes: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for tensor in named_tensors(model).values():
        known = sizes[id(tensor) in parameters]
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            known[storage._cdata] = storage.nbytes()  # noqa: SLF001 - torch's own test of identity
        else:  # a sparse tensor has no single storage; its dense size is the upper bound
            known[id(tensor)] = tensor.numel() * tensor.element_size()
    buffers = sum(size for storage, size in sizes[False].items() if storage not in sizes[True])
    gradients = sum(
        tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in trainable}.values()
    )
    return Memory(sum(sizes[True].values()), buffers, gradients, tuple(map(_state_memory, optimizers)))


def _state_memory(optimizer: LiveOptimizer) -> StateMemory:
    schema = optimizer.schema
    if schema is None or schema.has_shared_state:
        return StateMemory(optimizer.class_name, (), None)
    total = 0
    slots: dict[str, None] = {}
    for member in optimizer.members:
        if not member.tensor.requires_grad:
            continue
        if member.shape is None:  # it has no shape yet
            continue
        for slot in schema.slots_for(member.group.options, member.shape):
            slots.setdefault(slot.name)
            total += _slot_bytes(slot, member.tensor)
    return StateMemory(optimizer.class_name, tuple(slots), total)


def _slot_bytes(slot: SlotSchema, tensor: Tensor) -> int:
    shape = slot.shape(tuple(tensor.shape))
    if slot.layout == "scalar":
        return _STEP_BYTES
    return 0 if shape is None else math.prod(shape) * tensor.element_size()
