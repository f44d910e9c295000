"""The state of an optimizer into a file of torch: as an edit of the file that it came from, or alone."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from ckptkit.core.checkpoint import Checkpoint, KeyPath, Payload, TensorInfo
from ckptkit.core.progress import Progress
from ckptkit.core.text import quoted
from ckptkit.errors import CkptkitError, OutputError, PlanError
from ckptkit.formats import errors_about, open_inside
from ckptkit.formats.atomic import AtomicFile, prepare_target
from ckptkit.formats.pickle.edit import (
    WAY_OUT,
    items_of,
    name_of,
    number_storages,
    part_at,
    parts_in,
    set_items,
    take_part,
    text_part,
)
from ckptkit.formats.pickle.nodes import Change, Node, Part, iterate_nodes, read_nodes, write_nodes
from ckptkit.formats.torch.tree import bracketed_key
from ckptkit.formats.torch.write import (
    TorchZipLayout,
    assign_records,
    layout_torch_archive,
    pickle_state_dict,
    refuse_unwritable,
    write_torch_zip,
)
from ckptkit.optimizer_state.forms import FoundState, read_form, read_state, to_form
from ckptkit.optimizer_state.model import LazyTensor, OpaqueValue, OptimizerState, SlotValue, same_value, tensors_in
from ckptkit.plans.edit_torch import refuse_unknown
from ckptkit.plans.execute import Written, refuse_replacing_inputs
from ckptkit.plans.output import Output
from ckptkit.wrappers.envelopes import OPTIMIZER, Selection

__all__ = ["Builder", "Origin", "replace_state", "write_optimizer_state"]


class Origin:
    """The pickle of a file that is edited, and where in it the state was."""

    def __init__(self, source: Checkpoint, root: Part, path: KeyPath) -> None:
        """Find the mapping; raises ``PlanError`` where it is written in a way that is not known."""
        self.source, self.root = source, root
        self._known: dict[KeyPath, dict[object, Part]] = {}  # of each place that was asked for, what is inside
        self.mapping = root
        for key in path:
            self.mapping = part_at(self.mapping, key)

    def at(self, place: KeyPath) -> Part:
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
    _options: list[tuple[str, SlotValue, KeyPath]] = field(default_factory=list)

    def know_options(self, groups: Sequence[Mapping[str, SlotValue]]) -> None:
        """Remember what the groups of the file have, so that a value that stays is written as it was."""
        for number, options in enumerate(groups):
            self._options += [(key, value, ("param_groups", number, key)) for key, value in options.items()]

    def take(self, value: SlotValue) -> None:
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

        self.records, stored = assign_records(infos, payload, payload)
        root, _ = read_nodes(pickle_state_dict(stored, {}))
        parts = [part for _, part in items_of(root)]
        self.fresh = {id(node) for part in parts for node in _storages(part)}
        self._tensors = dict(zip(new, parts, strict=True))

    def part(self, value: SlotValue) -> Part:
        """Return the part of a value; raises ``PlanError`` for one that cannot be written."""
        if isinstance(value, LazyTensor):
            return self._tensor(value)
        if isinstance(value, OpaqueValue):
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

    def groups(self, tables: Sequence[Mapping[str, SlotValue]]) -> Part:
        """Return the part of the param groups, each option that the file has alike as it is there."""
        made = [
            _mapping({text_part(key): self._option(key, value) for key, value in table.items()}) for table in tables
        ]
        return _list(made)

    def _option(self, key: str, value: SlotValue) -> Part:
        if self.origin is not None and not isinstance(value, LazyTensor) and key not in ("params", "param_names"):
            for name, known, place in self._options:
                if name == key and same_value(known, value):
                    return self.origin.at(place)
        return self.part(value)

    def _stays(self, tensor: LazyTensor) -> bool:
        origin = self.origin
        if origin is None or tensor.source is not origin.source or origin.source.nested is None:
            return False
        return tensor.info.key in origin.source.nested.paths

    def _key(self, tensor: LazyTensor) -> object:
        info = tensor.info
        view = info.view if tensor.span() is not None else None  # without one, equal views may differ in value
        return id(tensor.source), view or info.key, info.shape, info.dtype

    def _tensor(self, tensor: LazyTensor) -> Part:
        if not self._stays(tensor):
            return self._tensors[self._key(tensor)]
        assert self.origin is not None and self.origin.source.nested is not None  # noqa: S101, PT018 - it stays there
        return self.origin.at(self.origin.source.nested.paths[tensor.info.key])


def replace_state(mapping: Part, made: Mapping[str, Part], old: frozenset[object]) -> None:
    """Put the parts of a state into the mapping of a file in place of the ``old`` keys; what else is in it stays."""
    pairs = [pair for pair in items_of(mapping) if name_of(pair[0]) not in old]
    assert isinstance(mapping, Node)  # noqa: S101 - items_of refuses anything else
    set_items(mapping, [*((text_part(key), part) for key, part in made.items()), *pairs])


def _mapping(items: Mapping[Part, Part]) -> Part:
    made = Node(b"}")
    if items:
        made.add_change(Change(b"u", tuple(part for pair in items.items() for part in pair)))
    return made


def _list(items: Sequence[Part]) -> Part:
    made = Node(b"]")
    if items:
        made.add_change(Change(b"e", tuple(items)))
    return made


def _storages(part: Part) -> list[Node]:
    return [node for node in iterate_nodes(part) if node.op == b"Q"]


def _atom(value: SlotValue) -> bytes:
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


_MOST_PARTS = 1000
_PARTS_PER_BYTE = 4
_ALONE = "--only-tensors writes the state of the optimizer alone"


def write_optimizer_state(
    state: OptimizerState,
    output: Output,
    source: Checkpoint | None = None,
    *,
    form: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Written | None:
    """Write a state to a torch file, whole or not at all, and read back that it is there.

    Where ``source``, the Checkpoint that it was read from, is of a torch file, the output is a copy of that file in
    which the state of the optimizer alone is another, unless ``output.only_tensors``. ``form`` is one of ``FORMS``;
    without it that in which the state was found. With ``dry_run`` all is checked and nothing is written. Raises
    ``PlanError`` for what cannot be written, and ``OutputError`` as ``execute`` does.
    """
    if output.format != "torch" or output.max_shard_size is not None:
        raise OutputError(
            "the state of an optimizer is written to a torch file", hint="a name that ends in .pt", path=output.path
        )
    edited = source is not None and source.container is not None and not output.only_tensors
    value = to_form(state, form or state.form)
    refuse_replacing_inputs(output, _roles(value, source), "source" if edited else "")
    try:
        with nullcontext() if source is None else errors_about(source.path):
            layout, selection = (
                _edit(value, source, output) if edited and source is not None else (_alone(value), OPTIMIZER)
            )
    except PlanError as error:
        error.hint = _ALONE if error.hint == WAY_OUT else error.hint
        raise
    target = prepare_target(output.path, force=output.force)
    if dry_run:
        return None
    report = progress or (lambda _: None)
    with AtomicFile(target, layout.nbytes, replace=output.force) as file:
        for count in write_torch_zip(layout, file):
            report(count)
        for checkpoint in _roles(value, source).values():
            checkpoint.check_unchanged()
        _prove(file.temporary, selection, value, file.target)
    tensors = sum(1 for _ in tensors_in(value))
    envelope = source.envelope if edited and source is not None else ""
    return Written(output.path, "torch", tensors, layout.nbytes, (target,), (), envelope)


def _roles(value: SlotValue, source: Checkpoint | None) -> dict[str, Checkpoint]:
    """Return everything that is read from: the file that is edited as ``source``, others by number."""
    found = {id(tensor.source): tensor.source for tensor in tensors_in(value) if tensor.source is not source}
    roles = {str(number): checkpoint for number, checkpoint in enumerate(found.values())}
    return roles if source is None else {"source": source, **roles}


def _edit(value: Mapping[str, SlotValue], source: Checkpoint, output: Output) -> tuple[TorchZipLayout, Selection]:
    container = source.container
    assert container is not None  # noqa: S101 - the caller asked
    refuse_unknown(container, source.path, keep_unknown=output.keep_unknown)
    if container.unwritable:
        raise PlanError(f"what the file holds beside the state cannot be kept: {container.unwritable}", hint=_ALONE)
    data = container.pickle()
    root, protocol = read_nodes(data)
    origin = Origin(source, root, container.path)
    found = read_state(source)
    builder = Builder(origin)
    builder.take(value)
    flat = found.form == "flattened"
    if not flat:
        builder.know_options([group.options for group in found.groups])
    old = (
        frozenset(map(name_of, dict(items_of(origin.mapping))))
        if flat
        else frozenset[object]({"state", "param_groups"})
    )
    replace_state(origin.mapping, _parts(value, builder), old)
    storages = number_storages(root, builder.fresh)
    records = [builder.records[one] if isinstance(one, int) else container.storage(one) for one in storages]
    most = _PARTS_PER_BYTE * len(data) + _most(value)
    layout = layout_torch_archive(write_nodes(root, protocol, most), records, container.other_records())
    return layout, Selection(bracketed_key(container.path)) if container.path else OPTIMIZER


def _alone(value: Mapping[str, SlotValue]) -> TorchZipLayout:
    builder = Builder()
    builder.take(value)
    root = builder.part({})
    replace_state(root, _parts(value, builder), frozenset())
    storages = number_storages(root, builder.fresh)
    records = [builder.records[int(one)] for one in storages]
    return layout_torch_archive(write_nodes(root, 2, _most(value)), records)


def _most(value: Mapping[str, SlotValue]) -> int:
    """Return a bound for the parts that a value is written in."""
    return _MOST_PARTS + 64 * _size(value)


def _size(value: SlotValue) -> int:
    inner: Iterable[SlotValue] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    return 1 + sum(map(_size, inner))


def _parts(value: Mapping[str, SlotValue], builder: Builder) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for key, inner in value.items():
        parts[key] = builder.groups(inner) if key == "param_groups" else builder.part(inner)
    return parts


def _prove(path: str, selection: Selection, value: Mapping[str, SlotValue], target: str) -> None:
    try:
        with open_inside(path, selection) as written:
            same = _outline(read_state(written)) == _outline(read_form(value))
    except CkptkitError as error:
        raise OutputError(f"does not read back, so it was not kept: {error.reason}", path=target) from error
    if not same:
        raise OutputError("does not read back as planned, so it was not kept", path=target)


def _plain(value: SlotValue) -> object:
    """Return a value that equals another where both are the same: NaN too; of tensors dtype and shape count."""
    if isinstance(value, LazyTensor):
        return value.dtype, value.shape
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.type if isinstance(value, OpaqueValue) else repr(value)


def _outline(found: FoundState) -> object:
    groups = [(group.params, group.param_names, _plain(group.options)) for group in found.groups]
    return found.form, {key: _plain(slots) for key, slots in found.state.items()}, groups
