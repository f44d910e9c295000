"""The state of an optimizer as a value: by the names of parameters, with tensors that are not read until asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.text import html_table, kind_of, plural, printable
from ckptkit.core.torch_bridge import Live
from ckptkit.errors import ModelError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMS",
    "Change",
    "LazyTensor",
    "NamedGroup",
    "OptimizerState",
    "Slot",
    "Unknown",
    "held",
    "map_tensors",
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

    def look(self) -> torch.Tensor:
        """Return the tensor to look at, on the CPU: that very one, where it is there; raises as ``Checkpoint.read``."""
        payload = self.payload()
        if isinstance(payload, Live):
            return payload.tensor.detach().resolve_conj().resolve_neg().cpu()
        return self.source.read(self.info.key)

    def read(self) -> torch.Tensor:
        """Return the tensor, in memory of its own, on the CPU; raises as ``Checkpoint.read`` does."""
        tensor = self.look()
        return tensor.contiguous().clone() if isinstance(self.payload(), Live) else tensor


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value that only code could make: it is kept where a file is edited, and nothing else can be done with it."""

    type: str
    place: tuple[object, ...] = ()  # the keys that lead to it in the mapping of its file
    source: Checkpoint | None = field(default=None, repr=False, compare=False)


# A LazyTensor, an Unknown, a number, a text, None, or a list, tuple or dict of such; of a live state any object.
Slot = Any


@dataclass(frozen=True, slots=True)
class NamedGroup:
    """A param group: the FQNs of its parameters in order, and its options as torch calls them (``lr``, ``betas``)."""

    names: tuple[str, ...]
    options: Mapping[str, Slot]


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

    state: Mapping[str, Mapping[str, Slot]]
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


def held(state: Any) -> OptimizerState:
    """Return the state that was given; raises ``ModelError`` for anything that is not by name yet."""
    if not isinstance(state, OptimizerState):
        raise ModelError(
            f"the optimizer state is {kind_of(state)}, not one by name", hint="to_named(state, names) makes one of it"
        )
    return state


def tensors_in(value: Slot) -> Iterator[LazyTensor]:
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


def map_tensors(value: Slot, change: Callable[[LazyTensor], Any]) -> Any:
    """Return the value with every tensor in it replaced by what ``change`` makes of it."""
    if isinstance(value, LazyTensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(inner, change) for inner in value)
    return value
