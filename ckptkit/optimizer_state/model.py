"""The state of an optimizer as a value: keyed by parameter names, with tensors that are read only on demand."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from ckptkit.core.checkpoint import Checkpoint, KeyPath, Payload, TensorInfo, memory_order
from ckptkit.core.files.payloads import same_bytes
from ckptkit.core.findings import Finding
from ckptkit.core.result import Result
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import kind_of, plural
from ckptkit.core.torch_bridge import TensorPayload
from ckptkit.core.torch_optim import SCHEMAS, is_equal
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import ModelError

__all__ = [
    "ELEMENTWISE",
    "FORMS",
    "NO_MORE",
    "Change",
    "DtypeValue",
    "LazyTensor",
    "MoreValues",
    "NamedGroup",
    "OpaqueValue",
    "OptimizerState",
    "SlotKind",
    "SlotValue",
    "is_less",
    "keeps_less",
    "map_tensors",
    "number_of",
    "parameter_shape",
    "require_named",
    "same_value",
    "slot_kind",
    "tensors_in",
]


# The forms of a state in a file: keyed by position, by position with param_names, by name, or by flattened keys.
FORMS = ("indexed", "param-names", "named", "flattened")


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor of a state that is not read yet: its description, and the Checkpoint that has its bytes."""

    info: TensorInfo
    source: Checkpoint = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, in elements."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """The dtype as a safetensors code, such as ``F32``."""
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        """The size of all elements, in bytes."""
        return self.info.nbytes

    def payload(self) -> Payload:
        """Return the bytes of the elements, without reading them."""
        return self.source.payload(self.info.key)

    def span(self) -> Payload | None:
        """Return the stored bytes from the first to the last element, or None if they are not stored as one run."""
        return self.source.span(self.info.key)

    def read_shared(self) -> Tensor:
        """Return the tensor on the CPU, without a copy if it is a live tensor; raises what ``Checkpoint.read`` does."""
        payload = self.payload()
        if isinstance(payload, TensorPayload):
            return payload.tensor.detach().resolve_conj().resolve_neg().cpu()
        return self.source.read(self.info.key)

    def read(self) -> Tensor:
        """Return the tensor on the CPU, in memory of its own, with the saved strides unless these leave gaps.

        Raises what ``Checkpoint.read`` does.
        """
        tensor = self.read_shared()
        if isinstance(self.payload(), TensorPayload):
            return tensor.clone()
        view = self.info.view
        is_as_read = view is None or tuple(tensor.shape) != self.shape or view.stride == tuple(tensor.stride())
        if view is None or is_as_read or memory_order(self.shape, view.stride) is None:
            return tensor
        return tensor.new_empty_strided(tensor.shape, view.stride).copy_(tensor)


@dataclass(frozen=True, slots=True)
class OpaqueValue:
    """A value that only running code can rebuild: it is copied when its file is edited, and cannot be read.

    ``type`` is the name of its class, and ``place`` the path to it in ``source``.
    """

    type: str
    place: KeyPath = ()
    source: Checkpoint | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class DtypeValue(OpaqueValue):
    """A dtype of torch in a file, by its safetensors code."""

    code: str = ""


# A LazyTensor, an OpaqueValue, a number, a string, None, or a list, tuple or dict of these. A live state can have more.
SlotValue = object


@dataclass(frozen=True, slots=True)
class MoreValues:
    """The values in a ``state_dict()`` that are of no parameter.

    - ``keys`` are those beside ``state`` and ``param_groups``, which hooks and classes of other packages add.
    - ``state`` are those in ``state`` under a string that is not the name of a parameter, as for a step count of all.
    """

    keys: Mapping[str, SlotValue] = field(default_factory=dict)
    state: Mapping[str, SlotValue] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The keys of all values."""
        return [*self.keys, *self.state]

    def __bool__(self) -> bool:
        """Return whether there is any value."""
        return bool(self.keys or self.state)


NO_MORE = MoreValues()


@dataclass(frozen=True, slots=True)
class NamedGroup:
    """A param group: the FQNs of its parameters in order, and its options under torch's names (``lr``, ``betas``)."""

    names: tuple[str, ...]
    options: Mapping[str, SlotValue]


@dataclass(frozen=True, slots=True)
class Change:
    """What an edit did to a parameter: ``operation`` made it from ``sources``.

    - ``copy``: the state is unchanged.
    - ``dropped``: the parameter was removed.
    - ``reset``: the parameter is left, but its state was removed.
    - ``new``: the parameter was added and has no state.

    Any other operation moved elements of the state. ``reason`` names the rule, or tells why state was removed.
    """

    name: str
    sources: tuple[str, ...]
    operation: str
    reason: str = ""

    @property
    def moves_elements(self) -> bool:
        """Whether the operation split, joined, padded or rearranged the state."""
        return self.operation not in {"copy", "dropped", "new", "reset"}


@dataclass(frozen=True, repr=False)
class OptimizerState(Result):
    """The content of ``optimizer.state_dict()`` by FQN: the slots of each parameter (``exp_avg``) and the groups.

    - ``state`` has no entry for a parameter without state, such as a frozen one; ``groups`` has every parameter.
    - ``form`` is the form in which the state was found, one of ``FORMS``.
    - ``evidence`` tells how the names were found, if the state did not contain them.
    - ``remarks`` are further messages about the state.
    - ``changes`` has one entry for each parameter that the last edit handled.
    - ``more`` has the values that are of no parameter. Edits keep them.
    - ``checkpoint`` tells where the state was read; its path is empty for a live state.
    - ``findings`` are the remarks about the keys of the state, as it was found.

    Example:
        >>> from ckptkit.optimizer_state import to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> state.names, state.groups[0].options["lr"]
        (('weight', 'bias'), 0.1)
    """

    state: Mapping[str, Mapping[str, SlotValue]]
    groups: tuple[NamedGroup, ...]
    form: str = "named"
    evidence: str = ""
    remarks: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    more: MoreValues = NO_MORE
    checkpoint: CheckpointSummary = NO_CHECKPOINT
    findings: tuple[Finding, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The FQNs of all parameters in the order of the groups, which is the order of torch's positions."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of all slots, in the order of their first use."""
        return tuple(dict.fromkeys(slot for slots in self.state.values() for slot in slots))

    @property
    def nbytes(self) -> int:
        """The size of all tensors in the state, in bytes."""
        return sum(tensor.nbytes for slots in self.state.values() for tensor in tensors_in(slots))

    def slot(self, name: str) -> Mapping[str, LazyTensor]:
        """Return the tensors of the slot ``name``, by the names of the parameters that have it.

        Example:
            >>> from ckptkit.optimizer_state import to_named
            >>> model = torch.nn.Linear(2, 2)
            >>> optimizer = torch.optim.Adam(model.parameters())
            >>> model(torch.ones(2)).sum().backward()
            >>> optimizer.step()
            >>> list(to_named(optimizer.state_dict(), model).slot("exp_avg"))
            ['weight', 'bias']
        """
        values = {fqn: slots.get(name) for fqn, slots in self.state.items()}
        return {fqn: value for fqn, value in values.items() if isinstance(value, LazyTensor)}

    def group_of(self, name: str) -> NamedGroup | None:
        """Return the group of the parameter ``name``, or None if it is in no group.

        Example:
            >>> from ckptkit.optimizer_state import to_named
            >>> model = torch.nn.Linear(2, 2)
            >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
            >>> state.group_of("bias").options["lr"]
            0.1
        """
        return next((group for group in self.groups if name in group.names), None)

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        counts = plural(len(self.names), "parameter"), plural(len(self.groups), "group")
        return f"{counts[0]} in {counts[1]}, {len(self.state):,} with state, {plural(self.nbytes, 'byte')}"


def require_named(state: object) -> OptimizerState:
    """Return ``state``; raise ``ModelError`` if it is not an ``OptimizerState``."""
    if not isinstance(state, OptimizerState):
        raise ModelError(
            f"the optimizer state is {kind_of(state)}, not an OptimizerState",
            hint="make one with to_named(state, names)",
        )
    return state


def tensors_in(value: SlotValue) -> Iterator[LazyTensor]:
    """Yield every tensor in a value, in order."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, LazyTensor):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, list | tuple):
            stack.extend(reversed(item))


def map_tensors(value: SlotValue, change: Callable[[LazyTensor], Any]) -> Any:
    """Return the value with every tensor in it replaced by the result of ``change``."""
    if isinstance(value, LazyTensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(inner, change) for inner in value)
    return value


# Slots with one number for each element of the parameter, computed only from the gradients of that element. These are
# the slots of torch.optim, and of Adan, Lookahead, schedule-free optimizers and Sophia.
ELEMENTWISE: Final = frozenset(
    {slot.name for schema in SCHEMAS.values() for slot in schema.slots if slot.layout == "elementwise"}
    | {"exp_avg_diff", "neg_pre_grad", "slow_buffer", "z", "hessian"}
)
# Slots with sums over rows and columns, and whether these keep dimensions of size 1: Adafactor of torch.optim does, and
# Adafactor of transformers does not.
_FACTORED: Final = (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False))
_FACTORED_NAMES: Final = frozenset(name for row, column, _ in _FACTORED for name in (row, column))
_STRUCT_CODES: Final = {
    "F16": "<e", "F32": "<f", "F64": "<d", "BOOL": "<?", "U8": "<B", "I8": "<b", "I16": "<h", "I32": "<i", "I64": "<q"
}  # fmt: skip
K = TypeVar("K")
SlotKind = Literal["elementwise", "scalar", "factored", "other"]


def slot_kind(name: str, value: SlotValue, elementwise: Collection[str] = ()) -> SlotKind:
    """Return the kind of a slot, from its name and its value; ``elementwise`` has more names of elementwise slots."""
    if name in _FACTORED_NAMES:
        return "factored"
    if not isinstance(value, LazyTensor):
        return "scalar" if value is None or isinstance(value, bool | int | float | complex | str) else "other"
    if name in ELEMENTWISE or name in elementwise:
        return "elementwise"
    return "other" if value.shape else "scalar"


def parameter_shape(slots: Mapping[str, SlotValue], elementwise: Collection[str] = ()) -> tuple[int, ...] | None:
    """Return the shape of the parameter that has these slots, or None if they do not tell it or contradict it."""
    shapes = {
        value.shape
        for name, value in slots.items()
        if isinstance(value, LazyTensor) and slot_kind(name, value, elementwise) == "elementwise"
        if value.shape and value.info.elements  # some optimizers keep one number here, or nothing
    }
    for row, column, keeps_dims in _FACTORED:
        rows, columns = slots.get(row), slots.get(column)
        if isinstance(rows, LazyTensor) and isinstance(columns, LazyTensor):
            shapes.add((*rows.shape[: -1 if keeps_dims else None], *columns.shape[-1:]))
    return shapes.pop() if len(shapes) == 1 else None


def keeps_less(shapes: Mapping[K, tuple[int, ...]], state: Mapping[K, Mapping[str, SlotValue]]) -> bool:
    """Return whether most matrices of a state have one number for several elements, as sums of rows do.

    ``shapes`` has the shapes of the parameters.
    """
    pairs = [(parameter_shape(slots), shapes[key]) for key, slots in state.items() if len(shapes.get(key, ())) > 1]
    known = [(shape, whole) for shape, whole in pairs if shape is not None]
    return 2 * sum(shape != whole and is_less(shape, whole) for shape, whole in known) > len(known)


def is_less(shape: tuple[int, ...] | None, parameter: tuple[int, ...]) -> bool:
    """Return whether a state of this shape has one number for several elements of the parameter."""
    if shape is None or len(shape) != len(parameter):
        return False
    return all(size in (1, whole) for size, whole in zip(shape, parameter, strict=True))


def number_of(value: Any) -> float | int | None:
    """Return ``value`` if it is a number, or the number in a tensor of one element, without torch; None otherwise."""
    if isinstance(value, int | float):
        return value
    number: float | int | None
    if hasattr(value, "numel"):  # a live tensor
        number = value.item() if value.numel() == 1 and not value.is_meta else None
        return number
    if not isinstance(value, LazyTensor) or value.info.elements != 1 or value.info.kind != "dense":
        return None
    data = value.source.read_bytes(value.info.key)
    if value.dtype == "BF16":
        data = b"\0\0" + data  # as F32
    code = _STRUCT_CODES.get("F32" if value.dtype == "BF16" else value.dtype)
    number = None if code is None else struct.unpack(code, data)[0]
    return number


def same_value(left: SlotValue, right: SlotValue) -> bool:
    """Return whether two values are equal: tensors are compared by their bytes, other values with their types."""
    if isinstance(left, LazyTensor) and isinstance(right, LazyTensor):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and same_bytes(left.payload(), right.payload())
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same_value(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same_value, left, right))
    return type(left) is type(right) and is_equal(left, right)
