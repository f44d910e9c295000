"""One step on a copy: whether what shall train gets a gradient and moves, and what is frozen stays."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import listed
from ckptkit.core.torch_bridge import first_line, flat_bytes
from ckptkit.core.torch_types import Module, Parameter, Tensor
from ckptkit.errors import CkptkitError
from ckptkit.readiness.model import DryStep

__all__ = ["Loss", "Stepped", "run_dry_step"]

Loss = Callable[[Any], Any]  # takes the model and returns the loss of one batch: a tensor of one number
Stepped = Callable[[Any], Sequence[Any]]  # takes the copy of the model and returns the optimizers that step it
_SHOWN = 4
_CONTRACT = "it takes the model and returns the loss of one batch, a tensor of one number"


def run_dry_step(
    model: Module, frozen: frozenset[str], loss: Loss, optimizers: Stepped
) -> tuple[DryStep, list[Finding]]:
    """Return what a forward pass, a backward pass and a step do to a copy of the model.

    The model itself is not touched; the copy is in its mode (``train``, ``eval``). The state of torch's random numbers
    is put back. What the loss function changes elsewhere is its own.
    """
    import torch

    devices = sorted({tensor.get_device() for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            twin = copy.deepcopy(model)
            for tensor in twin.parameters():
                tensor.grad = None
            stepping = tuple(optimizers(twin))
        except CkptkitError:
            raise
        except Exception as error:  # noqa: BLE001 - what a model holds may refuse to be copied in any way
            message = f"no dry step was made, since the model cannot be copied: {first_line(error)}"
            return DryStep(None, "", 0, 0, 0), [Finding("preflight.no-copy", "warning", "", message)]
        return _stepped(model, twin, frozen, loss, stepping)


def _stepped(
    model: Module, twin: Module, frozen: frozenset[str], loss: Loss, optimizers: Sequence[Any]
) -> tuple[DryStep, list[Finding]]:
    import torch

    called = ", ".join(type(one).__name__ for one in optimizers)
    named = {name: tensor for name, tensor in twin.named_parameters() if name not in frozen}
    nothing = DryStep(None, called, len(named), 0, 0)
    try:
        with torch.enable_grad():
            value = loss(twin)
    except Exception as error:  # noqa: BLE001 - the user's own code may raise anything
        return nothing, [_failed(f"the loss function failed: {first_line(error)}", _CONTRACT)]
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        told = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        return nothing, [_failed(f"the loss function returned {told}", _CONTRACT)]
    number = float(value.detach())
    if not value.requires_grad:
        reason = "the loss depends on no parameter that trains"
        return DryStep(number, called, len(named), 0, 0), [_failed(reason, "no_grad() and detach() cut it off")]
    try:
        value.backward()  # type: ignore[no-untyped-call]
        grads = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
        findings = [*_loss_finding(number), *_gradients(named, grads)]
        before = dict(model.named_parameters())
        for one in optimizers:
            # Of the class: a scheduler puts a step into the object, and that one steps the original.
            step = type(one).step
            closure = inspect.signature(step).parameters.get("closure")
            if closure is not None and closure.default is closure.empty:
                step(one, lambda: value)
            else:
                step(one)
    except Exception as error:  # noqa: BLE001 - as above, and hooks and optimizers of anybody's
        return nothing, [_failed(f"the step failed: {first_line(error)}", "the finding is of a copy of the model")]
    moved = [name for name, tensor in twin.named_parameters() if _differ(tensor, before[name])]
    if optimizers:
        findings += _moves(named, grads, moved, frozen)
    return DryStep(number, called, len(named), len(grads), sum(name in named for name in moved)), findings


def _failed(message: str, hint: str) -> Finding:
    return Finding("preflight.step-failed", "error", "", message, hint)


def _loss_finding(number: float) -> Iterator[Finding]:
    if not math.isfinite(number):
        yield Finding(
            "preflight.loss", "error", "", f"the loss is {number}", "look at the batch, and at the values above"
        )


def _gradients(named: dict[str, Parameter], grads: dict[str, Any]) -> Iterator[Finding]:
    unused = [name for name in named if name not in grads]
    if unused:
        pronoun = "it" if len(unused) == 1 else "them"
        yield Finding(
            "preflight.no-gradient",
            "warning",
            unused[0],
            f"{listed(unused, _SHOWN)} got no gradient: the forward pass does not use {pronoun}",
            "freeze what does not train (requires_grad_(False)), or put it to use; DDP refuses it as it is",
        )
    bad = [name for name, grad in grads.items() if not bool(_values(grad).isfinite().all())]
    if bad:
        message = f"the gradient of {listed(bad, _SHOWN)} is not finite"
        yield Finding(
            "preflight.gradient", "error", bad[0], message, "a smaller loss, or float32, shows where it begins"
        )
    zero = [name for name, grad in grads.items() if not bool(_values(grad).any())]
    if zero:
        yield Finding(
            "preflight.zero-gradient",
            "warning",
            zero[0],
            f"the gradient of {listed(zero, _SHOWN)} is 0 everywhere, for this batch",
            "dead units, a loss that is constant, or a layer behind one that is all zero",
        )


def _moves(
    named: dict[str, Parameter], grads: dict[str, Any], moved: Sequence[str], frozen: frozenset[str]
) -> Iterator[Finding]:
    still = [name for name in named if name in grads and name not in moved and bool(_values(grads[name]).any())]
    if still:
        yield Finding(
            "preflight.not-moved",
            "warning",
            still[0],
            f"{listed(still, _SHOWN)} got a gradient and did not move by one step",
            "in no group, at lr = 0, or the update is too small for the dtype of the weight",
        )
    wrong = [name for name in moved if name in frozen]
    if wrong:
        message = f"{listed(wrong, _SHOWN)} {'is' if len(wrong) == 1 else 'are'} frozen, and moved"
        yield Finding("preflight.frozen-moved", "error", wrong[0], message, "the forward pass writes to it")


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def _differ(one: Tensor, other: Tensor) -> bool:
    import torch

    return one.shape != other.shape or not torch.equal(flat_bytes(one), flat_bytes(other))
