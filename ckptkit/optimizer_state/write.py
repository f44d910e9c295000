"""Write the state of an optimizer to a torch file: an edited copy of the file that it came from, or a new file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import cast

from ckptkit.core.arguments import require_flags, require_progress, require_type
from ckptkit.core.checkpoint import Checkpoint, KeyPath, Payload, TensorInfo
from ckptkit.core.progress import Progress
from ckptkit.core.text import quoted
from ckptkit.errors import CkptkitError, OutputError, PlanError
from ckptkit.formats import errors_about, open_inside
from ckptkit.formats.pickle.edit import dict_part, list_part, scalar_part, text_part, tuple_part
from ckptkit.formats.pickle.nodes import Part, plain_value
from ckptkit.formats.torch.edit import TorchFileEditor, refuse_unknown_code
from ckptkit.formats.torch.tree import bracketed_key
from ckptkit.formats.torch.write import TorchZipLayout, assign_records, refuse_unwritable, write_torch_zip
from ckptkit.formats.writing.atomic import output_errors
from ckptkit.formats.writing.outputs import output_file, writes_in_order
from ckptkit.formats.writing.targets import prepare_target
from ckptkit.optimizer_state.forms import FoundState, read_form, read_state, to_form
from ckptkit.optimizer_state.model import LazyTensor, OpaqueValue, OptimizerState, SlotValue, same_value, tensors_in
from ckptkit.plans.output import Output, choose_output
from ckptkit.plans.writing.refusals import refuse_replacing_inputs
from ckptkit.plans.writing.written import Written
from ckptkit.wrappers.envelopes import OPTIMIZER, Selection

__all__ = ["WrittenState", "write_optimizer_state"]

_PARTS_PER_VALUE = 64


@dataclass(frozen=True, slots=True, repr=False)
class WrittenState(Written):
    """A description of the file that ``write_optimizer_state`` wrote, and the ``state`` in it."""

    state: OptimizerState | None = field(default=None, compare=False)


def write_optimizer_state(
    state: OptimizerState,
    output: Output | str | os.PathLike[str],
    source: Checkpoint | None = None,
    *,
    form: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> WrittenState | None:
    """Write a state to a torch file, whole or not at all, and check that it reads back.

    ``output`` is a path that ends in ``.pt`` or another suffix of torch, or an ``Output``. ``source`` is the Checkpoint
    that the state was read from. If it is a torch file, the output is a copy of that file with the new state, unless
    ``output.only_tensors`` is set. ``form`` is one of ``FORMS``; the default is the form in which the state was found.
    ``dry_run`` checks everything and writes nothing. Raises ``PlanError`` for a value that cannot be written, and
    ``OutputError`` as ``execute`` does.

    Example:
        >>> from ckptkit.optimizer_state import to_named
        >>> model = torch.nn.Linear(2, 2)
        >>> state = to_named(torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), model)
        >>> ckptkit.write_optimizer_state(state, "optimizer.pt").format
        'torch'
    """
    require_type(state, OptimizerState, "state", "an OptimizerState")
    require_type(output, Output | str | os.PathLike, "output", "a path or an Output")
    require_type(source, Checkpoint | None, "source", "a Checkpoint")
    require_type(form, str | None, "form", "a str")
    require_flags(dry_run=dry_run)
    require_progress(progress)
    output = output if isinstance(output, Output) else choose_output(output)
    if output.format != "torch" or output.max_shard_size is not None:
        raise OutputError(
            "optimizer state is written to a torch file", hint="give a name that ends in .pt", path=output.path
        )
    value = to_form(state, form or state.form)
    edits_source = source is not None and source.container is not None and not output.only_tensors
    roles = _roles(value, source)
    refuse_replacing_inputs(output, roles, "source" if edits_source else "")
    with nullcontext() if source is None else errors_about(source.path):
        if source is not None and edits_source:
            layout, selection = _edited_file(value, source, output)
        else:
            layout, selection = _new_file(value, in_order=writes_in_order(output.path)), OPTIMIZER
    target = prepare_target(output.path, force=output.force, before=output.before)
    if dry_run:
        return None
    report = progress or (lambda _: None)
    with output_errors(output.path), output_file(target, layout.nbytes) as file:
        for count in write_torch_zip(layout, file):
            report(count)
        for checkpoint in roles.values():
            checkpoint.check_unchanged(by_path=True)
        _check_reads_back(file.complete(), selection, value, file.target)
    tensors = sum(1 for _ in tensors_in(value))
    envelope = source.envelope if source is not None and edits_source else ""
    return WrittenState(output.path, "torch", tensors, layout.nbytes, (target.path,), (), envelope, state=state)


def _roles(value: SlotValue, source: Checkpoint | None) -> dict[str, Checkpoint]:
    """Return every checkpoint that is read: the source as ``source``, and others by number."""
    found = {id(tensor.source): tensor.source for tensor in tensors_in(value) if tensor.source is not source}
    roles = {str(number): checkpoint for number, checkpoint in enumerate(found.values())}
    return roles if source is None else {"source": source, **roles}


def _edited_file(
    value: Mapping[str, SlotValue], source: Checkpoint, output: Output
) -> tuple[TorchZipLayout, Selection]:
    container = source.container
    assert container is not None  # noqa: S101 - the caller checked
    refuse_unknown_code(container, source.path, keep_unknown=output.keep_unknown)
    editor = TorchFileEditor(container)
    found = read_state(source)
    old_keys: set[object] = {"state", "param_groups", *found.more.keys}
    old_groups: Sequence[Mapping[str, SlotValue]] = [group.options for group in found.groups]
    if found.form == "flattened":  # every key belongs to the state, and no group is stored as a dict
        old_keys, old_groups = {plain_value(key) for key, _ in editor.items()}, ()
    parts = _StateParts(editor, value, source, old_groups)
    others = [item for item in editor.items() if plain_value(item[0]) not in old_keys]
    editor.set_items([*((text_part(key), part) for key, part in parts.of_state(value).items()), *others])
    selection = Selection(bracketed_key(container.path)) if container.path else OPTIMIZER
    return editor.layout(parts.records, in_order=writes_in_order(output.path)), selection


def _new_file(value: Mapping[str, SlotValue], *, in_order: bool) -> TorchZipLayout:
    editor = TorchFileEditor()
    parts = _StateParts(editor, value)
    editor.set_items([(text_part(key), part) for key, part in parts.of_state(value).items()])
    return editor.layout(parts.records, in_order=in_order)


class _StateParts:
    """Make the parts of a pickle for the values of a state; tensors that are not in the file become ``records``."""

    def __init__(
        self,
        editor: TorchFileEditor,
        value: Mapping[str, SlotValue],
        source: Checkpoint | None = None,
        old_groups: Sequence[Mapping[str, SlotValue]] = (),
    ) -> None:
        """Add every new tensor in ``value`` to the file; ``old_groups`` are the options that the file has already."""
        self._editor = editor
        self._source = source
        self._kept_paths: Mapping[str, KeyPath] = {} if source is None or source.nested is None else source.nested.paths
        self._options: list[tuple[str, SlotValue, KeyPath]] = [
            (key, option, ("param_groups", number, key))
            for number, options in enumerate(old_groups)
            for key, option in options.items()
        ]
        editor.limit += _PARTS_PER_VALUE * _count(value)
        new = {self._identity(tensor): tensor for tensor in tensors_in(value) if not self._is_kept(tensor)}
        by_number = list(new.values())
        infos = []
        for number, tensor in enumerate(by_number):
            if tensor.info.kind != "dense":
                raise PlanError(f"{quoted(tensor.info.key)} cannot be copied: it is a {tensor.info.kind} tensor")
            view = tensor.info.view and tensor.info.view._replace(storage=number)  # sources can have equal numbers
            infos.append(replace(tensor.info, key=str(number), view=view))
        refuse_unwritable(infos)

        def payload(info: TensorInfo) -> Payload:
            return by_number[int(info.key)].payload()

        def span(info: TensorInfo) -> Payload | None:
            return by_number[int(info.key)].span()

        self.records, stored = assign_records(infos, payload, span)
        self._new_tensors = dict(zip(new, editor.add_tensors(stored).values(), strict=True))

    def of_state(self, value: Mapping[str, SlotValue]) -> dict[str, Part]:
        """Return a part for each key of a state, such as ``state`` and ``param_groups``."""
        return {
            key: self._groups(inner) if key == "param_groups" else self._part(inner) for key, inner in value.items()
        }

    def _groups(self, value: SlotValue) -> Part:
        groups = cast("Sequence[Mapping[str, SlotValue]]", value)  # as every form of optimizer state has them
        return list_part(
            [
                dict_part([(text_part(key), self._option(key, value)) for key, value in group.items()])
                for group in groups
            ]
        )

    def _option(self, key: str, value: SlotValue) -> Part:
        """Return the part of an option, reused from the file if the file has an equal value."""
        if not isinstance(value, LazyTensor) and key not in ("params", "param_names"):
            for name, old_value, path in self._options:
                if name == key and same_value(old_value, value):
                    return self._editor.part_at(path)
        return self._part(value)

    def _part(self, value: SlotValue) -> Part:
        """Return the part of a value; raises ``PlanError`` for a value that cannot be written."""
        if isinstance(value, LazyTensor):
            if self._is_kept(value):
                return self._editor.part_at(self._kept_paths[value.info.key])
            return self._new_tensors[self._identity(value)]
        if isinstance(value, OpaqueValue):
            if self._source is None or value.source is not self._source:
                raise PlanError(f"an object of class {quoted(value.type)} can be kept only in a copy of its own file")
            return self._editor.part_at(value.place)
        if isinstance(value, Mapping):
            return dict_part([(self._part(key), self._part(inner)) for key, inner in value.items()])
        if isinstance(value, list):
            return list_part([self._part(inner) for inner in value])
        if isinstance(value, tuple):
            return tuple_part([self._part(inner) for inner in value])
        return scalar_part(value)

    def _is_kept(self, tensor: LazyTensor) -> bool:
        return tensor.source is self._source and tensor.info.key in self._kept_paths

    def _identity(self, tensor: LazyTensor) -> object:
        info = tensor.info
        view = info.view if tensor.span() is not None else None  # without a span, equal views may differ in value
        return id(tensor.source), view or info.key, info.shape, info.dtype


def _count(value: SlotValue) -> int:
    """Return the number of values in a nested value."""
    inner: Iterable[SlotValue] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    return 1 + sum(map(_count, inner))


def _check_reads_back(path: str, selection: Selection, value: Mapping[str, SlotValue], target: str) -> None:
    try:
        with open_inside(path, selection) as written:
            same = _comparable_state(read_state(written)) == _comparable_state(read_form(value))
    except CkptkitError as error:
        raise OutputError(f"does not read back, so it was not kept: {error.reason}", path=target) from error
    if not same:
        raise OutputError("does not read back as planned, so it was not kept", path=target)


def _comparable_state(found: FoundState) -> object:
    groups = [(group.params, group.param_names, _comparable(group.options)) for group in found.groups]
    more = _comparable(found.more.keys), _comparable(found.more.state)
    return found.form, {key: _comparable(slots) for key, slots in found.state.items()}, groups, more


def _comparable(value: SlotValue) -> object:
    """Return an object that equals another for the same value, NaN included; a tensor is its dtype and shape."""
    if isinstance(value, LazyTensor):
        return value.dtype, value.shape
    if isinstance(value, Mapping):
        return {key: _comparable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_comparable, value))
    return value.type if isinstance(value, OpaqueValue) else repr(value)
