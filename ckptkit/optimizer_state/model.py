"""The state of an optimizer as a value: by the names of parameters, with tensors that are not read until asked for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.files import same_bytes
from ckptkit.core.text import html_table, kind_of, plural, printable
from ckptkit.core.torch_bridge import TensorPayload
from ckptkit.core.torch_optim import SCHEMAS
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import ModelError

__all__ = [
    "ELEMENTWISE",
    "FORMS",
    "Change",
    "LazyTensor",
    "NamedGroup",
    "OpaqueValue",
    "OptimizerState",
    "SlotKind",
    "SlotValue",
    "map_tensors",
    "number_of",
    "parameter_shape",
    "require_named",
    "same_value",
    "slot_kind",
    "tensors_in",
]


# How files have it: by position, by position with torch's param_names beside, by name, by name without nesting.
FORMS = ("indexed", "param-names", "named", "flattened")


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor of a state: what it is, and the Checkpoint that has its bytes, unread."""

    info: TensorInfo
    source: Checkpoint = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, in elements."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """The dtype as a safetensors code."""
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return self.info.nbytes

    def payload(self) -> Payload:
        """Return the bytes, still unread."""
        return self.source.payload(self.info.key)

    def span(self) -> Payload | None:
        """Return the stored bytes from the first to the last element, or None where they say less."""
        return self.source.span(self.info.key)

    def look(self) -> Tensor:
        """Return the tensor to look at, on the CPU: that very one, where it is there; raises as ``Checkpoint.read``."""
        payload = self.payload()
        if isinstance(payload, TensorPayload):
            return payload.tensor.detach().resolve_conj().resolve_neg().cpu()
        return self.source.read(self.info.key)

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own, on the CPU; raises as ``Checkpoint.read`` does."""
        tensor = self.look()
        return tensor.contiguous().clone() if isinstance(self.payload(), TensorPayload) else tensor


@dataclass(frozen=True, slots=True)
class OpaqueValue:
    """A value that only code could make: it is kept where a file is edited, and nothing else can be done with it."""

    type: str
    place: tuple[object, ...] = ()  # the keys that lead to it in the mapping of its file
    source: Checkpoint | None = field(default=None, repr=False, compare=False)


# A LazyTensor, an Unknown, a number, a text, None, or a list, tuple or dict of such; of a live state any object.
SlotValue = Any


@dataclass(frozen=True, slots=True)
class NamedGroup:
    """A param group: the FQNs of its parameters in order, and its options as torch calls them (``lr``, ``betas``)."""

    names: tuple[str, ...]
    options: Mapping[str, SlotValue]


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a parameter: which ones it was made of, by what (``copy``: nothing changed), and by which rule.

    For one that is ``dropped``, ``reset`` (its state alone is) or ``new`` (there never was any), ``reason`` says why.
    """

    name: str
    sources: tuple[str, ...]
    operation: str
    reason: str = ""


@dataclass(frozen=True)
class OptimizerState:
    """What ``optimizer.state_dict()`` holds, by FQN: the slots of each parameter (``exp_avg``, ``step``), and groups.

    ``form`` is how it was found, one of ``FORMS``; ``evidence`` says where names come from that were not in it, and
    ``remarks`` what else is to be known of it, ``changes`` what the last function that made it did. A parameter without
    state, frozen or never stepped, is in a group only.
    """

    state: Mapping[str, Mapping[str, SlotValue]]
    groups: tuple[NamedGroup, ...]
    form: str = "named"
    evidence: str = ""
    remarks: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The FQNs of all parameters, in the order of the groups: what torch counts through in its own form."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of all slots, in the order in which they are met."""
        return tuple(dict.fromkeys(slot for slots in self.state.values() for slot in slots))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the state."""
        return sum(tensor.nbytes for slots in self.state.values() for tensor in tensors_in(slots))

    def slot(self, name: str) -> Mapping[str, LazyTensor]:
        """Return the tensors of one slot by the names of the parameters that have it."""
        found = {fqn: slots.get(name) for fqn, slots in self.state.items()}
        return {fqn: value for fqn, value in found.items() if isinstance(value, LazyTensor)}

    def group_of(self, name: str) -> NamedGroup | None:
        """Return the group that a parameter is in, or None."""
        return next((group for group in self.groups if name in group.names), None)

    def __str__(self) -> str:
        """Return how many parameters, groups and bytes there are."""
        counts = plural(len(self.names), "parameter"), plural(len(self.groups), "group")
        return f"{counts[0]} in {counts[1]}, {len(self.state):,} with state, {plural(self.nbytes, 'byte')}"

    def _repr_html_(self) -> str:
        rows = [
            (printable(name), str(number), ", ".join(printable(slot) for slot in self.state.get(name, {})))
            for number, group in enumerate(self.groups)
            for name in group.names
        ]
        return html_table(("parameter", "group", "slots"), rows)


def require_named(state: Any) -> OptimizerState:
    """Return the state that was given; raises ``ModelError`` for anything that is not by name yet."""
    if not isinstance(state, OptimizerState):
        raise ModelError(
            f"the optimizer state is {kind_of(state)}, not one by name", hint="to_named(state, names) makes one of it"
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
    """Return the value with every tensor in it replaced by what ``change`` makes of it."""
    if isinstance(value, LazyTensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(inner, change) for inner in value)
    return value


# One number for each element of the parameter, which nothing but that element's gradients went into: of torch.optim,
# and of optimizers that are widely used beside it (Adan, Lookahead, schedule-free ones, Sophia).
ELEMENTWISE: Final = frozenset(
    {slot.name for schema in SCHEMAS.values() for slot in schema.slots if slot.layout == "elementwise"}
    | {"exp_avg_diff", "neg_pre_grad", "slow_buffer", "z", "hessian"}
)
# Sums over rows and columns: torch.optim.Adafactor's, and those of transformers.
_FACTORED: Final = (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False))
_OF_FACTORS: Final = frozenset(name for row, column, _ in _FACTORED for name in (row, column))
_NUMBERS: Final = {
    "F16": "<e", "F32": "<f", "F64": "<d", "BOOL": "<?", "U8": "<B", "I8": "<b", "I16": "<h", "I32": "<i", "I64": "<q"
}  # fmt: skip
SlotKind = Literal["elementwise", "scalar", "factored", "other"]


def slot_kind(name: str, value: SlotValue, elementwise: Collection[str] = ()) -> SlotKind:
    """Return what a slot is, by its name and what is in it; ``elementwise`` are more names of slots that are so."""
    if name in _OF_FACTORS:
        return "factored"
    if not isinstance(value, LazyTensor):
        return "scalar" if value is None or isinstance(value, bool | int | float | complex | str) else "other"
    if name in ELEMENTWISE or name in elementwise:
        return "elementwise"
    return "other" if value.shape else "scalar"


def parameter_shape(slots: Mapping[str, SlotValue], elementwise: Collection[str] = ()) -> tuple[int, ...] | None:
    """Return the shape that a parameter with these slots has, or None where they do not tell it or contradict it."""
    shapes = {
        value.shape for name, value in slots.items() if slot_kind(name, value, elementwise) == "elementwise"
    }  # fmt: skip
    for row, column, kept in _FACTORED:
        rows, columns = slots.get(row), slots.get(column)
        if isinstance(rows, LazyTensor) and isinstance(columns, LazyTensor):
            shapes.add(_of_factors(rows.shape, columns.shape, kept=kept))
    return shapes.pop() if len(shapes) == 1 else None


def _of_factors(rows: tuple[int, ...], columns: tuple[int, ...], *, kept: bool) -> tuple[int, ...]:
    """Return the shape of what was summed over columns and over rows; ``kept`` says that the sums have dims of one."""
    return (*rows[: -1 if kept else None], *columns[-1:])


def number_of(value: SlotValue) -> float | int | None:
    """Return a number, or the one that a tensor of one element holds, read without torch; None for anything else."""
    if isinstance(value, int | float):
        return value
    if hasattr(value, "numel"):  # a live tensor
        alone: float | int | None = value.item() if value.numel() == 1 and not value.is_meta else None
        return alone
    if not isinstance(value, LazyTensor) or value.info.elements != 1 or value.info.kind != "dense":
        return None
    data = value.source.read_bytes(value.info.key)
    if value.dtype == "BF16":
        data = b"\0\0" + data
    form = _NUMBERS.get("F32" if value.dtype == "BF16" else value.dtype)
    number: float | int | None = None if form is None else struct.unpack(form, data)[0]
    return number


def same_value(one: SlotValue, other: SlotValue) -> bool:
    """Return whether two values are equal: tensors where their bytes are, everything else with its type."""
    if isinstance(one, LazyTensor) and isinstance(other, LazyTensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and same_bytes(one.payload(), other.payload())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    return type(one) is type(other) and bool(one == other)
