"""Execution of a plan: write the tensors of the output, and check the output before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.core.arguments import require_flags, require_progress, require_type
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.checkpoint.provenance import PROVENANCE, provenance_name
from ckptkit.core.files.places import name_of, parent_of
from ckptkit.core.progress import Progress
from ckptkit.errors import PlanError
from ckptkit.formats.writing.atomic import output_errors
from ckptkit.formats.writing.state import Target
from ckptkit.formats.writing.targets import prepare_directory, prepare_target
from ckptkit.plans.carried import Carried, target_of
from ckptkit.plans.inputs import PlanInputs, Sources, opened_inputs, sources_by_role
from ckptkit.plans.metadata import loss_of_metadata, names_in_entries
from ckptkit.plans.output import Output, choose_output
from ckptkit.plans.plan import Dropped, Plan, find_broken_ties
from ckptkit.plans.writing.files import write_file
from ckptkit.plans.writing.refusals import refuse_replacing_inputs, refuse_unwritable_tensors
from ckptkit.plans.writing.written import Written
from ckptkit.tasks.executor_type import Executor, require_executor
from ckptkit.tasks.inputs import paths_of

if TYPE_CHECKING:
    from ckptkit.plans.edit_torch import PlanEditor
    from ckptkit.plans.writing.shard_tasks import Elsewhere

__all__ = ["Prepared", "check_output", "execute", "execute_prepared", "prepare_output", "workers_of"]

_NOUNS = {"safetensors": "a safetensors file", "torch": "a torch file", "dcp": "a distributed checkpoint"}


class Prepared(NamedTuple):
    """A plan that was checked for an output, and the editor of the torch file that the output copies, if it was made.

    To make the editor, the pickle of the file is read, which takes seconds beside a million entries. ``leftovers`` has
    sentences about what killed runs left beside the output, or is None where nothing looked for it.
    """

    plan: Plan
    editor: PlanEditor | None = None
    leftovers: tuple[str, ...] | None = None


def check_output(plan: Plan, output: Output, sources: Mapping[str, Checkpoint], *, carry: bool = False) -> Plan:
    """Return the plan with the entries that this output keeps (``kept``) and drops (``dropped``).

    Raises what ``prepare_output`` raises.
    """
    return prepare_output(plan, output, sources, carry=carry).plan


def prepare_output(
    plan: Plan, output: Output, sources: Mapping[str, Checkpoint], *, carry: bool = False, resume: bool = False
) -> Prepared:
    """Return the plan as ``check_output`` does, with the editor; give both to ``execute_prepared``.

    Raises the errors that ``execute`` would raise before it writes. ``PlanError`` is for a tensor that the format
    cannot hold and for a file that cannot be edited. ``OutputError`` is for an output that exists (without ``force``)
    or cannot be created. With ``carry``, the notes of the plan say how the files that go along change.
    """
    try:
        refuse_unwritable_tensors([step.out for step in plan.steps], output.format)
    except PlanError as error:
        error.path = output.path
        raise
    if resume:
        from ckptkit.plans.writing.finished_shards import refuse_to_resume

        refuse_to_resume(plan, output, sources)
    _prepared_target(output)
    carried = _carried(plan, output, sources, carry=carry)
    editor = _editor(plan, output, sources)
    leftovers = _leftovers(plan, output, sources, resume=resume, is_run=False)
    return Prepared(_with_kept_entries(plan, output, sources, editor, carried), editor, leftovers)


def _leftovers(
    plan: Plan, output: Output, roles: Mapping[str, Checkpoint], *, resume: bool, is_run: bool
) -> tuple[str, ...]:
    if not output.is_directory:
        return ()
    from ckptkit.plans.writing.finished_shards import notes_of_leftovers

    return tuple(notes_of_leftovers(plan, output, roles, resume=resume, is_run=is_run))


def _prepared_target(output: Output) -> Target:
    prepare = prepare_directory if output.is_directory else prepare_target
    return prepare(output.path, force=output.force, before=output.before)


def _carried(plan: Plan, output: Output, sources: Mapping[str, Checkpoint], *, carry: bool) -> Carried:
    carried = Carried()
    if carry:
        from ckptkit.plans.carry import plan_carried

        carried = plan_carried(plan, output, sources)
    provenance = plan.metadata.get(PROVENANCE)
    if provenance is None or output.format == "safetensors":
        return carried
    name = provenance_name("" if output.is_directory else name_of(output.path))
    contents = {**carried.contents, name: provenance.encode() + b"\n"}
    if not output.is_directory:
        target_of(replace(carried, contents=contents), name, parent_of(output.path), force=output.force)
    return replace(carried, names=(*carried.names, name), contents=contents)


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
    if output.format != "safetensors" and not plan.metadata.keys() <= {"format", PROVENANCE}:
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
    resume: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Written:
    """Write the output that ``plan`` describes, whole or not at all, and check it by reading it back.

    ``plan`` may be the path of a plan file, as for ``load_plan``. ``sources`` maps the roles of the plan (``source``;
    ``base`` and ``donor``) to the inputs that it was made from: Checkpoints, paths, models or mappings of tensors. A
    single input may be given without its role. ``out`` is a path, with a suffix that names the format, or an
    ``Output``.

    With ``verify``, safetensors, ``torch.load`` or ``torch.distributed.checkpoint`` reads the output before it gets its
    name. The output must have the keys, dtypes, shapes and bytes of the plan, which is computed again.
    ``Written.verified`` names that reader. First the inputs are compared with the checksums that they record.
    ``allow_overflow`` writes values that a cast makes infinite; ``Written.losses`` has their counts.
    ``progress`` is called with a number of bytes after each write.

    With ``carry``, files go along from the directory of the input (the base, if there is one) into that of the output:
    ``config.json``, the generation config, the tokenizer, the processors and the chat template. In ``config.json``, the
    dtype becomes that of the output where it is another than that of the input. The quantisation is removed where no
    weight of the output is quantised. ``Written.adapted`` has these changes. Code (``*.py``) is never carried. An
    existing file needs ``force``. Shards and carried files get their names together. Beside a single file, the carried
    files get their names after the weights are complete, and immediately before the weights get theirs.

    With ``resume``, the run goes on where a killed run onto the same path ended. A shard that it had finished is kept
    if it still has the recorded bytes. The plan, the size of shards and the inputs must be the same. The
    result has the same bytes as without the kill. After an error, finished shards are kept too, for the next run with
    ``resume``. The output must be a directory of shards on this machine.

    With an ``executor`` of ``concurrent.futures``, such as a ``ProcessPoolExecutor`` or one of a cluster, its workers
    write the shards: each is one task. The output must be a directory of shards. Each source must be a path, which
    every worker opens by itself, as it does with the directory of the output. This process records what is finished,
    writes the index last, and gives the output its name. The bytes and the result are the same as without an executor.
    A worker uses as many threads as ``OMP_NUM_THREADS`` says, or one. Finished shards are also kept after the death of
    a worker, for ``resume``. ``progress`` is called after each shard.

    A torch file that is made from a training checkpoint is a copy of that file with new tensors.
    ``Output(only_tensors=True)`` writes only the tensors. Tensors are streamed, so the memory in use does not grow
    with the checkpoint.

    Raises ``OutputError`` where the output exists (without ``force``), and where it would replace an input or a part
    of one. It is also raised where another program changed the output during the run, where the disk is full, and
    where ``verify`` finds a difference. Raises ``PlanError`` where the plan does not fit the inputs or contradicts
    itself, where the format cannot hold a tensor, and where a cast would make inf of finite values without
    ``allow_overflow``. Raises ``ChangedError`` where an input changed since it was opened. Raises ``FormatError`` where
    ``verify`` finds a damaged input. Raises ``ArgumentError`` where a source is not a path and an ``executor`` is
    given, and ``WorkerError`` where a worker ended. The error of a worker names its shard, and the other tasks are
    cancelled. After an error nothing new is at the path. But where a store fails while the files
    of a directory replace others, the hint says which files are new, old and gone.

    Example:
        >>> plan = ckptkit.plan_remap("fixtures/lenet_10class.pth", ["fc3.*=head.*"])
        >>> ckptkit.execute(plan, "fixtures/lenet_10class.pth", "renamed.safetensors", verify=True)
        <Written: renamed.safetensors, safetensors, 10 tensors, 248.8 kB>

        Two threads take the place of the processes or machines here:

        >>> from concurrent.futures import ThreadPoolExecutor
        >>> shards = ckptkit.choose_output("shards", max_shard_size="100kB")
        >>> with ThreadPoolExecutor(2) as executor:
        ...     ckptkit.execute(plan, "fixtures/lenet_10class.pth", shards, executor=executor)
        <Written: shards, sharded safetensors (3 shards), 10 tensors, 248.8 kB>
    """
    require_type(plan, Plan | str | os.PathLike, "plan", "a Plan, or the path of a plan file")
    require_type(out, Output | str | os.PathLike, "out", "a path or an Output")
    require_executor(executor)
    output = out if isinstance(out, Output) else choose_output(out)
    if isinstance(plan, str | os.PathLike):
        from ckptkit.plans.saved import load_plan

        plan = load_plan(plan, sources)
    elsewhere = None if executor is None else workers_of(executor, sources_by_role(plan.steps, sources))
    return execute_prepared(
        Prepared(plan),
        sources,
        output,
        verify=verify,
        allow_overflow=allow_overflow,
        carry=carry,
        resume=resume,
        progress=progress,
        elsewhere=elsewhere,
    )


def workers_of(executor: Executor | None, sources: Mapping[str, object]) -> Elsewhere | None:
    """Return an executor with the paths by which its workers open the sources, by role; None without an executor.

    Raises ``ArgumentError`` where ``executor`` is not an executor, and where a source is not a path.
    """
    require_executor(executor)
    if executor is None:
        return None
    from ckptkit.plans.writing.shard_tasks import Elsewhere

    return Elsewhere(executor, paths_of(sources))


def execute_prepared(
    prepared: Prepared,
    sources: Sources,
    output: Output,
    *,
    verify: bool = False,
    allow_overflow: bool = False,
    carry: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    elsewhere: Elsewhere | None = None,
) -> Written:
    """Write the output of a prepared plan, as ``execute`` does; an editor must be of these sources.

    With ``elsewhere``, the sources may be open: they must be of its paths.
    """
    require_flags(verify=verify, allow_overflow=allow_overflow, carry=carry, resume=resume)
    require_progress(progress)
    plan = prepared.plan
    if elsewhere is not None:
        from ckptkit.plans.writing.shard_tasks import refuse_elsewhere

        refuse_elsewhere(output)
    edited = (plan.edited_role,) if plan.edited_role and output.format == "torch" and not output.only_tensors else ()
    with (
        output_errors(output.path),
        opened_inputs(
            plan.steps, sources, edited, patched_base=plan.patched_base, allow_overflow=allow_overflow
        ) as inputs,
    ):
        plan = replace(plan, steps=tuple(inputs.steps.values()))
        editor = prepared.editor or _editor(plan, output, inputs.roles)
        report = progress or (lambda _: None)
        if prepared.leftovers is None:
            plan = _with_notes(plan, _leftovers(plan, output, inputs.roles, resume=resume, is_run=True))
        return _execute(
            plan, inputs, output, report, editor, verify=verify, carry=carry, resume=resume, elsewhere=elsewhere
        )


def _execute(
    plan: Plan,
    inputs: PlanInputs,
    output: Output,
    report_bytes: Progress,
    editor: PlanEditor | None,
    *,
    verify: bool,
    carry: bool,
    resume: bool,
    elsewhere: Elsewhere | None,
) -> Written:
    roles = inputs.roles
    if resume:
        from ckptkit.plans.writing.finished_shards import refuse_to_resume

        refuse_to_resume(plan, output, roles)
    refuse_replacing_inputs(output, roles, "" if editor is None else plan.edited_role)
    output = replace(output, before=_prepared_target(output).before)  # before any value is read
    inputs.refuse_different_bytes()
    carried = _carried(plan, output, roles, carry=carry)
    if verify:
        from ckptkit.plans.writing.damage import refuse_damage

        refuse_damage(plan.steps, roles)
    if output.is_directory:
        from ckptkit.plans.writing.directories import write_directory

        written, verified = write_directory(
            plan, output, inputs, report_bytes, carried=carried, verify=verify, resume=resume, elsewhere=elsewhere
        )
    else:
        written, verified = write_file(plan, output, inputs, report_bytes, editor, carried=carried, verify=verify)
    alone = next((result for result in verified if result.alone), None)
    return replace(
        written,
        untied=written.untied if output.format == "torch" else tuple(find_broken_ties(plan)),
        losses=inputs.losses(),
        extracted=tuple(inputs.producer.extracted.values()),
        merged=inputs.merged(),
        verified=verified[0].reader if verified and alone is None else None,
        read_back=None if alone is None else alone.alone,
        carried=carried.names,
        adapted=carried.adapted,
        plan=_with_kept_entries(plan, output, roles, editor, carried),
    )


def _editor(plan: Plan, output: Output, roles: Mapping[str, Checkpoint]) -> PlanEditor | None:
    """Return the editor of the torch file that the output copies, or None if the output holds only tensors."""
    if output.format != "torch":
        return None
    from ckptkit.plans.edit_torch import editor_for

    return editor_for(plan, output, roles)
