"""Make one training step on a copy of the model, and report which parameters get a gradient and change."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import first_line, listed
from ckptkit.core.torch_bridge import flat_bytes
from ckptkit.core.torch_types import Module, Optimizer, Parameter, Tensor
from ckptkit.errors import CkptkitError
from ckptkit.readiness import codes
from ckptkit.readiness.model import DryStep

__all__ = ["LossFunction", "OptimizerFactory", "run_dry_step"]

LossFunction = Callable[[Any], object]  # takes the model and returns the loss of one batch: a tensor of one number
OptimizerFactory = Callable[[Module], Sequence[Optimizer]]  # takes the copy and returns the optimizers that step it
_SHOWN = 4
_LOSS_CONTRACT = "the function takes the model and returns the loss of one batch, a tensor of one number"


def run_dry_step(
    model: Module, frozen: frozenset[str], loss: LossFunction, optimizers: OptimizerFactory
) -> tuple[DryStep, list[Finding]]:
    """Return the result of a forward pass, a backward pass and a step on a copy of the model.

    The model itself is not changed, and the copy has the same mode (``train`` or ``eval``). The state of torch's random
    number generators is restored. Side effects of the loss function outside the model remain.
    """
    import torch

    devices = sorted({tensor.get_device() for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            model_copy = copy.deepcopy(model)
            for tensor in model_copy.parameters():
                tensor.grad = None
            stepping = tuple(optimizers(model_copy))
        except CkptkitError:
            raise
        except Exception as error:  # noqa: BLE001 - a part of the model may refuse to be copied in any way
            message = f"no dry step was made, because the model cannot be copied: {first_line(error)}"
            return DryStep(None, "", 0, 0, 0), [codes.NO_COPY.finding("", message)]
        return _step(model, model_copy, frozen, loss, stepping)


def _step(
    model: Module, model_copy: Module, frozen: frozenset[str], loss: LossFunction, optimizers: Sequence[Optimizer]
) -> tuple[DryStep, list[Finding]]:
    import torch

    classes = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
    named = {name: tensor for name, tensor in model_copy.named_parameters() if name not in frozen}
    no_step = DryStep(None, classes, len(named), 0, 0)
    try:
        with torch.enable_grad():
            value = loss(model_copy)
    except Exception as error:  # noqa: BLE001 - the loss function of the user may raise anything
        message = f"the loss function failed: {first_line(error)}"
        return no_step, [codes.STEP_FAILED.finding("", message, _LOSS_CONTRACT)]
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        given = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        return no_step, [codes.STEP_FAILED.finding("", f"the loss function returned {given}", _LOSS_CONTRACT)]
    number = float(value.detach())
    if not value.requires_grad:
        message = "the loss depends on no parameter that trains"
        hint = "remove no_grad() and detach() between the parameters and the loss"
        return DryStep(number, classes, len(named), 0, 0), [codes.STEP_FAILED.finding("", message, hint)]
    try:
        value.backward()  # type: ignore[no-untyped-call]
        grads = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
        findings = [*_loss_findings(number), *_gradient_findings(named, grads)]
        before = dict(model.named_parameters())
        for optimizer in optimizers:
            # step() of the class: a scheduler stores a step() in the object, and this updates the original optimizer.
            step: Callable[..., object] = type(optimizer).step
            closure = inspect.signature(step).parameters.get("closure")
            if closure is not None and closure.default is closure.empty:
                step(optimizer, lambda: value)
            else:
                step(optimizer)
    except Exception as error:  # noqa: BLE001 - hooks and optimizers of the user may raise anything
        hint = "the step was made on a copy of the model"
        return no_step, [codes.STEP_FAILED.finding("", f"the step failed: {first_line(error)}", hint)]
    moved = [name for name, tensor in model_copy.named_parameters() if _differs(tensor, before[name])]
    if optimizers:
        findings += _change_findings(named, grads, moved, frozen)
    return DryStep(number, classes, len(named), len(grads), sum(name in named for name in moved)), findings


def _loss_findings(number: float) -> Iterator[Finding]:
    if not math.isfinite(number):
        yield codes.LOSS.finding(
            "", f"the loss is {number}", "check the batch, and the findings about values of the model"
        )


def _gradient_findings(named: Mapping[str, Parameter], grads: Mapping[str, Tensor]) -> Iterator[Finding]:
    unused = [name for name in named if name not in grads]
    if unused:
        pronoun = "it" if len(unused) == 1 else "them"
        yield codes.NO_GRADIENT.finding(
            unused[0],
            f"{listed(unused, _SHOWN)} got no gradient: the forward pass does not use {pronoun}",
            "freeze unused parameters (requires_grad_(False)), or use them; DDP refuses a model with unused parameters",
        )
    not_finite = [name for name, grad in grads.items() if not bool(_values(grad).isfinite().all())]
    if not_finite:
        yield codes.GRADIENT.finding(
            not_finite[0],
            f"the gradient of {listed(not_finite, _SHOWN)} is not finite",
            "scale the loss down, or run in float32, to find the layer where NaN or Inf begins",
        )
    zero = [name for name, grad in grads.items() if not bool(_values(grad).any())]
    if zero:
        yield codes.ZERO_GRADIENT.finding(
            zero[0],
            f"the gradient of {listed(zero, _SHOWN)} is 0 everywhere, for this batch",
            "possible causes: dead units, a constant loss, or a later layer that is all zero",
        )


def _change_findings(
    named: Mapping[str, Parameter], grads: Mapping[str, Tensor], moved: Sequence[str], frozen: frozenset[str]
) -> Iterator[Finding]:
    still = [name for name in named if name in grads and name not in moved and bool(_values(grads[name]).any())]
    if still:
        yield codes.NOT_MOVED.finding(
            still[0],
            f"{listed(still, _SHOWN)} got a gradient, but the step did not change the values",
            "the parameter is in no group, or lr is 0, or the update is too small for the dtype of the weight",
        )
    wrong = [name for name in moved if name in frozen]
    if wrong:
        message = f"{listed(wrong, _SHOWN)} {'is' if len(wrong) == 1 else 'are'} frozen, but changed"
        yield codes.FROZEN_MOVED.finding(wrong[0], message, "the forward pass writes to a frozen parameter")


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def _differs(tensor: Tensor, other: Tensor) -> bool:
    import torch

    return tensor.shape != other.shape or not torch.equal(flat_bytes(tensor), flat_bytes(other))
