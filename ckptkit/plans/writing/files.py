"""Outputs of one file, which is read back before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint, Payload, TensorInfo
from ckptkit.core.files.payloads import announce
from ckptkit.core.progress import Progress
from ckptkit.errors import CkptkitError, OutputError
from ckptkit.formats import errors_about, open_inside
from ckptkit.formats.safetensors import layout_safetensors, share_blocks, write_safetensors
from ckptkit.formats.writing.atomic import (
    AtomicFile,
    Target,
    prepare_target,
)
from ckptkit.formats.writing.reflink import Reflink, shared_block
from ckptkit.plans.carried import Carried, write_carried
from ckptkit.plans.inputs import PlanInputs
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan, find_broken_ties
from ckptkit.plans.writing.written import Written
from ckptkit.wrappers.envelopes import Selection

if TYPE_CHECKING:
    from ckptkit.formats.torch.write import BlockOf, TorchZipLayout
    from ckptkit.plans.edit_torch import PlanEditor
    from ckptkit.plans.verify import Verification

__all__ = ["has_tensors", "write_file", "write_safetensors_file", "write_small"]


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

        size, shared = write_safetensors_file(
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


def write_safetensors_file(
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
    announce(payloads.values())
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
            as_planned, found = has_tensors(written, infos), dict(written.items())
    except CkptkitError as error:
        raise OutputError(
            f"could not be read back, so the new file was deleted: {error.reason}", path=file.target
        ) from error
    if not as_planned:
        raise OutputError("was not written as planned, so the new file was deleted", path=file.target)
    return found


def has_tensors(written: Checkpoint, infos: Iterable[TensorInfo], names: Iterable[str] | None = None) -> bool:
    """Return whether a checkpoint has exactly these tensors, all of them in files with these names."""
    wanted = {info.key: info for info in infos}
    found = zip(map(wanted.get, written), written.values(), strict=True)
    are_as_wanted = len(wanted) == len(written) and all(
        info is not None and info.dtype == there.dtype and info.shape == there.shape for info, there in found
    )
    files = {os.path.basename(file) for file in written.files}
    return are_as_wanted and (names is None or files <= set(names))


def write_small(path: str, data: bytes) -> None:
    """Write a file of few bytes."""
    with AtomicFile(path, len(data)) as file:
        file.write(data, 0)
