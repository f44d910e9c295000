"""Describe what a dry step showed: parameters without a gradient, without a change, and frozen tensors that changed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptkit.checks.meant import adapter_of
from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, plural, quoted, short_number
from ckptkit.core.torch_optim import initial_lr
from ckptkit.core.torch_types import Module, Optimizer, Parameter, Tensor
from ckptkit.param_groups.parameters import address
from ckptkit.param_groups.validate.modules import is_running_statistic, owner_of_buffer
from ckptkit.readiness import codes
from ckptkit.readiness.observation import Cause, Graph

__all__ = ["Step", "check_forward", "check_gradients", "check_graph", "check_moves"]

_SHOWN = 4
_NEGLIGIBLE = 1e-5  # of the largest gradient: float32 has 24 bits
_EXPERT = re.compile(r"(^|\.)\w*experts?(\.|$)")


@dataclass
class Step:
    """A dry step on ``model_copy``: ``named`` has the parameters that train, and ``grads`` their gradients.

    ``written`` has the names of the frozen parameters that changed before the optimizers stepped.
    """

    model: Module
    model_copy: Module
    frozen: frozenset[str]
    named: Mapping[str, Parameter]
    written: Collection[str]
    optimizers: Sequence[Optimizer]
    grads: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters of the copy after the forward pass."""
        return dict(self.model_copy.named_parameters())

    @cached_property
    def groups(self) -> Mapping[int, tuple[int, Mapping[str, Any]]]:
        """The number of the optimizer and the group of each parameter of the copy, by ``id()``."""
        return {
            id(tensor): (number, group)
            for number, optimizer in enumerate(self.optimizers)
            for group in optimizer.param_groups
            for tensor in group["params"]
        }

    @cached_property
    def varied(self) -> frozenset[str]:
        """The parameters with at least two different numbers in their gradient."""
        return frozenset(name for name, grad in self.grads.items() if _is_varied(_values(grad)))

    def largest(self, name: str) -> float:
        """Return the largest absolute value in a gradient."""
        return float(_values(self.grads[name]).detach().abs().max())

    def group_of(self, name: str) -> Mapping[str, Any] | None:
        """Return the group of the parameter, or None."""
        found = self.groups.get(id(self.parameters.get(name)))
        return None if found is None else found[1]


def check_forward(step: Step, before: Mapping[str, Parameter], buffers: Iterable[str]) -> Iterator[Finding]:
    """Yield findings about parameters that the forward pass made, and about buffers of frozen modules it changed.

    ``before`` has the parameters of the copy before the forward pass, and ``buffers`` the names of changed buffers.
    """
    severity = codes.MADE_IN_FORWARD.severities[0 if step.optimizers else 1]
    effect = (
        "no group of the optimizer holds"
        if step.optimizers
        else "an optimizer that was built before the first forward pass does not hold"
    )
    made = [name for name in step.parameters if name not in before]
    if made:
        yield codes.MADE_IN_FORWARD.finding(
            made[0],
            f"the first forward pass made {listed(made, _SHOWN)}, which {effect}",
            "make the parameters in __init__(), or run the model once on a sample batch before you build the optimizer",
            severity=severity,
            keys=made,
        )
    replaced = [name for name, tensor in step.parameters.items() if before.get(name, tensor) is not tensor]
    if replaced:
        yield codes.MADE_IN_FORWARD.finding(
            replaced[0],
            f"the forward pass replaced {listed(replaced, _SHOWN)} by a new object, which {effect}",
            "write the values in place under no_grad(): parameter.copy_(values)",
            severity=severity,
            keys=replaced,
        )
    yield from _check_buffers(step, buffers)


def _check_buffers(step: Step, buffers: Iterable[str]) -> Iterator[Finding]:
    running: dict[str, list[str]] = {}
    others: list[str] = []
    for name in buffers:
        owner = owner_of_buffer(step.model_copy, name, step.frozen)
        # Values that the forward pass also writes to the frozen parameters are an average of another network.
        if owner is None or any(written.startswith(f"{owner}.") for written in step.written):
            continue
        if is_running_statistic(step.model_copy, name):
            running.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
        elif step.model_copy.get_buffer(name).is_floating_point():
            others.append(name)
    if running:
        first = next(iter(running))
        verb, own = ("is", "its") if len(running) == 1 else ("are", "their")
        statistics = ", ".join(dict.fromkeys(leaf for leaves in running.values() for leaf in leaves))
        yield codes.FROZEN_BUFFERS.finding(
            f"{first}.{running[first][0]}",
            f"{listed(list(running), _SHOWN)} {verb} frozen but in train mode: the forward pass changed {own} buffers "
            f"({statistics}), so the output of the frozen part changes during training",
            "call .eval() on the frozen modules after each model.train(): model.train() undoes an earlier .eval()",
        )
    if others:
        yield codes.FROZEN_BUFFERS.finding(
            others[0],
            f"the forward pass changed {listed(others, _SHOWN)}, {plural(len(others), 'buffer')} of frozen modules",
            "call .eval() on the frozen modules if these values must stay",
            severity="note",
            keys=others,
        )


_CUTS = (
    "likely causes: no_grad() or inference_mode() around the module; detach(), .data or argmax() before the loss; "
    "checkpoint(use_reentrant=True) on inputs that need no gradient, as after a frozen embedding"
)
_UNUSED = "freeze unused parameters (requires_grad_(False)), or use them; DDP refuses a model with unused parameters"


def _cause_text(cause: Cause, module: str, count: int) -> tuple[str, str]:
    """Return what was seen of parameters without a gradient, and a hint."""
    them, modules = ("it", "its module") if count == 1 else ("them", "their modules")
    if cause == "unused":
        return f"the forward pass does not use {them}", _UNUSED
    used = f"the forward pass uses {them}"
    if cause == "checkpoint":
        return (
            f"{used}, but only in checkpoint(use_reentrant=True) where no input needs a gradient, so the graph is cut",
            "use checkpoint(use_reentrant=False), or model.enable_input_require_grads() with a frozen embedding",
        )
    if cause == "no_grad":
        return (
            f"{used}, but only while gradients are off (no_grad or inference_mode), so the graph is cut at {modules}",
            "remove no_grad() and inference_mode() around the modules that train, or freeze the parameters",
        )
    if cause == "detached":
        return f"{used}, but only as .data or detach(), which have no graph", "use the parameter itself"
    if cause == "undefined":
        return (
            f"{used} and the loss depends on {them}, but the backward pass of an operation returned no gradient",
            "an autograd.Function returned None for this input",
        )
    where = f"the graph is cut after {module}" if module else "no output of a module depends on it"
    return f"{used}, but the loss does not depend on {them}: {where}", _CUTS


def check_graph(step: Step, graph: Graph) -> Iterator[Finding]:
    """Yield the finding about a loss without a graph, with what was seen of the parameters that train."""
    seen = [
        f"{listed(names, _SHOWN)}: {_cause_text(cause, module, len(names))[0]}"
        for (cause, module), names in _by_cause(step.named, graph).items()
    ]
    text = f" ({'; '.join(seen[:3])})" if seen else ""
    yield codes.STEP_FAILED.finding(
        "",
        f"the loss depends on no parameter that trains{text}",
        f"remove no_grad() and detach() between the parameters and the loss; {_CUTS}"
        if step.named
        else "unfreeze the parameters that must train",
    )


def _by_cause(names: Iterable[str], graph: Graph) -> dict[tuple[Cause, str], list[str]]:
    found: dict[tuple[Cause, str], list[str]] = {}
    for name in names:
        found.setdefault(graph.cause(name), []).append(name)
    return found


def check_gradients(step: Step, graph: Graph, loss: float) -> Iterator[Finding]:
    """Yield findings about the loss, and about gradients that are absent, not finite or 0 everywhere."""
    if not math.isfinite(loss):
        yield codes.LOSS.finding(
            "", f"the loss is {loss}", "check the batch, and the findings about values of the model"
        )
    yield from _check_absent(step, graph)
    not_finite = [name for name, grad in step.grads.items() if not bool(_values(grad).isfinite().all())]
    if not_finite:
        yield codes.GRADIENT.finding(
            not_finite[0],
            f"the gradient of {listed(not_finite, _SHOWN)} is not finite",
            "scale the loss down, or run in float32, to find the layer where NaN or Inf begins",
            keys=not_finite,
        )
    yield from _check_zero(step, graph)


def _check_absent(step: Step, graph: Graph) -> Iterator[Finding]:
    absent = [name for name in step.named if name not in step.grads]
    others = set(_of_other_losses(step, absent))
    skipped = [name for name in absent if name not in others and _is_skipped(name, step, graph)]
    faults = [name for name in absent if name not in others and name not in skipped]
    for (cause, module), names in _by_cause(faults, graph).items():
        seen, hint = _cause_text(cause, module, len(names))
        yield codes.NO_GRADIENT.finding(names[0], f"{listed(names, _SHOWN)} got no gradient: {seen}", hint, keys=names)
    if skipped:
        yield codes.NO_GRADIENT.finding(
            skipped[0],
            f"{listed(skipped, _SHOWN)} got no gradient: the forward pass used other experts or layers for this batch",
            "DDP needs find_unused_parameters=True for parameters that a batch does not use",
            severity="note",
            keys=skipped,
        )
    if others:
        first = next(name for name in absent if name in others)
        yield codes.NO_GRADIENT.finding(
            first,
            f"{listed([name for name in absent if name in others], _SHOWN)} got no gradient, nor did any parameter "
            "of that optimizer: the loss of the dry step is the loss of another",
            "run another dry step with the other loss",
            severity="note",
        )


def _of_other_losses(step: Step, absent: Sequence[str]) -> Iterator[str]:
    """Yield the parameters of the optimizers that have no member with a gradient, while another optimizer has one."""
    number_of = {
        name: step.groups[id(step.named[name])][0] for name in step.named if id(step.named[name]) in step.groups
    }
    with_gradient = {number_of[name] for name in step.grads if name in number_of}
    if with_gradient:
        yield from (name for name in absent if name in number_of and number_of[name] not in with_gradient)


def _is_skipped(name: str, step: Step, graph: Graph) -> bool:
    """Return whether the forward pass left out one expert or layer of several by design, and used others."""
    pattern = _without_numbers(name)
    if graph.cause(name)[0] != "unused" or pattern == name:
        return False
    if _EXPERT.search(name):
        return any(_without_numbers(other) == pattern for other in step.grads)
    return _has_layerdrop(step.model)


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _has_layerdrop(model: Module) -> bool:
    """Return whether the model skips layers at random in train mode, as Wav2Vec2 does."""
    options = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop")
    sources = (source for module in model.modules() for source in (module, getattr(module, "config", None)))
    rates = (getattr(source, option, 0) for source in sources for option in options)
    return model.training and any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _check_zero(step: Step, graph: Graph) -> Iterator[Finding]:
    zero = [name for name, grad in step.grads.items() if grad.numel() and not bool(_values(grad).any())]
    if not zero:
        return
    starting = {
        name
        for name, grad in step.grads.items()
        if not bool(step.named[name].detach().any()) and bool(_values(grad).any())
    }
    behind = graph.names_behind_zeros(starting) if starting else frozenset()
    by_construction = [name for name in zero if name in behind or _has_zero_sibling(name, starting)]
    if by_construction:
        yield codes.ZERO_GRADIENT.finding(
            by_construction[0],
            f"the gradient of {listed(by_construction, _SHOWN)} is 0 at the first step: a factor that trains is still "
            "all zero, as B of LoRA",
            "this ends with the first step, which changes that factor",
            severity="note",
            keys=by_construction,
        )
    biases = [name for name in zero if name not in by_construction and _is_idle_bias(name, step, zero)]
    if biases:
        yield codes.ZERO_GRADIENT.finding(
            biases[0],
            f"the gradient of {listed(biases, _SHOWN)} is 0 everywhere, but not that of the weights beside",
            "this is usual for a bias before a norm, and for a loss that is a difference of two outputs",
            severity="note",
        )
    rest = [name for name in zero if name not in by_construction and name not in biases]
    if rest:
        yield codes.ZERO_GRADIENT.finding(
            rest[0],
            f"the gradient of {listed(rest, _SHOWN)} is 0 everywhere, for this batch",
            "possible causes: dead units, a constant loss, or a later layer that is all zero",
            keys=rest,
        )


def _is_idle_bias(name: str, step: Step, zero: Collection[str]) -> bool:
    path, _, leaf = name.rpartition(".")
    weight = f"{path}.weight" if path else "weight"
    return leaf == "bias" and weight in step.grads and weight not in zero


def _has_zero_sibling(name: str, starting: Collection[str]) -> bool:
    """Return whether a tensor of the same adapter starts at zero; the graph of an autograd.Function hides factors."""
    adapter = adapter_of(name)
    return bool(adapter) and any(adapter_of(other) == adapter for other in starting)


def check_moves(step: Step, moved: Sequence[str]) -> Iterator[Finding]:
    """Yield findings about parameters with a gradient that did not change, and about frozen ones that did."""
    changed = set(moved)
    still = [name for name, grad in step.grads.items() if name not in changed and bool(_values(grad).any())]
    reasons: dict[tuple[str, str, bool], list[str]] = {}
    for name in still:
        reasons.setdefault(_reason_not_moved(step, name), []).append(name)
    for (reason, hint, is_note), names in reasons.items():
        yield codes.NOT_MOVED.finding(
            names[0],
            f"{listed(names, _SHOWN)} got a gradient, but the step did not change the values: {reason}",
            hint,
            severity="note" if is_note else "warning",
            keys=names,
        )
    yield from _check_frozen(step, [name for name in moved if name in step.frozen])


def _reason_not_moved(step: Step, name: str) -> tuple[str, str, bool]:
    """Return why a step did not change a parameter, a hint, and whether a later step will."""
    group = step.group_of(name)
    if group is None:
        return "no group of the optimizer holds the parameter", "add the parameter to a group, or freeze it", False
    try:
        rate, base = float(group["lr"]), float(initial_lr(group))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return "the optimizer did not apply the gradient", "", False
    if rate == 0 and base == 0:
        return "the lr of the group is 0", "set the lr that you want, or freeze the parameter", False
    if step.largest(name) <= _NEGLIGIBLE * max(map(step.largest, step.grads)):
        return "the gradient is only rounding noise, as of a bias before a norm", "", True
    if 0 < rate < base:
        initial = f"initial_lr {short_number(base)}"
        return f"the lr is {short_number(rate)} at this step of the schedule ({initial})", "", True
    dtype = str(step.parameters[name].dtype).removeprefix("torch.")
    small = f"with lr={short_number(rate)}, the update is too small for a weight in {dtype}"
    return (
        f"{small}, or this step only collects gradients",
        "keep the weights in float32, or raise the lr",
        False,
    )


def _check_frozen(step: Step, names: Sequence[str]) -> Iterator[Finding]:
    in_forward = [name for name in names if name in step.written]
    if in_forward:
        yield codes.FROZEN_MOVED.finding(
            in_forward[0],
            f"{_are_frozen(in_forward)}: the forward or backward pass writes to {_them(in_forward)}, before the step "
            "of the optimizer",
            "remove the code that writes to a frozen parameter, or keep the values in a buffer",
            keys=in_forward,
        )
    trained = {address(tensor): name for name, tensor in step.parameters.items() if name not in step.frozen}
    for number, optimizer in enumerate(step.optimizers):
        held = [
            name
            for name in names
            if name not in step.written and step.groups.get(id(step.parameters[name]), (None,))[0] == number
        ]
        if held:
            yield codes.FROZEN_MOVED.finding(
                held[0],
                f"{_are_frozen(held)}: the step of {type(optimizer).__name__} changed {_them(held)}, because its "
                "groups hold frozen parameters, and it steps parameters without a gradient (weight decay, momentum)",
                "remove the frozen parameters from the groups",
                keys=held,
            )
    rest = [name for name in names if name not in step.written and id(step.parameters[name]) not in step.groups]
    for name in rest:
        other = trained.get(address(step.parameters[name]))
        shared = f", which changed {quoted(other)} in the same memory" if other else ""
        yield codes.FROZEN_MOVED.finding(
            name,
            f"{_are_frozen([name])} in the step of the optimizer{shared}",
            ".clone() the parameter that must stay" if other else "no group holds the parameter: look for a step hook",
        )


def _are_frozen(names: Sequence[str]) -> str:
    return f"{listed(names, _SHOWN)} {'is' if len(names) == 1 else 'are'} frozen, but changed"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _is_varied(values: Tensor) -> bool:
    flat = values.detach().reshape(-1)
    return flat.numel() > 1 and bool((flat != flat[0]).any())


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad
