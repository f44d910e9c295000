"""The state of an optimizer into a file of torch: as an edit of the file that it came from, or alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.errors import CkptkitError, OutputError, PlanError
from ckptkit.formats import open_inside, refusing
from ckptkit.formats.atomic import AtomicFile, prepare_target
from ckptkit.formats.pickle.edit import WAY_OUT, items_of, name_of, number_storages
from ckptkit.formats.pickle.nodes import Part, read_nodes
from ckptkit.formats.pickle.pickle_nodes import write_nodes
from ckptkit.formats.torch.naming import exact_key
from ckptkit.formats.torch.write import TorchZipLayout, layout_archive, write_torch_zip
from ckptkit.optimizer_state.forms import lay_out
from ckptkit.optimizer_state.model import LazyTensor, OptimizerState, Slot, Unknown, tensors_in
from ckptkit.optimizer_state.nodes import Builder, Origin, replace_state
from ckptkit.optimizer_state.reading import FoundState, read_laid_out, read_state
from ckptkit.plans.edit_torch import refuse_unknown
from ckptkit.plans.execute import Progress, Written, refuse_harm
from ckptkit.plans.output import Output
from ckptkit.wrappers import AN_OPTIMIZER

__all__ = ["write_optimizer_state"]

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
    edited = source is not None and source.rest is not None and not output.only_tensors
    value = lay_out(state, form or state.form)
    refuse_harm(output, _roles(value, source), "source" if edited else "")
    try:
        with nullcontext() if source is None else refusing(source.path):
            layout, inner = (
                _edit(value, source, output) if edited and source is not None else (_alone(value), AN_OPTIMIZER)
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
        _prove(file.temporary, inner, value, file.target)
    tensors = sum(1 for _ in tensors_in(value))
    envelope = source.envelope if edited and source is not None else ""
    return Written(output.path, "torch", tensors, layout.nbytes, (target,), (), envelope)


def _roles(value: Slot, source: Checkpoint | None) -> dict[str, Checkpoint]:
    """Return everything that is read from: the file that is edited as ``source``, others by number."""
    found = {id(tensor.source): tensor.source for tensor in tensors_in(value) if tensor.source is not source}
    roles = {str(number): checkpoint for number, checkpoint in enumerate(found.values())}
    return roles if source is None else {"source": source, **roles}


def _edit(value: Mapping[str, Slot], source: Checkpoint, output: Output) -> tuple[TorchZipLayout, str]:
    rest = source.rest
    assert rest is not None  # noqa: S101 - the caller asked
    refuse_unknown(rest, source.path, keep_unknown=output.keep_unknown)
    if rest.doubt:
        raise PlanError(f"what the file holds beside the state cannot be kept: {rest.doubt}", hint=_ALONE)
    data = rest.pickle()
    root, protocol = read_nodes(data)
    origin = Origin(source, root, rest.path)
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
    records = [builder.records[one] if isinstance(one, int) else rest.storage(one) for one in storages]
    most = _PARTS_PER_BYTE * len(data) + _most(value)
    return layout_archive(write_nodes(root, protocol, most), records, rest.others()), exact_key(
        rest.path
    ) or AN_OPTIMIZER


def _alone(value: Mapping[str, Slot]) -> TorchZipLayout:
    builder = Builder()
    builder.take(value)
    root = builder.part({})
    replace_state(root, _parts(value, builder), frozenset())
    storages = number_storages(root, builder.fresh)
    records = [builder.records[int(one)] for one in storages]
    return layout_archive(write_nodes(root, 2, _most(value)), records)


def _most(value: Mapping[str, Slot]) -> int:
    """Return a bound for the parts that a value is written in."""
    return _MOST_PARTS + 64 * _size(value)


def _size(value: Slot) -> int:
    inner: Iterable[Slot] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    return 1 + sum(map(_size, inner))


def _parts(value: Mapping[str, Slot], builder: Builder) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for key, inner in value.items():
        parts[key] = builder.groups(inner) if key == "param_groups" else builder.part(inner)
    return parts


def _prove(path: str, inner: str, value: Mapping[str, Slot], target: str) -> None:
    try:
        with open_inside(path, inner) as written:
            same = _outline(read_state(written)) == _outline(read_laid_out(value))
    except CkptkitError as error:
        raise OutputError(f"does not read back, so it was not kept: {error.reason}", path=target) from error
    if not same:
        raise OutputError("does not read back as planned, so it was not kept", path=target)


def _plain(value: Slot) -> object:
    """Return a value that equals another where both are the same: NaN too; of tensors dtype and shape count."""
    if isinstance(value, LazyTensor):
        return value.dtype, value.shape
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.type if isinstance(value, Unknown) else repr(value)


def _outline(found: FoundState) -> object:
    groups = [(group.params, group.param_names, _plain(group.options)) for group in found.groups]
    return found.form, {key: _plain(slots) for key, slots in found.state.items()}, groups
