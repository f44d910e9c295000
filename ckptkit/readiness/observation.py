"""Observe the loss function of a dry step: which parameters it uses, and where their graph ends."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ckptkit.core.torch_types import Module, Parameter, Tensor
from ckptkit.param_groups.parameters import address

__all__ = ["Cause", "Graph", "Node", "Observation", "observed"]

Node = Any  # a node of the autograd graph: torch gives its classes no public name
# How an operation of the loss function used a parameter; a use with a graph wins over the others.
Use = Literal["graph", "checkpoint", "no_grad", "detached"]
# Why a parameter got no gradient: how it was used, or not at all, or its graph reaches the loss ("undefined").
Cause = Literal["unused", "checkpoint", "no_grad", "detached", "cut", "undefined"]
_LOSS = -1
_MAX_DEPTH = 4  # of lists and dicts in the output of a module
_MAX_NODES = 40  # between a parameter that is 0 and the product that it makes 0
_NO_USE = frozenset({"aten.detach.default", "aten.alias.default"})


class Observation:
    """The uses of the parameters of ``model`` in a loss function, and the outputs of its modules in order.

    Create it before the loss function runs, and run the loss function inside of ``observed``.
    """

    def __init__(self, model: Module) -> None:
        self.model = model
        self.parameters: dict[str, Parameter] = dict(model.named_parameters())
        self._by_id = {id(tensor): name for name, tensor in self.parameters.items()}
        self._by_address = {start: name for name, tensor in self.parameters.items() if (start := address(tensor))}
        self.uses: dict[str, set[Use]] = {}
        self.outputs: list[tuple[str, list[Node]]] = []

    def record_operation(self, name: str, arguments: Sequence[object]) -> None:
        """Record the parameters among the arguments of an operation."""
        import torch

        if name in _NO_USE:
            return
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                parameter = self._by_id.get(id(argument))
                use: Use = "graph" if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else "no_grad"
                if parameter is None:
                    parameter = self._by_address.get(address(argument))
                    # A view of a parameter, or a copy of the object, has the memory; only .data has no graph.
                    if parameter is None or argument.requires_grad:
                        continue
                    use = "detached"
                known = self.uses.setdefault(parameter, set())
                if use not in known and not (use == "no_grad" and "checkpoint" in known):
                    known.add("checkpoint" if use == "no_grad" and _is_in_checkpoint() else use)

    def record_output(self, module: str, output: object) -> None:
        """Record the nodes of the graph that the output of a module has."""
        self.outputs.append((module, list(_nodes(output, _MAX_DEPTH))))


@contextlib.contextmanager
def observed(observation: Observation) -> Iterator[None]:
    """Record the operations and the outputs of modules of ``observation`` while the block runs."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import arg_tree_leaves

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        supports_higher_order_operators = True  # as flex_attention

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
            observation.record_operation(str(func), arg_tree_leaves(*args, **(kwargs or {})))
            return func(*args, **(kwargs or {}))

    handles = []
    try:
        for name, module in observation.model.named_modules():
            _make_parameters_unobserved(module)
            with contextlib.suppress(RuntimeError):  # a scripted module may refuse hooks
                handles.append(module.register_forward_hook(_output_hook(observation, name)))
        with Recorder():  # type: ignore[no-untyped-call]
            yield
    finally:
        for handle in handles:
            handle.remove()


def _make_parameters_unobserved(module: Module) -> None:
    """Let a lazy module make its parameters without the recorder: some versions of torch cannot make buffers in it."""
    from torch.nn.modules.lazy import LazyModuleMixin
    from torch.utils._python_dispatch import _disable_current_modes

    if not isinstance(module, LazyModuleMixin):
        return
    make: Any = module.initialize_parameters

    def unobserved(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            make(*args, **kwargs)

    module.initialize_parameters = unobserved  # type: ignore[method-assign]


def _output_hook(observation: Observation, name: str) -> Callable[[Module, object, object], None]:
    def record(_module: Module, _inputs: object, output: object) -> None:
        observation.record_output(name, output)

    return record


def _nodes(value: object, depth: int) -> Iterator[Node]:
    import torch

    if isinstance(value, torch.Tensor):
        if value.grad_fn is not None:
            yield value.grad_fn
    elif depth:
        items: Sequence[object] = ()
        if isinstance(value, Mapping):
            items = list(value.values())
        elif isinstance(value, list | tuple):
            items = value
        elif hasattr(value, "__dataclass_fields__"):
            items = [getattr(value, field, None) for field in value.__dataclass_fields__]
        for item in items:
            yield from _nodes(item, depth - 1)


def _is_in_checkpoint() -> bool:
    """Return whether a caller is the forward pass of a reentrant ``checkpoint``, which runs without a graph."""
    import torch.utils.checkpoint

    code = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    frame = sys._getframe()  # noqa: SLF001 - the only way to see the callers without formatting a traceback
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code is code:
            return True
    return False


class Graph:
    """The graph of a loss and of the outputs of modules, as it was before the backward pass.

    ``last_output`` has, for each parameter in the graph, the index of the last output that depends on it, or -1 if the
    loss does.
    """

    def __init__(self, loss: Tensor, observation: Observation) -> None:
        self.loss = loss
        self.observation = observation
        names = {id(tensor): name for name, tensor in observation.parameters.items()}
        self.last_output: dict[str, int] = {}
        seen: set[Node] = set()
        last = len(observation.outputs)
        starts = [(_LOSS, list(_nodes(loss, 1)))]
        starts += [(last - 1 - back, nodes) for back, (_, nodes) in enumerate(reversed(observation.outputs))]
        for index, nodes in starts:
            stack = list(nodes)
            while stack:
                node = stack.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                variable = getattr(node, "variable", None)
                if variable is not None and (name := names.get(id(variable))) is not None:
                    self.last_output.setdefault(name, index)
                stack += [following for following, _ in node.next_functions]

    def cause(self, name: str) -> tuple[Cause, str]:
        """Return why a parameter got no gradient, and the last module with an output that depends on it.

        The module is empty where there is none; for the model itself, it is ``"the model"``.
        """
        uses = self.observation.uses.get(name, set())
        index = self.last_output.get(name)
        if index == _LOSS:
            return "undefined", ""
        if index is not None:
            module = self.observation.outputs[index][0]
            return "cut", repr(module) if module else "the model"
        if not uses:
            return "unused", ""
        for use in ("checkpoint", "no_grad", "detached"):
            if uses == {use} or ("graph" not in uses and use in uses):
                return use, ""
        return "cut", ""

    def names_behind_zeros(self, zeros: set[str]) -> frozenset[str]:
        """Return the parameters that have no gradient but 0 while one of ``zeros``, which are all zero, is a factor.

        Such are A in B @ A of an adapter, and a residual branch with the scale 0 at its end.
        """
        names = {id(tensor): name for name, tensor in self.observation.parameters.items()}
        is_zero: dict[Node, bool] = {}
        reached: set[str] = set()
        seen: set[Node] = set()
        stack = list(_nodes(self.loss, 1))
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and (name := names.get(id(variable))) is not None:
                reached.add(name)
            following = [inner for inner, _ in node.next_functions]
            factors = _factors(node, len(following))
            for index, inner in enumerate(following):
                others = [following[other] for other in factors if other != index] if index in factors else []
                if not any(_has_zero_output(other, zeros, names, is_zero) for other in others):
                    stack.append(inner)
        return frozenset(name for name, index in self.last_output.items() if index == _LOSS and name not in reached)


# The positions of the factors among the inputs of an operation; the others are added to the product.
_FACTORS: Mapping[str, tuple[int, ...]] = {
    "MulBackward": (0, 1),
    "MmBackward": (0, 1),
    "BmmBackward": (0, 1),
    "MvBackward": (0, 1),
    "DotBackward": (0, 1),
    "LinearBackward": (0, 1),
    "AddmmBackward": (1, 2),
    "BaddbmmBackward": (1, 2),
    "AddbmmBackward": (1, 2),
    "AddmvBackward": (1, 2),
    "AddcmulBackward": (1, 2),
    "ConvolutionBackward": (0, 1),
    "NativeBatchNormBackward": (0, 1),
    "CudnnBatchNormBackward": (0, 1),
    "NativeLayerNormBackward": (0, 1),
    "NativeGroupNormBackward": (0, 1),
    "FusedRmsNormBackward": (0, 1),
}
_SUMS = frozenset({"AddBackward", "SubBackward", "CatBackward", "StackBackward"})
# Operations on one tensor that keep zeros at zero.
_KEEP_ZERO = re.compile(
    r"(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Reshape|Expand|Squeeze|Unsqueeze|Alias|Clone|ToCopy|Slice|Select"
    r"|Split|SplitWithSizes|Unbind|AsStrided|Neg|Mul|Div|Sum|Mean|Tanh|Relu|Gelu|Silu|NativeDropout|Repeat|Unfold|Index"
    r"|Flip|Mv|Mm|Bmm|Embedding)Backward"
)


def _operation(node: Node) -> str:
    return str(node.name()).rpartition("::")[2].rstrip("0123456789")


def _factors(node: Node, count: int) -> tuple[int, ...]:
    return tuple(index for index in _FACTORS.get(_operation(node), ()) if index < count)


def _has_zero_output(
    node: Node, zeros: set[str], names: Mapping[int, str], known: dict[Node, bool], depth: int = _MAX_NODES
) -> bool:
    """Return whether the value that a node of the graph computed is 0 because the parameters ``zeros`` are 0."""
    if node is None or not depth:
        return False
    if node in known:
        return known[node]
    known[node] = False
    variable = getattr(node, "variable", None)
    if variable is not None:
        found = names.get(id(variable)) in zeros
    else:
        following = [inner for inner, _ in node.next_functions]
        given = [inner for inner in following if inner is not None]
        factors = _factors(node, len(following))
        operation = _operation(node)

        def is_zero(inner: Node) -> bool:
            return _has_zero_output(inner, zeros, names, known, depth - 1)

        if len(given) == 1 and _KEEP_ZERO.fullmatch(operation):
            found = is_zero(given[0])
        elif factors:
            added = [inner for index, inner in enumerate(following) if index not in factors and inner is not None]
            found = any(is_zero(following[index]) for index in factors) and all(map(is_zero, added))
        else:
            # A tensor without a graph, as a constant, has no node: its value is unknown.
            found = operation in _SUMS and len(given) == len(following) and all(map(is_zero, given))
    known[node] = found
    return found
