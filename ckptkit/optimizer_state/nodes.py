"""A state as the parts of a pickle: what a file had stays the very same part, everything else is made anew."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.formats.pickle.edit import items_of, name_of, part_at, parts_in, set_items, take_part, text_part
from ckptkit.formats.pickle.nodes import Event, Node, Part, read_nodes, walk
from ckptkit.formats.torch.torch_pickle import pickle_state_dict
from ckptkit.formats.torch.write import arrange, refuse_unwritable
from ckptkit.optimizer_state.model import LazyTensor, Slot, Unknown, tensors_in
from ckptkit.optimizer_state.slots import same_value

__all__ = ["Builder", "Origin", "replace_state"]

Path = tuple[object, ...]


class Origin:
    """The pickle of a file that is edited, and where in it the state was."""

    def __init__(self, source: Checkpoint, root: Part, path: Path) -> None:
        """Find the mapping; raises ``PlanError`` where it is written in a way that is not known."""
        self.source, self.root = source, root
        self._known: dict[Path, dict[object, Part]] = {}  # of each place that was asked for, what is inside
        self.mapping = root
        for key in path:
            self.mapping = part_at(self.mapping, key)

    def at(self, place: Path) -> Part:
        """Return the part at a place in the mapping."""
        if not place:
            return self.mapping
        above, key = place[:-1], place[-1]
        if above not in self._known:
            self._known[above] = parts_in(self.at(above))
        return take_part(self._known[above], key)


@dataclass(slots=True)
class Builder:
    """Makes parts of values; tensors that the file of ``origin`` does not have become ``records``."""

    origin: Origin | None = None
    records: list[Payload] = field(default_factory=list)
    fresh: set[int] = field(default_factory=set)  # ids of the nodes whose storages are records
    _tensors: dict[object, Part] = field(default_factory=dict)
    _options: list[tuple[str, Slot, Path]] = field(default_factory=list)

    def know_options(self, groups: Sequence[Mapping[str, Slot]]) -> None:
        """Remember what the groups of the file have, so that a value that stays is written as it was."""
        for number, options in enumerate(groups):
            self._options += [(key, value, ("param_groups", number, key)) for key, value in options.items()]

    def take(self, value: Slot) -> None:
        """Lay out every tensor in a value that is to be written anew."""
        new = {self._key(tensor): tensor for tensor in tensors_in(value) if not self._stays(tensor)}
        infos = []
        for number, tensor in enumerate(new.values()):
            if tensor.info.kind != "dense":
                raise PlanError(f"{quoted(tensor.info.key)} cannot be copied: it is a {tensor.info.kind} tensor")
            infos.append(replace(tensor.info, key=str(number), view=None))
        refuse_unwritable(infos)
        by_number = list(new.values())

        def payload(info: TensorInfo) -> Payload:
            return by_number[int(info.key)].payload()

        self.records, stored = arrange(infos, payload, payload)
        root, _ = read_nodes(pickle_state_dict(stored, {}))
        parts = [part for _, part in items_of(root)]
        self.fresh = {id(node) for part in parts for node in _storages(part)}
        self._tensors = dict(zip(new, parts, strict=True))

    def part(self, value: Slot) -> Part:
        """Return the part of a value; raises ``PlanError`` for one that cannot be written."""
        if isinstance(value, LazyTensor):
            return self._tensor(value)
        if isinstance(value, Unknown):
            if self.origin is None or value.source is not self.origin.source:
                raise PlanError(
                    f"a value of {quoted(value.type)}, which only code could make, can be kept in its file alone"
                )
            return self.origin.at(value.place)
        if isinstance(value, Mapping):
            return _mapping({self.part(key): self.part(inner) for key, inner in value.items()})
        if isinstance(value, list):
            return _list([self.part(inner) for inner in value])
        if isinstance(value, tuple):
            return Node(b"t", tuple(map(self.part, value))) if value else b")"
        return _atom(value)

    def groups(self, tables: Sequence[Mapping[str, Slot]]) -> Part:
        """Return the part of the param groups, each option that the file has alike as it is there."""
        made = [
            _mapping({text_part(key): self._option(key, value) for key, value in table.items()}) for table in tables
        ]
        return _list(made)

    def _option(self, key: str, value: Slot) -> Part:
        if self.origin is not None and not isinstance(value, LazyTensor) and key not in ("params", "param_names"):
            for name, known, place in self._options:
                if name == key and same_value(known, value):
                    return self.origin.at(place)
        return self.part(value)

    def _stays(self, tensor: LazyTensor) -> bool:
        origin = self.origin
        if origin is None or tensor.source is not origin.source or origin.source.nest is None:
            return False
        return tensor.info.key in origin.source.nest.places

    def _key(self, tensor: LazyTensor) -> object:
        info = tensor.info
        view = info.view if tensor.span() is not None else None  # without one, equal views may differ in value
        return id(tensor.source), view or info.key, info.shape, info.dtype

    def _tensor(self, tensor: LazyTensor) -> Part:
        if not self._stays(tensor):
            return self._tensors[self._key(tensor)]
        assert self.origin is not None and self.origin.source.nest is not None  # noqa: S101, PT018 - it stays there
        return self.origin.at(self.origin.source.nest.places[tensor.info.key])


def replace_state(mapping: Part, made: Mapping[str, Part], old: frozenset[object]) -> None:
    """Put the parts of a state into the mapping of a file in place of the ``old`` keys; what else is in it stays."""
    pairs = [pair for pair in items_of(mapping) if name_of(pair[0]) not in old]
    assert isinstance(mapping, Node)  # noqa: S101 - items_of refuses anything else
    set_items(mapping, [*((text_part(key), part) for key, part in made.items()), *pairs])


def _mapping(items: Mapping[Part, Part]) -> Part:
    made = Node(b"}")
    if items:
        made.happen(Event(b"u", tuple(part for pair in items.items() for part in pair)))
    return made


def _list(items: Sequence[Part]) -> Part:
    made = Node(b"]")
    if items:
        made.happen(Event(b"e", tuple(items)))
    return made


def _storages(part: Part) -> list[Node]:
    return [node for node in walk(part) if node.op == b"Q"]


def _atom(value: Slot) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(raw) < 256:
            return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return text_part(value)
    raise PlanError(f"a value of {quoted(type(value).__name__)} cannot be written: {quoted(str(value)[:80])}")
