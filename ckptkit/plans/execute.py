"""Carrying a plan out: the only room that moves tensor bytes. It decides nothing; it can only fail."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo, View, row_major
from ckptkit.core.files import same_bytes
from ckptkit.core.progress import Progress
from ckptkit.core.text import printable, quoted
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.errors import CkptkitError, OutputError, PlanError
from ckptkit.formats import errors_about, open_checkpoint, open_inside
from ckptkit.formats.atomic import AtomicFile, atomic_directory, prepare_directory, prepare_target
from ckptkit.formats.detect import TORCH_SUFFIXES
from ckptkit.formats.safetensors import layout_safetensors, refuse_unstorable, write_safetensors
from ckptkit.formats.sharded import Shard, is_output_shard_name, is_shard_name, split_into_shards, weight_index
from ckptkit.formats.torch.write import (
    TorchZipLayout,
    assign_records,
    layout_torch_zip,
    refuse_unwritable,
    write_torch_zip,
)
from ckptkit.plans.edit_torch import PlanEditor, editor_for
from ckptkit.plans.output import Output, choose_output
from ckptkit.plans.plan import Dropped, Plan, Step
from ckptkit.plans.produce import Producer
from ckptkit.wrappers.envelopes import Selection

__all__ = ["Written", "check_output", "execute", "refuse_replacing_inputs", "verify"]


_WEIGHTS = (".safetensors", ".distcp", ".index.json", *TORCH_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, as read back from it."""

    path: str
    format: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    beside: tuple[str, ...] = ()  # other files of weights that were in the directory, and stay
    envelope: str = ""  # the mapping of the file that the tensors are in


def check_output(plan: Plan, output: Output, sources: Mapping[str, Checkpoint]) -> Plan:
    """Return the plan with what the output keeps beside the tensors, and with what it has no place for as dropped.

    Raises what ``execute`` would raise before its first byte: ``PlanError`` for a tensor that the format
    cannot hold, or a file that cannot be edited, ``OutputError`` for an output that exists (without ``force``) or
    cannot be one.
    """
    infos = [step.out for step in plan.steps]
    lost: list[Dropped] = []
    try:
        (refuse_unwritable if output.format == "torch" else refuse_unstorable)(infos)
    except PlanError as error:
        error.path = output.path
        raise
    if output.format == "torch":
        if any(key != "format" for key in plan.metadata):
            lost.append(Dropped("output", "__metadata__", "a torch file has no place for it", is_entry=True))
    elif plan.versions:
        lost.append(Dropped("output", "_metadata", "safetensors has no place for module versions", is_entry=True))
    (prepare_target if output.max_shard_size is None else prepare_directory)(output.path, force=output.force)
    editor = editor_for(plan, output, sources)
    if editor is None:
        return replace(plan, dropped=(*plan.dropped, *lost))
    entries = [entry.path for entry in sources[plan.edited_role].entries if not entry.is_file]
    stay = {
        drop for drop in plan.dropped if drop.is_entry and drop.role == plan.edited_role and drop.key in set(entries)
    }
    left = [drop for drop in plan.dropped if drop not in stay]
    kept = tuple(entry for entry in entries if entry in {drop.key for drop in stay})
    return replace(plan, dropped=(*left, *lost), kept=kept, notes=tuple(dict.fromkeys((*plan.notes, *editor.notes))))


def execute(
    plan: Plan,
    sources: Mapping[str, StateDictLike] | StateDictLike,
    out: Output | str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Written:
    """Write the output that ``plan`` describes, whole or not at all, and read back that it is there.

    ``sources`` maps the plan's roles (``source``; ``base``, ``donor``) to what the plan was made from; a
    single one may be given as it is. ``out`` is a path, whose suffix tells the format, or an ``Output``.
    A torch file made of a torch file that holds more than the mapping of tensors is a copy of that file with the
    tensors of the mapping made anew; ``Output`` says how to have the tensors alone. Tensors are streamed: memory does
    not grow with the checkpoint. Raises ``OutputError`` where the
    output exists (without ``force``), is an input that would be harmed, or has no room; ``PlanError``
    where the format cannot hold a tensor; ``ChangedError`` where an input changed meanwhile.
    """
    output = out if isinstance(out, Output) else choose_output(out)
    roles = _by_role(plan, sources, output)
    editor = editor_for(plan, output, roles)
    refuse_replacing_inputs(output, roles, "" if editor is None else plan.edited_role)
    steps = {step.out.key: step for step in plan.steps}
    if len(steps) != len(plan.steps):
        raise PlanError("the plan writes two tensors under one name")
    read = _Reading(steps, roles, Producer(roles))
    for step in plan.steps:
        _prove_equal(step, roles)
    report = progress or (lambda _: None)
    if output.max_shard_size is not None:
        return _write_shards(plan, output, read, report)
    target = prepare_target(output.path, force=output.force)
    infos = [step.out for step in plan.steps]
    if output.format == "safetensors":
        size = _write_safetensors(target, infos, plan.metadata, read, report, replace=output.force)
        return Written(output.path, output.format, len(plan.steps), size, (target,))
    layout = _lay_out_torch(infos, plan, read, editor)
    inner = "" if editor is None else roles[plan.edited_role].envelope
    with AtomicFile(target, layout.nbytes, replace=output.force) as file:
        _finish(write_torch_zip(layout, file), file, infos, read, report, inner=inner)
    return Written(output.path, output.format, len(plan.steps), layout.nbytes, (target,), (), inner)


@dataclass(frozen=True, slots=True)
class _Reading:
    """From an output's description to its bytes."""

    steps: Mapping[str, Step]
    roles: Mapping[str, Checkpoint]
    producer: Producer

    def payload(self, info: TensorInfo) -> Payload:
        return self.producer.payload(self.steps[info.key])

    def span(self, info: TensorInfo) -> Payload | None:
        step = self.steps[info.key]
        source = step.sources[0]
        # A cast tensor, and one of a file without views, lies in the output as its contiguous bytes.
        if step.operation != "copy" or step.out.view is None:
            return self.payload(info)
        return self.roles[source.role].span(source.key)

    def placed(self, infos: Sequence[TensorInfo]) -> list[TensorInfo]:
        """Return the infos with views such that one tensor of an input is one in the output, and nothing else is."""
        order = {role: number for number, role in enumerate(self.roles)}
        whole = {info.key: self._whole(self.steps[info.key]) for info in infos}
        count = Counter(whole.values())
        numbers = {identity: -1 - number for number, identity in enumerate(count)}
        made = []
        for info in infos:
            identity = whole[info.key]
            view = info.view
            if view is not None and self.steps[info.key].operation == "copy":
                role = order[self.steps[info.key].sources[0].role]
                view = view._replace(storage=view.storage * len(order) + role)
            else:
                view = View(numbers[identity], 0, row_major(info.shape)) if count[identity] > 1 else None
            made.append(replace(info, view=view))
        return made

    def _whole(self, step: Step) -> tuple[object, ...]:
        source = step.sources[0]
        identity = step.sources if step.recipe else step.out.view or source.key
        return source.role, identity, step.recipe, step.out.shape, step.out.dtype, step.operation

    def check(self) -> None:
        for checkpoint in self.roles.values():
            checkpoint.check_unchanged()


def _prove_equal(step: Step, roles: Mapping[str, Checkpoint]) -> None:
    first = step.sources[0]
    for source in step.equals:
        if not same_bytes(*(roles[one.role].payload(one.key) for one in (first, source))):
            raise PlanError(
                f"{quoted(first.key)} and {quoted(source.key)} would both be called {quoted(step.out.key)}, "
                "and are not equal",
                path=roles[source.role].path,
            )


def _by_role(plan: Plan, sources: Mapping[str, StateDictLike] | StateDictLike, output: Output) -> dict[str, Checkpoint]:
    read = [source.role for step in plan.steps for source in (*step.sources, *step.equals)]
    edited = [plan.edited_role] if plan.edited_role and output.format == "torch" and not output.only_tensors else []
    wanted = list(dict.fromkeys([*read, *edited]))
    is_roles = isinstance(sources, Mapping) and not isinstance(sources, Checkpoint) and set(wanted) <= set(sources)
    # A state_dict may well have a tensor called "source".
    if not is_roles or not all(isinstance(sources[role], Mapping) or _is_model(sources[role]) for role in wanted):
        if len(wanted) != 1:
            raise PlanError(f"the plan reads {', '.join(wanted)}", hint="pass sources={role: checkpoint, ...}")
        return {wanted[0]: as_checkpoint(sources, wanted[0])}
    return {role: as_checkpoint(thing, role) for role, thing in sources.items()}


def _is_model(thing: object) -> bool:
    return callable(getattr(thing, "state_dict", None))


def refuse_replacing_inputs(output: Output, roles: Mapping[str, Checkpoint], edited: str) -> None:
    """Raise ``OutputError`` where an output would replace an input, or be taken for a part of one, without being asked.

    ``edited`` is the role of the input that the output is an edited copy of, if any.
    """
    parent, name = os.path.split(os.path.realpath(output.path))
    for role, checkpoint in roles.items():
        same = any(_same_file(file, output.path) for file in checkpoint.files)
        parents = {os.path.dirname(file) or "." for file in checkpoint.files}
        inside = output.max_shard_size is not None and any(
            is_output_shard_name(os.path.basename(file)) and _same_file(os.path.dirname(file) or ".", output.path)
            for file in checkpoint.files
        )
        if not same and not inside:
            if len(checkpoint.files) > 1 and is_shard_name(name) and any(_same_file(at, parent) for at in parents):
                raise OutputError("would be taken for a shard of an input", hint="write elsewhere", path=output.path)
            continue
        if not output.force:
            raise OutputError("is an input", hint="write elsewhere, or --force to replace it", path=output.path)
        if len(checkpoint.files) > 1 and not inside:
            raise OutputError("is a shard of an input, which would no longer fit together", path=output.path)
        lost = [entry.path for entry in checkpoint.entries if entry.path != "_metadata" and not entry.is_file]
        if lost and role != edited:
            named = ", ".join(map(printable, lost[:4]))
            raise OutputError(
                f"is an input that holds more than tensors ({named}), which replacing it would lose",
                hint="write elsewhere",
                path=output.path,
            )


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _write_safetensors(
    target: str,
    infos: Sequence[TensorInfo],
    metadata: Mapping[str, str],
    read: _Reading,
    report: Progress,
    *,
    replace: bool,
) -> int:
    layout = layout_safetensors(infos, metadata)
    payloads = {info.key: read.payload(info) for info in infos}
    with AtomicFile(target, layout.nbytes, replace=replace) as file:
        _finish(write_safetensors(layout, payloads, file), file, infos, read, report)
    return layout.nbytes


def _lay_out_torch(
    infos: Sequence[TensorInfo], plan: Plan, read: _Reading, editor: PlanEditor | None
) -> TorchZipLayout:
    placed = read.placed(infos)
    if editor is None:
        return layout_torch_zip(placed, read.payload, read.span, plan.versions)
    changed = {step.out.key for step in editor.changed}
    records, stored = assign_records([info for info in placed if info.key in changed], read.payload, read.span)
    with errors_about(read.roles[plan.edited_role].path):
        return editor.layout(stored, records)


def _finish(
    work: Iterator[int],
    file: AtomicFile,
    infos: Sequence[TensorInfo],
    read: _Reading,
    report: Progress,
    *,
    inner: str = "",
) -> None:
    for count in work:
        report(count)
    read.check()
    # Success is measured on the output: what does not read back as planned never gets its name.
    try:
        with open_inside(file.temporary, Selection(inner)) as written:
            as_planned = _reads_as(written, infos)
    except CkptkitError as error:
        raise OutputError(f"does not read back, so it was not kept: {error.reason}", path=file.target) from error
    if not as_planned:
        raise OutputError("does not read back as planned, so it was not kept", path=file.target)


def _reads_as(written: Checkpoint, infos: Iterable[TensorInfo], names: Iterable[str] | None = None) -> bool:
    """Return whether what is read are these tensors, from no files but the named ones."""
    found = {key: (info.dtype, info.shape) for key, info in written.items()}
    files = {os.path.basename(file) for file in written.files}
    return found == {info.key: (info.dtype, info.shape) for info in infos} and (names is None or files <= set(names))


def _write_shards(plan: Plan, output: Output, read: _Reading, report: Progress) -> Written:
    assert output.max_shard_size is not None  # noqa: S101 - the caller chose shards because of it
    shards = split_into_shards([step.out for step in plan.steps], output.max_shard_size)
    existing = os.listdir(output.path) if os.path.isdir(output.path) else []
    ours = frozenset(name for name in existing if is_output_shard_name(name))
    total = 0
    with atomic_directory(output.path, force=output.force, ours=ours) as directory:
        for shard in shards:
            target = os.path.join(directory, shard.name)
            total += _write_safetensors(target, shard.infos, plan.metadata, read, report, replace=True)
        name, data = weight_index(shards)
        if len(shards) > 1:
            with AtomicFile(os.path.join(directory, name), len(data)) as file:
                file.write(data, 0)
        names = (*(shard.name for shard in shards), *((name,) if len(shards) > 1 else ()))
        _prove_directory(directory, plan, names)
    beside = sorted(name for name in existing if name not in ours and name.endswith(_WEIGHTS))
    return Written(output.path, _describe_shards(shards), len(plan.steps), total, names, tuple(beside))


def _prove_directory(directory: str, plan: Plan, names: Iterable[str]) -> None:
    # Files of other names stay in the directory: an index among them, or stale shards, could be what is read there.
    why = "other weights in it would be read instead"
    try:
        with open_checkpoint(directory) as written:
            as_planned = _reads_as(written, [step.out for step in plan.steps], names)
    except CkptkitError as error:
        as_planned, why = False, f"beside what is in it, the shards could not be read: {error.reason}"
    if not as_planned:
        raise OutputError(why, hint="give a new directory, or remove its other weights")


def _describe_shards(shards: Sequence[Shard]) -> str:
    return f"sharded safetensors ({len(shards)} shards)" if len(shards) > 1 else "safetensors"


def verify(plan: Plan, sources: Mapping[str, Checkpoint], path: str, inner: str = "") -> int:
    """Return the number of tensors in the output at ``path``, each of them proved to be what ``plan`` makes.

    ``inner`` is the mapping of the file that they are in. Everything is made anew from ``sources`` and compared with
    what is read back, in bounded memory. Raises ``OutputError`` naming the first tensor that is missing, is one too
    many, or differs.
    """
    producer = Producer(sources)
    keys = {step.out.key for step in plan.steps}
    with open_inside(path, Selection(inner)) if inner else open_checkpoint(path) as written:
        surplus = next((key for key in written if key not in keys), None)
        if surplus is not None:
            raise OutputError(f"holds {quoted(surplus)}, which the plan does not make", path=path)
        for step in plan.steps:
            info = written.get(step.out.key)
            if info is None or (info.dtype, info.shape) != (step.out.dtype, step.out.shape):
                raise OutputError(f"{quoted(step.out.key)} should be {step.out}, and is {info or 'missing'}", path=path)
            if not same_bytes(producer.payload(step), written.payload(step.out.key)):
                raise OutputError(f"{quoted(step.out.key)} does not have the bytes that the plan makes", path=path)
    return len(plan.steps)
