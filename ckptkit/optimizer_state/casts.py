"""The values of a saved state that change to inf or 0 where torch casts the state to the dtypes of the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptkit.core.cast_losses import CastLoss, describe_overflow, describe_small_losses
from ckptkit.core.findings import Finding
from ckptkit.core.torch_bridge import code_of
from ckptkit.core.torch_optim import OptimizerSchema
from ckptkit.errors import PlanError
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.model import LazyTensor, SlotValue
from ckptkit.param_groups.parameters import LiveModel
from ckptkit.tensor_ops.casting import loss_of_cast
from ckptkit.values.losses import can_lose

__all__ = ["cast_findings"]


def cast_findings(
    state: Mapping[str, Mapping[str, SlotValue]],
    live_model: LiveModel,
    schema: OptimizerSchema | None,
    *,
    allow_overflow: bool,
) -> list[Finding]:
    """Return a finding for each slot with values that a cast makes 0, or inf with ``allow_overflow``.

    ``state`` has the slots of each parameter. Only slots that are cast are read. Raises ``PlanError`` where a cast
    would make inf of finite values, and ``allow_overflow`` is false.
    """
    losses = list(_losses(state, live_model, schema))
    overflowed = [loss for _, loss in losses if loss.overflowed]
    if overflowed and not allow_overflow:
        raise PlanError(
            describe_overflow(overflowed),
            hint="keep the parameters in the dtype of the state; allow_overflow=True loads the values anyway",
        )
    findings = []
    for name, loss in losses:
        if loss.overflowed:
            findings.append(codes.OVERFLOW.finding(name, describe_overflow([loss])))
        findings += [codes.UNDERFLOW.finding(name, sentence) for sentence in describe_small_losses([loss])]
    return findings


def _losses(
    state: Mapping[str, Mapping[str, SlotValue]], live_model: LiveModel, schema: OptimizerSchema | None
) -> Iterator[tuple[str, CastLoss]]:
    """Yield the losses of each slot that torch casts, with the name of its parameter."""
    # torch never casts the step, and single numbers get their dtype back after the load.
    kept = {"step"} | {slot.name for slot in (schema.slots if schema else ()) if slot.layout == "scalar"}
    for name, slots in state.items():
        parameter = live_model.by_name[name].tensor
        code = code_of(parameter.dtype)
        for slot, value in slots.items():
            if not isinstance(value, LazyTensor) or value.dtype == code or slot in kept:
                continue
            if not parameter.is_floating_point():
                continue
            if can_lose(value.dtype, code):
                tensor = value.read_shared()
                yield name, loss_of_cast(f"{name}.{slot}", tensor, tensor.to(parameter.dtype))
