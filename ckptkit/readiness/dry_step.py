"""Make one training step on a copy of the model, and report which parameters get a gradient and change."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.random_state import restored_random_state
from ckptkit.core.text import first_line, kind_of, listed, short_number
from ckptkit.core.torch_bridge import flat_bytes, shape_or_none
from ckptkit.core.torch_optim import initial_lr
from ckptkit.core.torch_types import Module, Optimizer, Tensor
from ckptkit.errors import CkptkitError
from ckptkit.readiness import codes
from ckptkit.readiness.model import DryStep
from ckptkit.readiness.observation import Graph, Observation, observed
from ckptkit.readiness.step_findings import Step, check_forward, check_gradients, check_graph, check_moves

__all__ = ["LossFunction", "OptimizerFactory", "run_dry_step"]

LossFunction = Callable[[Any], object]  # takes the model and returns the loss of one batch: a tensor of one number
OptimizerFactory = Callable[[Module], Sequence[Optimizer]]  # takes the copy and returns the optimizers that step it
_LOSS_CONTRACT = "the function takes the model and returns the loss of one batch, a tensor of one number"


def run_dry_step(
    model: Module, frozen: frozenset[str], loss: LossFunction, optimizers: OptimizerFactory
) -> tuple[DryStep, list[Finding], frozenset[str]]:
    """Return the result of a forward pass, a backward pass and a step on a copy of the model.

    The last value has the names of the parameters with different numbers in their gradient: they train even from
    values that are all equal.


    The model itself is not changed, and the copy has the same mode (``train`` or ``eval``). The state of the random
    number generators of torch, numpy and Python is restored. Side effects of the loss function outside the model
    remain.
    """
    if not callable(loss):
        message = f"dry_step is {kind_of(loss)}, not a function"
        return DryStep(None, "", 0, 0, 0), [codes.STEP_FAILED.finding("", message, _LOSS_CONTRACT)], frozenset()
    if reason := _reason_not_copied(model):
        message = f"no dry step was made, because the model cannot be copied: {reason}"
        return DryStep(None, "", 0, 0, 0), [codes.NO_COPY.finding("", message)], frozenset()
    with restored_random_state():
        try:
            model_copy = copy.deepcopy(model, _copied_tensors(model))
            _refuse_other_copy(model, model_copy)
            for tensor in model_copy.parameters():
                tensor.grad = None
            stepping = tuple(optimizers(model_copy))
        except CkptkitError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a part of the model may refuse to be copied in any way
            message = f"no dry step was made, because the model cannot be copied: {first_line(error)}"
            return DryStep(None, "", 0, 0, 0), [codes.NO_COPY.finding("", message)], frozenset()
        return _step(model, model_copy, frozen, loss, stepping)


def _reason_not_copied(model: Module) -> str:
    """Return why a copy would not be independent of the model, or an empty string."""
    import torch

    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "the forward pass of a copied ScriptModule uses the parameters of the original"
    return ""


def _copied_tensors(model: Module) -> dict[int, Any]:
    """Return copies, by ``id()``, of the tensors that deepcopy refuses: with a graph, or without a shape."""
    from torch.nn.parameter import UninitializedBuffer

    kept = [tensor for module in model.modules() for value in vars(module).values() for tensor in _tensors_in(value)]
    copies = {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    lazy = [buffer for buffer in model.buffers() if isinstance(buffer, UninitializedBuffer)]
    made = {id(buffer): UninitializedBuffer() for buffer in lazy}
    return {**copies, **made}


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield ``value``, or the tensors that a list, a tuple or a dict has in itself or in a list one level below."""
    import torch

    for outer in _members(value):
        yield from (inner for inner in _members(outer) if isinstance(inner, torch.Tensor))


def _members(value: object) -> Sequence[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple) else [value]


def _step(
    model: Module, model_copy: Module, frozen: frozenset[str], loss: LossFunction, optimizers: Sequence[Optimizer]
) -> tuple[DryStep, list[Finding], frozenset[str]]:
    import torch

    classes = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
    original = dict(model.named_parameters())
    named = {name: tensor for name, tensor in model_copy.named_parameters() if name not in frozen}
    no_step = DryStep(None, classes, len(named), 0, 0)
    observation = Observation(model_copy)
    try:
        _begin_training(optimizers)
        with torch.enable_grad(), observed(observation):
            value = loss(model_copy)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the loss function of the user may raise anything
        message = f"the loss function failed: {first_line(error)}"
        return no_step, [codes.STEP_FAILED.finding("", message, _LOSS_CONTRACT)], frozenset()
    written = {
        name for name, tensor in model_copy.named_parameters() if name in frozen and _differs(tensor, original[name])
    }
    step = Step(model, model_copy, frozen, named, written, optimizers)
    findings = list(check_forward(step, observation.parameters, _changed_buffers(model, model_copy)))
    if (fault := _loss_fault(value)) is not None or not isinstance(value, torch.Tensor):
        message = f"the loss function returned {fault}"
        return no_step, [codes.STEP_FAILED.finding("", message, _LOSS_CONTRACT), *findings], frozenset()
    number = float(value.detach())
    graph = Graph(value, observation)
    if not value.requires_grad:
        return DryStep(number, classes, len(named), 0, 0), [*check_graph(step, graph), *findings], frozenset()
    versions = {name: tensor._version for name, tensor in model_copy.named_parameters() if name in frozen}  # noqa: SLF001
    try:
        value.backward()  # type: ignore[no-untyped-call]
        written |= {name for name, version in versions.items() if step.parameters[name]._version != version}  # noqa: SLF001
        step.grads.update({name: tensor.grad for name, tensor in named.items() if tensor.grad is not None})
        findings += check_gradients(step, graph, number)
        findings += _begin_warm_up(optimizers)
        for optimizer in optimizers:
            _call_step(optimizer, value)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - hooks and optimizers of the user may raise anything
        hint = "the step was made on a copy of the model"
        failed = codes.STEP_FAILED.finding("", f"the step failed: {first_line(error)}", hint)
        return no_step, [failed, *findings], frozenset()
    moved = [name for name, tensor in step.parameters.items() if name in original and _differs(tensor, original[name])]
    if optimizers:
        findings += check_moves(step, moved)
    return (
        DryStep(number, classes, len(named), len(step.grads), sum(name in named for name in moved)),
        findings,
        step.varied,
    )


def _refuse_other_copy(model: Module, model_copy: object) -> None:
    """Raise ``TypeError`` where ``__deepcopy__`` of the model gives something else than a model of these parameters."""
    from torch import nn

    if not isinstance(model_copy, nn.Module):
        raise TypeError(f"its copy is {kind_of(model_copy)}, not a module")
    if [name for name, _ in model_copy.named_parameters()] != [name for name, _ in model.named_parameters()]:
        raise TypeError("its copy has other parameters")


def _loss_fault(value: object) -> str | None:
    """Return what the loss function returned instead of a tensor of one real number, or None."""
    import torch

    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    if value.numel() != 1:
        return f"a tensor {list(shape_or_none(value) or ())}"
    if value.is_meta or value.layout is not torch.strided:
        return f"a {'meta' if value.is_meta else 'sparse'} tensor"
    return f"a tensor of {value.dtype}" if value.is_complex() else None


def _call_step(optimizer: Optimizer, value: Tensor) -> None:
    # step() of the class: a scheduler stores a step() in the object, and this updates the original optimizer.
    step: Callable[..., object] = type(optimizer).step
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        step(optimizer, lambda: value)
    else:
        step(optimizer)


def _begin_training(optimizers: Sequence[Optimizer]) -> None:
    """Put schedule-free optimizers into train mode, as the training loop does: they refuse a step in eval mode."""
    for optimizer in optimizers:
        is_waiting = any(group.get("train_mode") is False for group in optimizer.param_groups)
        if is_waiting and callable(train := getattr(optimizer, "train", None)):
            train()


def _begin_warm_up(optimizers: Sequence[Optimizer]) -> Iterator[Finding]:
    """Set lr to initial_lr in each group that a schedule holds at 0, and yield a note about these groups."""
    rates: dict[str, None] = {}
    count = total = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            total += 1
            base = initial_lr(group)
            if _is_zero(group.get("lr")) and base is not None and not _is_zero(base):
                count += 1
                rates.setdefault(short_number(float(base)))  # type: ignore[arg-type]
                if hasattr(group["lr"], "fill_"):
                    group["lr"].fill_(float(base))  # type: ignore[arg-type]
                else:
                    group["lr"] = base
    if count:
        groups = "all groups" if count == total else f"{count} of {total} groups"
        yield codes.WARM_UP.finding(
            "",
            f"the lr of {groups} is 0 at this step of the schedule, as a warm-up begins: the dry step used their "
            f"initial_lr ({listed(list(rates), 3, show=str)})",
        )


def _is_zero(rate: Any) -> bool:
    try:
        return float(rate) == 0
    except (TypeError, ValueError, RuntimeError):
        return False


def _changed_buffers(model: Module, model_copy: Module) -> Iterator[str]:
    before: Mapping[str, Tensor] = dict(model.named_buffers())
    for name, buffer in model_copy.named_buffers():
        if name in before and _differs(buffer, before[name]):
            yield name


def _differs(tensor: Tensor, other: Tensor) -> bool:
    import torch

    shape = shape_or_none(tensor)
    if shape is None or shape != shape_or_none(other) or tensor.layout is not other.layout:
        return shape != shape_or_none(other)
    if tensor.layout is not torch.strided:
        tensor, other = tensor.to_dense(), other.to_dense()
    local, other_local = (getattr(side, "to_local", lambda side=side: side)() for side in (tensor, other))
    try:
        return not torch.equal(flat_bytes(local), flat_bytes(other_local))
    except (RuntimeError, AssertionError, TypeError):  # a subclass of Tensor may have no bytes, and lack operations
        return False
