"""Outputs of one file, which is read back before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.files.payloads import announce
from ckptkit.core.files.places import name_of, parent_of
from ckptkit.core.progress import Progress
from ckptkit.errors import CkptkitError, OutputError, PathError
from ckptkit.formats import errors_about, open_inside
from ckptkit.formats.safetensors import layout_safetensors, share_blocks, write_safetensors
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.outputs import output_file, writes_in_order
from ckptkit.formats.writing.reflink import Reflink, shared_block
from ckptkit.formats.writing.state import wrong_output
from ckptkit.formats.writing.targets import prepare_target
from ckptkit.plans.carried import Carried, target_of, write_carried
from ckptkit.plans.inputs import PlanInputs
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan, find_broken_ties
from ckptkit.plans.writing.written import Written
from ckptkit.wrappers.envelopes import Selection

if TYPE_CHECKING:
    from ckptkit.formats.torch.write import BlockOf, TorchZipLayout
    from ckptkit.plans.edit_torch import PlanEditor
    from ckptkit.plans.verify import Verification

__all__ = ["has_tensors", "write_file", "write_safetensors_file"]


def write_file(
    plan: Plan,
    output: Output,
    inputs: PlanInputs,
    progress: Progress,
    editor: PlanEditor | None,
    *,
    carried: Carried,
    verify: bool,
) -> tuple[Written, list[Verification]]:
    """Write a safetensors or a torch file, and return what was written and what ``verify`` found."""
    target = prepare_target(output.path, force=output.force, before=output.before)
    infos = [step.out for step in plan.steps]
    verified: list[Verification] = []

    def side_file(name: str, size: int, *, by_kernel: bool = True) -> OutputFile | None:
        place = target_of(carried, name, parent_of(output.path), force=output.force)
        return None if place is None else output_file(place, size, by_kernel=by_kernel)

    def ready() -> None:
        inputs.refuse_overflow()
        inputs.check_unchanged()

    if output.format == "safetensors":

        def create(size: int, block: int, *, by_kernel: bool) -> OutputFile:
            return output_file(target, size, block, by_kernel=by_kernel)

        def finish(path: str) -> None:
            if verify:
                from ckptkit.plans.verify import verify_safetensors

                verified.append(
                    verify_safetensors(path, output.path, plan.steps, plan.metadata, inputs.producer.again())
                )
                inputs.check_unchanged()
            write_carried(carried, side_file, output)

        size, shared = write_safetensors_file(
            create,
            infos,
            plan.metadata,
            inputs,
            progress,
            place=target.path,
            reflink=output.reflink,
            ready=ready,
            finish=finish,
        )
        return Written(output.path, output.format, len(plan.steps), size, (target.path,), shared=shared), verified
    from ckptkit.formats.torch.write import write_torch_zip

    def block(payloads: Iterable[Payload]) -> int:
        return shared_block(payloads, target.path, output.reflink)

    layout = _torch_layout(infos, plan, inputs, editor, block, in_order=writes_in_order(target.path))
    inner = "" if editor is None else inputs.roles[plan.edited_role].envelope
    with output_file(target, layout.nbytes, layout.block, by_kernel=output.reflink != "never") as file:
        for count in write_torch_zip(layout, file):
            progress(count)
        ready()
        path = file.complete()
        found = _read_back(path, file, infos, inner)
        if verify:
            from ckptkit.plans.verify import verify_torch

            verified.append(verify_torch(path, output.path, plan.steps, inputs.producer.again(), inner))
            inputs.check_unchanged()
        write_carried(carried, side_file, output)
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


class Create(Protocol):
    """A function that returns a new file of a number of bytes, as ``output_file`` does."""

    def __call__(self, size: int, block: int, *, by_kernel: bool) -> OutputFile:
        """Return the file, which is not open yet."""
        ...


def write_safetensors_file(
    create: Create,
    infos: Sequence[TensorInfo],
    metadata: Mapping[str, str],
    inputs: PlanInputs,
    progress: Progress,
    *,
    place: str,
    reflink: Reflink,
    ready: Callable[[], None] = lambda: None,
    finish: Callable[[str], None] = lambda _: None,
) -> tuple[int, int]:
    """Write one file, and return its size and how many bytes it shares with its inputs.

    ``create`` makes the file, in the directory of ``place``. ``ready`` is called after the last byte was written, and
    ``finish`` with a path of the complete file.
    """
    layout = layout_safetensors(infos, metadata)
    payloads = {info.key: inputs.payload(info) for info in infos}
    announce(payloads.values())
    block = shared_block(payloads.values(), place, reflink)
    layout = share_blocks(layout, payloads, block)
    with create(layout.nbytes, block, by_kernel=reflink != "never") as file:
        for count in write_safetensors(layout, payloads, file):
            progress(count)
        ready()
        path = file.complete()
        if path:
            _read_back(path, file, infos)
            finish(path)
    return layout.nbytes, file.shared


def _torch_layout(
    infos: Sequence[TensorInfo],
    plan: Plan,
    inputs: PlanInputs,
    editor: PlanEditor | None,
    block: BlockOf,
    *,
    in_order: bool,
) -> TorchZipLayout:
    from ckptkit.formats.torch.write import assign_records, layout_torch_zip

    viewed = inputs.with_views(infos)
    if editor is None:
        return layout_torch_zip(viewed, inputs.payload, inputs.span, plan.versions, block, in_order=in_order)
    changed = {step.out.key for step in editor.changed}
    records, stored = assign_records([info for info in viewed if info.key in changed], inputs.payload, inputs.span)
    with errors_about(inputs.roles[plan.edited_role].path):
        return editor.layout(stored, records, block, in_order=in_order)


def _read_back(path: str, file: OutputFile, infos: Sequence[TensorInfo], inner: str = "") -> Mapping[str, TensorInfo]:
    """Return the tensors of a written file; one that does not read back as planned does not stay."""
    try:
        with open_inside(path, Selection(inner)) as written:
            as_planned, found = has_tensors(written, infos), dict(written.items())
    except CkptkitError as error:
        reason = f"could not be read back: {error.reason}"
        # A store that does not answer says nothing about the file.
        failure = OutputError if isinstance(error, PathError) else wrong_output
        raise failure(reason, path=file.target) from error
    if not as_planned:
        raise wrong_output("was not written as planned", file.target)
    return found


def has_tensors(written: Checkpoint, infos: Iterable[TensorInfo], names: Iterable[str] | None = None) -> bool:
    """Return whether a checkpoint has exactly these tensors, all of them in files with these names."""
    wanted = {info.key: info for info in infos}
    found = zip(map(wanted.get, written), written.values(), strict=True)
    are_as_wanted = len(wanted) == len(written) and all(
        info is not None and info.dtype == there.dtype and info.shape == there.shape for info, there in found
    )
    files = {name_of(file) for file in written.files}
    return are_as_wanted and (names is None or files <= set(names))
