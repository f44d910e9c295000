"""Execution of a plan: write the tensors of the output, and check the output before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptkit.core.arguments import require_flags, require_progress, require_type
from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.files import is_same_file
from ckptkit.core.progress import Progress
from ckptkit.core.result import Result
from ckptkit.core.text import human_bytes, listed, plural, printable
from ckptkit.errors import CkptkitError, OutputError, PlanError
from ckptkit.formats import errors_about, open_checkpoint, open_inside
from ckptkit.formats.detect import TORCH_SUFFIXES
from ckptkit.formats.distributed.file_names import DCP_METADATA, DCP_SUFFIX
from ckptkit.formats.safetensors import layout_safetensors, refuse_unstorable, share_blocks, write_safetensors
from ckptkit.formats.sharded import is_output_shard_name, is_shard_name, split_into_shards, weight_index
from ckptkit.formats.writing.atomic import (
    AtomicFile,
    Target,
    atomic_directory,
    output_errors,
    prepare_directory,
    prepare_target,
    real_path,
)
from ckptkit.formats.writing.reflink import Reflink, shared_block
from ckptkit.plans.carried import Adapted, Carried, write_carried
from ckptkit.plans.inputs import PlanInputs, Sources, opened_inputs
from ckptkit.plans.metadata import loss_of_metadata, names_in_entries
from ckptkit.plans.output import Output, choose_output
from ckptkit.plans.plan import Dropped, Plan, find_broken_ties
from ckptkit.plans.plan.extracted import ExtractedChange
from ckptkit.wrappers.envelopes import Selection

if TYPE_CHECKING:
    from ckptkit.formats.torch.write import BlockOf, TorchZipLayout
    from ckptkit.plans.edit_torch import PlanEditor
    from ckptkit.plans.verify import Verification

__all__ = ["Written", "check_output", "execute", "refuse_replacing_inputs"]


_WEIGHTS = (".safetensors", DCP_SUFFIX, ".index.json", *TORCH_SUFFIXES)
_NOUNS = {"safetensors": "a safetensors file", "torch": "a torch file", "dcp": "a distributed checkpoint"}


@dataclass(frozen=True, slots=True, repr=False)
class Written(Result):
    """A description of the output that was written.

    ``beside`` names other weight files that were in the output directory before and are still there. ``envelope`` is
    the mapping inside the file that holds the tensors. ``losses`` has every cast that changed a value to inf, to 0 or
    to an integer, with exact counts. ``left`` is the old directory, under a temporary path, if it could not be removed.
    ``verified`` names the reader that found the planned bytes of every tensor, such as ``safetensors 0.8.0``; it is
    None where that was not asked for. ``read_back`` is the reason why only ckptkit could compare the bytes, or None.
    ``untied`` has groups of keys that shared memory in an input, and have storages of their own in the output.
    ``extracted`` says how much of each change the factors of an extracted adapter hold.
    ``shared`` is the number of bytes in blocks of the disk that the output shares with an input, see ``Output``.
    ``carried`` names the files that were taken along from an input, and ``adapted`` what changed in them.
    ``plan`` is the plan that was executed, with the entries that this output keeps and leaves out.

    Example:
        >>> written = ckptkit.execute(ckptkit.plan_remap(state := {"w": torch.ones(2)}), state, "ones.safetensors")
        >>> written.path, written.format, written.tensors
        ('ones.safetensors', 'safetensors', 1)
    """

    path: str
    format: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    beside: tuple[str, ...] = ()
    envelope: str = ""
    losses: tuple[CastLoss, ...] = ()
    left: tuple[str, ...] = ()
    verified: str | None = None
    read_back: str | None = None
    untied: tuple[tuple[str, ...], ...] = ()
    extracted: tuple[ExtractedChange, ...] = ()
    carried: tuple[str, ...] = ()
    adapted: tuple[Adapted, ...] = ()
    plan: Plan | None = field(default=None, compare=False)
    shared: int = 0

    @property
    def coverage(self) -> float | None:
        """The share of the base's elements that got values from a donor, as in the plan; None without a base."""
        return None if self.plan is None else self.plan.coverage

    @property
    def from_base(self) -> tuple[str, ...]:
        """The keys that have the values of the base, as in the plan."""
        return () if self.plan is None else self.plan.from_base

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return f"{printable(self.path)}, {self.format}, {plural(self.tensors, 'tensor')}, {human_bytes(self.nbytes)}"


def check_output(plan: Plan, output: Output, sources: Mapping[str, Checkpoint], *, carry: bool = False) -> Plan:
    """Return the plan with the entries that this output keeps (``kept``) and drops (``dropped``).

    Raises the errors that ``execute`` would raise before it writes. ``PlanError`` is for a tensor that the format
    cannot hold and for a file that cannot be edited. ``OutputError`` is for an output that exists (without ``force``)
    or cannot be created. With ``carry``, the notes of the plan say how the files that go along change.
    """
    try:
        _refuse_unwritable([step.out for step in plan.steps], output.format)
    except PlanError as error:
        error.path = output.path
        raise
    prepare = prepare_directory if output.is_directory else prepare_target
    prepare(output.path, force=output.force, before=output.before)
    carried = _carried(plan, output, sources, carry=carry)
    return _with_kept_entries(plan, output, sources, _editor(plan, output, sources), carried)


def _carried(plan: Plan, output: Output, sources: Mapping[str, Checkpoint], *, carry: bool) -> Carried:
    if not carry:
        return Carried()
    from ckptkit.plans.carry import plan_carried

    return plan_carried(plan, output, sources)


def _with_notes(plan: Plan, notes: Iterable[str]) -> Plan:
    """Return the plan with further notes; a plan that has them is unchanged."""
    return replace(plan, notes=(*plan.notes, *(note for note in notes if note not in plan.notes)))


def _with_kept_entries(
    plan: Plan, output: Output, sources: Mapping[str, Checkpoint], editor: PlanEditor | None, carried: Carried
) -> Plan:
    """Return the plan with the entries that this output keeps and drops; a plan that has them is unchanged."""
    plan = _with_notes(plan, carried.notes)
    plan = replace(plan, dropped=tuple(drop for drop in plan.dropped if not carried.takes(drop)))
    lost: list[Dropped] = []
    if output.format != "safetensors" and any(key != "format" for key in plan.metadata):
        loss = loss_of_metadata(plan.metadata, [step.out.key for step in plan.steps])
        why = f"{_NOUNS[output.format]} cannot hold it{loss}"
        lost.append(Dropped("output", "__metadata__", why, is_entry=True))
    if output.format != "torch" and plan.versions:
        why = f"{_NOUNS[output.format]} cannot hold module versions"
        lost.append(Dropped("output", "_metadata", why, is_entry=True))
    lost = [drop for drop in lost if drop not in plan.dropped]
    if editor is None:
        return replace(plan, dropped=(*plan.dropped, *lost))
    entries = [entry.path for entry in sources[plan.edited_role].entries if not entry.is_file]
    paths = set(entries)
    kept = {drop for drop in plan.dropped if drop.is_entry and drop.role == plan.edited_role and drop.key in paths}
    dropped = (*(drop for drop in plan.dropped if drop not in kept), *lost)
    kept_keys = {drop.key for drop in kept}.union(plan.kept)
    kept_entries = tuple(entry for entry in entries if entry in kept_keys)
    owner = sources[plan.edited_role]
    kept_values = (entry for entry in owner.entries if entry.path in kept_keys)
    stale = names_in_entries(kept_values, plan.edited_role, plan.steps, owner)
    return _with_notes(replace(plan, dropped=dropped, kept=kept_entries), [*editor.notes, *stale])


def execute(
    plan: Plan | str | os.PathLike[str],
    sources: Sources,
    out: Output | str | os.PathLike[str],
    *,
    verify: bool = False,
    allow_overflow: bool = False,
    carry: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the output that ``plan`` describes, whole or not at all, and check it by reading it back.

    ``plan`` may be the path of a plan file, as for ``load_plan``. ``sources`` maps the roles of the plan (``source``;
    ``base`` and ``donor``) to the inputs that it was made from: Checkpoints, paths, models or mappings of tensors. A
    single input may be given without its role. ``out`` is a path, with a suffix that names the format, or an
    ``Output``.

    With ``verify``, safetensors, ``torch.load`` or ``torch.distributed.checkpoint`` reads the output before it gets its
    name. The output must have the keys, dtypes, shapes and bytes of the plan, which is computed again.
    ``Written.verified`` names that reader.
    ``allow_overflow`` writes values that a cast makes infinite; ``Written.losses`` has their counts.
    ``progress`` is called with a number of bytes after each write.

    With ``carry``, files go along from the directory of the input (the base, if there is one) into that of the output:
    ``config.json``, the generation config, the tokenizer, the processors and the chat template. In ``config.json``, the
    dtype becomes that of the output where it is another than that of the input. The quantisation is removed where no
    weight of the output is quantised. ``Written.adapted`` has these changes. Code (``*.py``) is never carried. An
    existing file needs ``force``. Shards and carried files get their names together. Beside a single file, the carried
    files get their names after the weights are complete, and immediately before the weights get theirs.

    A torch file that is made from a training checkpoint is a copy of that file with new tensors.
    ``Output(only_tensors=True)`` writes only the tensors. Tensors are streamed, so the memory in use does not grow
    with the checkpoint.

    Raises ``OutputError`` where the output exists (without ``force``), and where it would replace an input or a part
    of one. It is also raised where another program changed the output during the run, where the disk is full, and
    where ``verify`` finds a difference. Raises ``PlanError`` where the plan does not fit the inputs or contradicts
    itself, where the format cannot hold a tensor, and where a cast would make inf of finite values without
    ``allow_overflow``. Raises ``ChangedError`` where an input changed since it
    was opened. After an error nothing new is at the path.

    Example:
        >>> plan = ckptkit.plan_remap("fixtures/lenet_10class.pth", ["fc3.*=head.*"])
        >>> ckptkit.execute(plan, "fixtures/lenet_10class.pth", "renamed.safetensors", verify=True)
        <Written: renamed.safetensors, safetensors, 10 tensors, 248.8 kB>
    """
    require_type(plan, Plan | str | os.PathLike, "plan", "a Plan, or the path of a plan file")
    require_type(out, Output | str | os.PathLike, "out", "a path or an Output")
    require_flags(verify=verify, allow_overflow=allow_overflow, carry=carry)
    require_progress(progress)
    output = out if isinstance(out, Output) else choose_output(out)
    if isinstance(plan, str | os.PathLike):
        from ckptkit.plans.saved import load_plan

        plan = load_plan(plan, sources)
    edited = (plan.edited_role,) if plan.edited_role and output.format == "torch" and not output.only_tensors else ()
    with (
        output_errors(output.path),
        opened_inputs(plan.steps, sources, edited, allow_overflow=allow_overflow) as inputs,
    ):
        plan = replace(plan, steps=tuple(inputs.steps.values()))
        return _execute(plan, inputs, output, progress or (lambda _: None), verify=verify, carry=carry)


def _execute(
    plan: Plan, inputs: PlanInputs, output: Output, report_bytes: Progress, *, verify: bool, carry: bool
) -> Written:
    roles = inputs.roles
    editor = _editor(plan, output, roles)
    refuse_replacing_inputs(output, roles, "" if editor is None else plan.edited_role)
    inputs.refuse_different_bytes()
    carried = _carried(plan, output, roles, carry=carry)
    if output.is_directory:
        written, verified = _write_directory(plan, output, inputs, report_bytes, carried=carried, verify=verify)
    else:
        written, verified = _write_file(plan, output, inputs, report_bytes, editor, carried=carried, verify=verify)
    alone = next((result for result in verified if result.alone), None)
    return replace(
        written,
        untied=written.untied if output.format == "torch" else tuple(find_broken_ties(plan)),
        losses=inputs.losses(),
        extracted=tuple(inputs.producer.extracted.values()),
        verified=verified[0].reader if verified and alone is None else None,
        read_back=None if alone is None else alone.alone,
        carried=carried.names,
        adapted=carried.adapted,
        plan=_with_kept_entries(plan, output, roles, editor, carried),
    )


def _write_file(
    plan: Plan,
    output: Output,
    inputs: PlanInputs,
    progress: Progress,
    editor: PlanEditor | None,
    *,
    carried: Carried,
    verify: bool,
) -> tuple[Written, list[Verification]]:
    target = prepare_target(output.path, force=output.force, before=output.before)
    directory = os.path.dirname(output.path)
    infos = [step.out for step in plan.steps]
    verified: list[Verification] = []
    if output.format == "safetensors":

        def finish(path: str) -> None:
            inputs.refuse_overflow()
            if verify:
                from ckptkit.plans.verify import verify_safetensors

                verified.append(verify_safetensors(path, output.path, plan.steps, plan.metadata, inputs.roles))
            inputs.check_unchanged()
            write_carried(carried, directory, output)

        size, shared = _write_safetensors(
            target, infos, plan.metadata, inputs, progress, reflink=output.reflink, finish=finish
        )
        return Written(output.path, output.format, len(plan.steps), size, (target.path,), shared=shared), verified
    from ckptkit.formats.torch.write import write_torch_zip

    def block(payloads: Iterable[Payload]) -> int:
        return shared_block(payloads, target.path, output.reflink)

    layout = _torch_layout(infos, plan, inputs, editor, block)
    inner = "" if editor is None else inputs.roles[plan.edited_role].envelope
    with AtomicFile(target, layout.nbytes, layout.block, by_kernel=output.reflink != "never") as file:
        found = _write_and_read_back(write_torch_zip(layout, file), file, infos, progress, inner)
        inputs.refuse_overflow()
        if verify:
            from ckptkit.plans.verify import verify_torch

            verified.append(verify_torch(file.temporary, output.path, plan.steps, inputs.roles, inner))
        inputs.check_unchanged()
        write_carried(carried, directory, output)
    written = Written(
        output.path, output.format, len(plan.steps), layout.nbytes, (target.path,), (), inner, shared=file.shared
    )
    new = plan if editor is None else replace(plan, steps=tuple(editor.changed))
    return replace(written, untied=tuple(_separated(find_broken_ties(new), found))), verified


def _separated(groups: Iterable[tuple[str, ...]], found: Mapping[str, TensorInfo]) -> Iterator[tuple[str, ...]]:
    """Yield, for each group of keys that has several storages, the first key of each storage."""
    position = {key: number for number, key in enumerate(found)}
    for group in groups:
        storages: dict[object, str] = {}
        for key in sorted(group, key=position.__getitem__):
            view = found[key].view
            storages.setdefault(key if view is None else view.storage, key)
        if len(storages) > 1:
            yield tuple(storages.values())


def _refuse_unwritable(infos: Sequence[TensorInfo], format_name: str) -> None:
    """Raise ``PlanError`` for a tensor that a file of this format cannot hold."""
    if format_name == "safetensors":
        refuse_unstorable(infos)
    elif format_name == "dcp":
        from ckptkit.formats.distributed.dcp_write import refuse_unfit

        refuse_unfit(infos)
    else:
        from ckptkit.formats.torch.write import refuse_unwritable

        refuse_unwritable(infos)


def _editor(plan: Plan, output: Output, roles: Mapping[str, Checkpoint]) -> PlanEditor | None:
    """Return the editor of the torch file that the output copies, or None if the output holds only tensors."""
    if output.format != "torch":
        return None
    from ckptkit.plans.edit_torch import editor_for

    return editor_for(plan, output, roles)


def refuse_replacing_inputs(output: Output, roles: Mapping[str, Checkpoint], edited: str) -> None:
    """Raise ``OutputError`` where an output would replace an input without ``force``, or lose a part of an input.

    ``edited`` is the role of the input that the output is an edited copy of, or the empty string.
    """
    parent, name = os.path.split(real_path(output.path))
    for role, checkpoint in roles.items():
        same = any(is_same_file(file, output.path) for file in checkpoint.files)
        parents = {os.path.dirname(file) or "." for file in checkpoint.files}
        inside = output.is_directory and any(
            _is_own_name(output, os.path.basename(file)) and is_same_file(os.path.dirname(file) or ".", output.path)
            for file in checkpoint.files
        )
        if not same and not inside:
            if len(checkpoint.files) > 1 and is_shard_name(name) and any(is_same_file(at, parent) for at in parents):
                raise OutputError("would be read as a shard of an input", hint="write elsewhere", path=output.path)
            continue
        if not output.force:
            raise OutputError("is an input", hint="write elsewhere, or --force to replace it", path=output.path)
        if len(checkpoint.files) > 1 and not inside:
            raise OutputError("is a shard of an input, and the other shards would no longer match", path=output.path)
        lost = [entry.path for entry in checkpoint.entries if entry.path != "_metadata" and not entry.is_file]
        if lost and role != edited:
            raise OutputError(
                f"is an input that holds more than tensors: the output would lose {listed(lost, 4, show=printable)}",
                hint="write elsewhere",
                path=output.path,
            )


def _write_safetensors(
    target: Target | str,
    infos: Sequence[TensorInfo],
    metadata: Mapping[str, str],
    inputs: PlanInputs,
    progress: Progress,
    *,
    reflink: Reflink,
    finish: Callable[[str], None] = lambda _: None,
) -> tuple[int, int]:
    """Write one file, and return its size and how many bytes it shares with its inputs.

    ``finish`` gets the path of the complete file before it has its name.
    """
    layout = layout_safetensors(infos, metadata)
    payloads = {info.key: inputs.payload(info) for info in infos}
    block = shared_block(payloads.values(), target if isinstance(target, str) else target.path, reflink)
    layout = share_blocks(layout, payloads, block)
    with AtomicFile(target, layout.nbytes, block, by_kernel=reflink != "never") as file:
        _write_and_read_back(write_safetensors(layout, payloads, file), file, infos, progress)
        finish(file.temporary)
    return layout.nbytes, file.shared


def _torch_layout(
    infos: Sequence[TensorInfo], plan: Plan, inputs: PlanInputs, editor: PlanEditor | None, block: BlockOf
) -> TorchZipLayout:
    from ckptkit.formats.torch.write import assign_records, layout_torch_zip

    viewed = inputs.with_views(infos)
    if editor is None:
        return layout_torch_zip(viewed, inputs.payload, inputs.span, plan.versions, block)
    changed = {step.out.key for step in editor.changed}
    records, stored = assign_records([info for info in viewed if info.key in changed], inputs.payload, inputs.span)
    with errors_about(inputs.roles[plan.edited_role].path):
        return editor.layout(stored, records, block)


def _write_and_read_back(
    work: Iterator[int], file: AtomicFile, infos: Sequence[TensorInfo], progress: Progress, inner: str = ""
) -> Mapping[str, TensorInfo]:
    """Do the work, and return the tensors of the file that it wrote."""
    for count in work:
        progress(count)
    # A file that does not read back as planned never gets the name of the output.
    try:
        with open_inside(file.temporary, Selection(inner)) as written:
            as_planned, found = _has_tensors(written, infos), dict(written)
    except CkptkitError as error:
        raise OutputError(
            f"could not be read back, so the new file was deleted: {error.reason}", path=file.target
        ) from error
    if not as_planned:
        raise OutputError("was not written as planned, so the new file was deleted", path=file.target)
    return found


def _has_tensors(written: Checkpoint, infos: Iterable[TensorInfo], names: Iterable[str] | None = None) -> bool:
    """Return whether a checkpoint has exactly these tensors, all of them in files with these names."""
    found = {key: (info.dtype, info.shape) for key, info in written.items()}
    files = {os.path.basename(file) for file in written.files}
    return found == {info.key: (info.dtype, info.shape) for info in infos} and (names is None or files <= set(names))


def _write_directory(
    plan: Plan, output: Output, inputs: PlanInputs, progress: Progress, *, carried: Carried, verify: bool
) -> tuple[Written, list[Verification]]:
    kind = _Dcp if output.format == "dcp" else _Shards
    files = kind(plan, output, inputs)
    target = prepare_directory(output.path, force=output.force, before=output.before)
    existing = list(target.before.entries)
    ours = frozenset(name for name in existing if _is_own_name(output, name))
    left: list[str] = []
    verified: list[Verification] = []
    with atomic_directory(target, replaced=ours.union(carried.names), left=left) as directory:
        total = files.write(directory, progress)
        write_carried(carried, directory, output)
        _check_directory(directory, plan, files.names)
        if verify:
            verified = files.verify(directory)
        inputs.check_unchanged()
    beside = sorted(name for name in existing if name not in ours and name.endswith(_WEIGHTS))
    written = Written(
        output.path,
        files.format,
        len(plan.steps),
        total,
        files.names,
        tuple(beside),
        left=tuple(left),
        shared=files.shared,
    )
    return written, verified


def _is_own_name(output: Output, name: str) -> bool:
    """Return whether an output directory replaces an old file of this name."""
    return name == DCP_METADATA or name.endswith(DCP_SUFFIX) if output.format == "dcp" else is_output_shard_name(name)


class _Shards:
    """The shards of an output, and their index if there are several."""

    def __init__(self, plan: Plan, output: Output, inputs: PlanInputs) -> None:
        assert output.max_shard_size is not None  # noqa: S101 - choose_output gives each directory of shards a size
        self.plan, self.output, self.inputs = plan, output, inputs
        self.shards = split_into_shards([step.out for step in plan.steps], output.max_shard_size)
        self.index, self.index_data = weight_index(self.shards)
        self.has_index = len(self.shards) > 1
        self.names = (*(shard.name for shard in self.shards), *((self.index,) if self.has_index else ()))
        self.shared = 0
        self.format = f"sharded safetensors ({len(self.shards)} shards)" if self.has_index else "safetensors"

    def write(self, directory: str, progress: Progress) -> int:
        """Write the files and return the size of all shards."""
        total = 0
        for shard in self.shards:
            path = os.path.join(directory, shard.name)
            size, shared = _write_safetensors(
                path, shard.infos, self.plan.metadata, self.inputs, progress, reflink=self.output.reflink
            )
            total += size
            self.shared += shared
        self.inputs.refuse_overflow()
        if self.has_index:
            _write_small(os.path.join(directory, self.index), self.index_data)
        return total

    def verify(self, directory: str) -> list[Verification]:
        """Let safetensors read every shard, and compare the index with the shards."""
        from ckptkit.plans.verify import verify_index, verify_safetensors

        verified = []
        for shard in self.shards:
            path, shown = (os.path.join(parent, shard.name) for parent in (directory, self.output.path))
            steps = [self.inputs.steps[info.key] for info in shard.infos]
            verified.append(verify_safetensors(path, shown, steps, self.plan.metadata, self.inputs.roles))
        if self.has_index:
            verify_index(os.path.join(directory, self.index), os.path.join(self.output.path, self.index), self.shards)
        return verified


class _Dcp:
    """A distributed checkpoint: one file of tensors, and the metadata that says where each is."""

    format = "dcp"
    shared = 0  # the bytes of its tensors begin at other places of a block than in the inputs

    def __init__(self, plan: Plan, output: Output, inputs: PlanInputs) -> None:
        from ckptkit.formats.distributed.dcp_write import DCP_FILE, layout_dcp

        self.plan, self.output, self.inputs = plan, output, inputs
        self.layout = layout_dcp([step.out for step in plan.steps], inputs.payload)
        self.names = (DCP_FILE, DCP_METADATA)

    def write(self, directory: str, progress: Progress) -> int:
        """Write the files and return the size of the file of tensors."""
        from ckptkit.formats.distributed.dcp_write import write_dcp

        data, metadata = (os.path.join(directory, name) for name in self.names)
        with AtomicFile(data, self.layout.nbytes, by_kernel=self.output.reflink != "never") as file:
            for count in write_dcp(self.layout, file):
                progress(count)
        self.inputs.refuse_overflow()
        _write_small(metadata, self.layout.metadata)
        return self.layout.nbytes

    def verify(self, directory: str) -> list[Verification]:
        """Let torch load the checkpoint."""
        from ckptkit.plans.verify import verify_dcp

        return [verify_dcp(directory, self.output.path, self.plan.steps, self.inputs.roles)]


def _write_small(path: str, data: bytes) -> None:
    with AtomicFile(path, len(data)) as file:
        file.write(data, 0)


def _check_directory(directory: str, plan: Plan, names: Iterable[str]) -> None:
    # The directory keeps its other files. A reader could prefer an index or old shards among them to the output.
    why = "holds other weights, which would be read instead of the output"
    try:
        with open_checkpoint(directory) as written:
            as_planned = _has_tensors(written, [step.out for step in plan.steps], names)
            for key in written if as_planned and written.format == "dcp" else ():
                # The reader compares the header of each tensor with the metadata only when it reads the tensor.
                next(iter(written.payload(key).chunks()), None)
    except CkptkitError as error:
        as_planned, why = False, f"the weights cannot be read with the other files of the directory: {error.reason}"
    if not as_planned:
        raise OutputError(why, hint="give a new directory, or remove its other weights")
