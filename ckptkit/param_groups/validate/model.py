"""Check the model itself: tied, shared and overlapping parameters, and parameters that no module registered."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted, short_number
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroup, Member
from ckptkit.param_groups.parameters import LiveModel, LiveParameter, address, bare_name, flat_names
from ckptkit.param_groups.validate.options import read_number

__all__ = [
    "UnregisteredTensors",
    "check_empty",
    "check_memory",
    "check_meta",
    "check_tied",
    "find_unregistered",
    "unregistered_finding",
]


_MAX_NAMES = 3


def check_empty(live_model: LiveModel) -> Iterator[Finding]:
    """Yield a note if the model has modules but no parameter."""
    if not live_model.parameters:
        kinds = sorted({type(module).__name__ for module in live_model.modules.values() if not list(module.children())})
        yield codes.NO_PARAMETERS.finding(
            "",
            f"the {type(live_model.model).__name__} has {plural(len(live_model.modules), 'module')} but no parameter "
            f"({_joined(kinds)}): quantised modules keep packed weights, which no optimizer can train",
            "train the model before you quantise it, or add an adapter that trains",
        )


def check_meta(live_model: LiveModel, members: Sequence[Member]) -> Iterator[Finding]:
    """Yield a finding for each group of an optimizer that holds parameters on the meta device.

    Groups without an optimizer are not checked, because the model can get memory before the optimizer is built.
    """
    by_group: dict[LiveGroup, list[str]] = {}
    for member in members:
        if member.tensor.is_meta and member.group.optimizer is not None:
            live = live_model.parameters.get(id(member.tensor))
            if live is not None:
                by_group.setdefault(member.group, []).append(live.name)
    for group, names in by_group.items():
        yield codes.META.finding(
            names[0],
            f"{group.where} holds {plural(len(names), 'parameter')} on the meta device ({_joined(names)}): they have "
            "no values, a step changes nothing, and to_empty() or load_state_dict(assign=True) will replace them",
            "give the model memory first, then build the optimizer",
            keys=names,
        )


def check_tied(live_model: LiveModel, members_by_id: Mapping[int, Member]) -> Iterator[Finding]:
    """Yield a note for each module registered twice, and for each tied parameter if groups have different lrs."""
    tied = [live for live in live_model.parameters.values() if live.aliases]
    if not tied:
        return
    yield from _check_shared_modules(live_model, tied)
    groups = {id(member.group): member.group for member in members_by_id.values()}.values()
    if len({_lr(group) for group in groups} - {None}) < 2:
        return
    for live in tied:
        member = members_by_id.get(id(live.tensor))
        if member is None or (lr := _lr(member.group)) is None:
            continue
        if all(_module_id(live_model, name) == _module_id(live_model, live.name) for name in live.aliases):
            continue
        yield codes.TIED.finding(
            live.name,
            f"{_joined([live.name, *live.aliases])} are one tied parameter {live.shape}: it trains in "
            f"{member.group.where} with lr={short_number(lr)} under each of its names, but other groups have "
            "another lr",
            "check that this lr is right for all of these names",
            severity="note",
        )


def _check_shared_modules(live_model: LiveModel, tied: Sequence[LiveParameter]) -> Iterator[Finding]:
    names_of: dict[int, list[str]] = {}
    for name, module in live_model.modules.items():
        names_of.setdefault(id(module), []).append(name)
    shared = [names for names in names_of.values() if len(names) > 1]
    shared_names = {name for names in shared for name in names}
    for first, *others in shared:
        inside = [live for live in tied if f"{bare_name(live.name)}.".startswith(f"{first}.")]
        if inside and first.rpartition(".")[0] not in shared_names:
            parameters = f"{plural(len(inside), 'parameter')} ({_joined([live.name for live in inside])})"
            verb = "is" if len(others) == 1 else "are"
            train = "trains" if len(inside) == 1 else "train"
            yield codes.SHARED_MODULE.finding(
                others[0],
                f"{_joined(others)} {verb} the same module as {quoted(first)}, so its {parameters} {train} once",
                "copy.deepcopy() one of the modules if they must not share parameters",
                keys=others,
            )


def _module_id(live_model: LiveModel, name: str) -> int:
    return id(live_model.modules.get(bare_name(name).rpartition(".")[0]))


def _lr(group: LiveGroup) -> float | None:
    return read_number(group.options.get("lr"))


def check_memory(live_model: LiveModel, members_by_id: Mapping[int, Member]) -> Iterator[Finding]:
    """Yield a finding for each two parameters that overlap in memory, if at least one of them trains."""
    by_address = sorted(((address(live.tensor), live) for live in live_model.parameters.values()), key=_address)
    end, previous = 0, None
    for start, live in by_address:
        stop = start + _byte_span(live.tensor) if start else 0
        if previous is not None and start < end and _overlap(previous, live):
            yield _overlapping(previous, live, members_by_id)
        if stop > end:
            end, previous = stop, live


def _address(pair: tuple[int, object]) -> int:
    return pair[0]


def _byte_span(tensor: Tensor) -> int:
    """Return the number of bytes from the first element of ``tensor`` to the end of the last element."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _overlap(first: LiveParameter, second: LiveParameter) -> bool:
    """Return whether two parameters share an element and at least one trains; columns of a matrix share no element."""
    left, right = first.tensor, second.tensor
    if not (first.trainable or second.trainable) or left.device != right.device:
        return False
    size = left.element_size()
    base = min(left.data_ptr(), right.data_ptr())
    offsets = [tensor.data_ptr() - base for tensor in (left, right)]
    are_contiguous = left.is_contiguous() and right.is_contiguous()
    if are_contiguous or size != right.element_size() or any(offset % size for offset in offsets):
        return True
    import torch

    # One flag for each element of the memory that both tensors span: set by the left tensor, read by the right tensor.
    span = max(offset + _byte_span(tensor) for offset, tensor in zip(offsets, (left, right), strict=True))
    flags = torch.zeros(span // size, dtype=torch.bool, device="cpu")
    flags.as_strided(left.shape, left.stride(), offsets[0] // size).fill_(True)
    return bool(flags.as_strided(right.shape, right.stride(), offsets[1] // size).any())


def _overlapping(first: LiveParameter, second: LiveParameter, members_by_id: Mapping[int, Member]) -> Finding:
    def label(live: LiveParameter) -> str:
        member = members_by_id.get(id(live.tensor))
        return f"{quoted(live.name)} {live.shape} in " + (member.where if member is not None else "no group")

    is_same = first.shape == second.shape and address(first.tensor) == address(second.tensor)
    relation = "are two parameters with the same memory" if is_same else "overlap in memory"
    return codes.SHARED_MEMORY.finding(
        second.name,
        f"{label(first)} and {label(second)} {relation}: a step that changes one changes the other too",
        "tie the parameters (b.weight = a.weight), or .clone() one of them",
    )


def _joined(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    shown = [quoted(name) for name in names[:_MAX_NAMES]] + ([f"{more:,} more"] if more > 0 else [])
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1]))) if shown else ""


_MAX_DEPTH = 4
_MAX_OPERATIONS = 8  # as in nn.Parameter(x).to(device) * 0.02
_MAX_ITEMS = 10_000  # a module can keep a whole data set in a list
_PLAIN_TYPES = frozenset({bool, int, float, str, bytes, type(None)})
_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset, deque)


@dataclass(frozen=True, slots=True, eq=False)
class UnregisteredTensors:
    """Trainable tensors that a module holds and did not register, with their names inside of ``path``.

    ``container`` is the type that holds them (``list``, ``dict``), or empty for a plain attribute. ``kind`` is the
    class of the module that has them as parameters, or empty for a plain tensor.
    """

    path: str
    container: str
    kind: str
    tensors: tuple[tuple[str, Tensor], ...]


def find_unregistered(live_model: LiveModel) -> list[UnregisteredTensors]:
    """Return the trainable tensors that ``vars()`` of a module has and ``model.parameters()`` does not return.

    A list of registered modules, or a frozen teacher in a list, has no such tensors.
    """
    return list(_Search(live_model).search_modules(live_model.model, ""))


class _Search:
    def __init__(self, live_model: LiveModel) -> None:
        from torch import Tensor
        from torch.nn import Module, Parameter, RNNBase

        self._module, self._tensor, self._rnn, self._parameter = Module, Tensor, RNNBase, Parameter
        self._torch_attributes = frozenset(vars(Module()))
        self._parameters = live_model.parameters
        self._seen: set[int] = set()

    def search_modules(self, root: Module, path: str) -> Iterator[UnregisteredTensors]:
        for name, module in root.named_modules():
            attributes = vars(module)
            keys = [key for key in attributes.keys() - self._torch_attributes if self._is_object(attributes[key])]
            if len(keys) > 1:
                keys.sort(key=list(attributes).index)  # the difference of two sets has no order
            for key in keys:
                if key == "_flat_weights" and isinstance(module, self._rnn):
                    continue  # torch keeps this copy of the weights, and updates it in the next forward pass
                key_path = ".".join(filter(None, (path, name, key)))
                yield from self._search_value(attributes[key], key_path, "", _MAX_DEPTH)

    def _is_object(self, value: object) -> bool:
        return type(value) not in _PLAIN_TYPES

    def _search_value(self, value: Any, path: str, container: str, depth: int) -> Iterator[UnregisteredTensors]:
        if isinstance(value, self._module):
            yield from self._search_module(value, path, container)
        elif isinstance(value, self._tensor):
            if self._is_unregistered(value):
                yield UnregisteredTensors(path, container, "", (("", value),))
        elif depth and id(value) not in self._seen and (items := _items(value)) is not None:
            self._seen.add(id(value))
            for key, item in islice(items, _MAX_ITEMS):
                if self._is_object(item):
                    outermost = container or type(value).__name__
                    yield from self._search_value(item, f"{path}[{key!r}]", outermost, depth - 1)

    def _search_module(self, module: Module, path: str, container: str) -> Iterator[UnregisteredTensors]:
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        found = tuple((name, tensor) for name, tensor in module.named_parameters() if self._is_unregistered(tensor))
        if found:
            yield UnregisteredTensors(path, container, type(module).__name__, found)
            yield from self.search_modules(module, path)

    def _is_unregistered(self, tensor: Tensor) -> bool:
        if not tensor.requires_grad or id(tensor) in self._parameters or flat_names(tensor):
            return False
        return tensor.is_leaf or self._is_of_lost_parameter(tensor)

    def _is_of_lost_parameter(self, tensor: Tensor) -> bool:
        """Return whether few operations computed ``tensor`` from parameters that are not in the model.

        Activations that a module keeps come from parameters of the model, or by many operations.
        """
        stack, leaves, seen = [tensor.grad_fn], [], 0
        while stack:
            node: Any = stack.pop()
            seen += 1
            if node is None:
                continue
            if seen > _MAX_OPERATIONS:
                return False
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            stack += [following for following, _ in node.next_functions]
        return bool(leaves) and all(
            isinstance(leaf, self._parameter) and id(leaf) not in self._parameters for leaf in leaves
        )


def _items(value: Any) -> Iterator[tuple[object, object]] | None:
    """Return the items of a container with their keys or places, and None for any other object.

    No method of a class of the user is called: the irreps of e3nn are tuples that refuse ``len()``.
    """
    kind = next((kind for kind in _CONTAINERS if issubclass(type(value), kind)), None)
    if kind is None:
        return None
    return iter(dict.items(value)) if kind is dict else enumerate(kind.__iter__(value))


def unregistered_finding(part: UnregisteredTensors, held_ids: Collection[int]) -> Finding:
    """Return the finding for unregistered tensors; ``held_ids`` are the ids of all tensors in the groups."""
    count = len(part.tensors)
    in_groups = sum(id(tensor) in held_ids for _, tensor in part.tensors)
    where = f"in a plain {part.container or 'attribute'}"
    if part.kind:
        size = plural(sum(tensor.numel() for _, tensor in part.tensors), "element")
        description = f"({part.kind}, {plural(count, 'trainable parameter')}, {size}) is {where}"
        hint = "register it: nn.ModuleList for a list, nn.ModuleDict for a dict"
    else:
        tensor = part.tensors[0][1]
        shape = tuple(tensor.shape)
        if not tensor.is_leaf:
            return codes.UNREGISTERED.finding(
                part.path,
                f"{quoted(part.path)} {shape} is computed from an nn.Parameter, as by .to() or .cuda(), and is "
                f"{where}, not a parameter: it never trains, and state_dict() does not save it",
                "compute the values first, and make the nn.Parameter last: nn.Parameter(values.to(device))",
            )
        description = f"{shape} is a trainable tensor {where}, not a parameter"
        hint = "make it an nn.Parameter of the module, or put several into an nn.ParameterList or nn.ParameterDict"
    if in_groups == count:
        effect = "it trains, but state_dict() does not save it, and .to() and .half() do not convert it"
    elif in_groups:
        effect = (
            f"{count - in_groups} of its {count} parameters get a gradient and are in no group, and state_dict() saves "
            "none of them"
        )
    else:
        effect = "model.parameters() does not return it, so it gets a gradient but never trains"
    return codes.UNREGISTERED.finding(part.path, f"{quoted(part.path)} {description}: {effect}", hint)
