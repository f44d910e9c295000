"""``make_delta``: compare two checkpoints by digest, pack what changed, and write the patch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from ckptkit.core.arguments import require_flags, require_path, require_progress
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.checkpoint.payload import self_writing
from ckptkit.core.checkpoint.provenance import own_version
from ckptkit.core.files.places import is_url, name_of, parent_of
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.core.text import listed, quoted
from ckptkit.core.ties import first_of_ties, overlapping_tensors
from ckptkit.deltas.delta import Delta, make_result
from ckptkit.deltas.patch import Patch, Side, contents_of
from ckptkit.deltas.patch_file import PatchContents, patch_contents, read_patch
from ckptkit.deltas.planning import BASE, PATCH, patched_steps, refuse_patch
from ckptkit.digests import digests_by_key
from ckptkit.errors import ChangedError, CkptkitError, PlanError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.safetensors import layout_safetensors, write_safetensors
from ckptkit.formats.writing.atomic import output_errors
from ckptkit.formats.writing.copying import merge_extents
from ckptkit.formats.writing.outputs import output_file
from ckptkit.formats.writing.state import Target, is_wrong_output, wrong_output
from ckptkit.formats.writing.targets import prepare_side_file
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.inputs import opened_inputs
from ckptkit.plans.steps import entries_to_drop, refuse_suspicious, refuse_unread
from ckptkit.values.delta import Change, Compression, CountingSpool, Packed, Spool, pack_changes, require_compression
from ckptkit.values.sinks import NullSink
from ckptkit.values.workers import Workers

__all__ = ["make_delta"]

_ALGORITHM: Final = "sha256"
_MOST_NAMED: Final = 4
_NEW: Final = "new"


def make_delta(
    base: CheckpointLike,
    new: CheckpointLike,
    out: str | os.PathLike[str] | None = None,
    *,
    compression: Compression = "zlib",
    only_tensors: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Delta:
    """Write the patch that makes ``new`` of ``base``, with every bit of every tensor, as ``ckpt delta`` does.

    A patch has what changed, compressed, and the digest of every tensor of both sides. ``apply_delta`` makes ``new`` of
    ``base`` and the patch: its tensors, names, order, dtypes, shapes, ties, metadata and module versions. Before the
    patch gets its name, each tensor that it holds was made of it once, and had its digest.

    Args:
        base: A path, a Checkpoint, a Module or a mapping of tensors. What is opened here is closed at the end.
        new: As ``base``. The formats may differ.
        out: The path of the patch, a safetensors file. None only measures what the patch would be.
        compression: ``"zlib"``, which any Python can read, or ``"zstd"``, which needs the extra ``[fast]``.
        only_tensors: Leave out the entries of ``new`` that are not tensors, instead of an error. A patch cannot hold
            them. What is beside a mapping that the path names, such as ``run.pt::model``, is always left out.
        force: Replace an existing file.
        progress: Called with a number of bytes after each piece.

    Raises:
        ArgumentError: ``compression`` is not known, or needs a package that is not installed.
        PathError: A path cannot be read.
        FormatError: A file is not a valid checkpoint, or is a patch.
        PlanError: ``new`` has no tensor, a tensor that is not dense, or entries that are not tensors.
        ChangedError: A file changes while it is read.
        OutputError: ``out`` exists (without ``force``), is an input, or cannot be written.

    Example:
        >>> import ckptkit, os, tempfile
        >>> base, new = "fixtures/lenet_10class.pth", "fixtures/lenet_tuned.safetensors"
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     delta = ckptkit.make_delta(base, new, os.path.join(directory, "patch.safetensors"))
        >>> delta.counts["changed"], delta.share < 0.9
        (6, True)
    """
    require_compression(compression)
    require_flags(only_tensors=only_tensors, force=force)
    require_progress(progress)
    if out is not None:
        require_path(out, "out")
    with opened(base, BASE) as old, opened(new, _NEW) as latest:
        target = None
        if out is not None:
            target = prepare_side_file(os.fsdecode(out), [*old.files, *latest.files], force=force)
        left_out = _refuse_unfit(old, latest, only_tensors=only_tensors)
        return _Making(old, latest, compression, progress or (lambda _: None)).delta(target, left_out)


def _refuse_unfit(base: Checkpoint, new: Checkpoint, *, only_tensors: bool) -> list[str]:
    """Raise an error for what no patch can hold, and return the entries of ``new`` that it leaves out."""
    for checkpoint, role in ((base, BASE), (new, _NEW)):
        refuse_patch(checkpoint)
        refuse_suspicious(checkpoint, role)
    entries = [entry for entry in entries_to_drop(new) if not entry.is_file]
    wanted = [entry.path for entry in entries if not (entry.is_outside and new.is_selected)]
    if wanted and not only_tensors:
        raise PlanError(
            f"a patch holds tensors and metadata, and cannot hold {listed(list(dict.fromkeys(wanted)), _MOST_NAMED)}",
            hint="--only-tensors leaves out what is not a tensor",
            path=new.path,
        )
    try:
        refuse_unread(new, new)
    except PlanError as error:
        error.path = new.path
        error.call = "convert(new, out, skip_unread=True) leaves them out, and dequantize=True reads codes as numbers"
        raise
    if not new:
        raise PlanError("has no tensor", path=new.path)
    return list(dict.fromkeys(entry.path for entry in entries))


class _Classified(NamedTuple):
    """Which tensors of the new checkpoint have to be packed, and where all others are."""

    changed: list[str]
    whole: list[str]
    renamed: dict[str, str]
    ties: list[list[str]]


@dataclass(frozen=True, slots=True)
class _Making:
    """One run: two open checkpoints, and how the patch is made."""

    base: Checkpoint
    new: Checkpoint
    compression: Compression
    progress: Progress

    def delta(self, target: Target | None, left_out: list[str]) -> Delta:
        """Write the patch, or only measure it without a target."""
        base, new = (self._side(checkpoint) for checkpoint in (self.base, self.new))
        found = self._classified(base, new)
        name = name_of(self.base.path) if self.base.files else ""
        patch = Patch(
            base,
            new,
            frozenset(found.changed),
            frozenset(found.whole),
            tuple(map(tuple, found.ties)),
            dict(self.new.metadata),
            self.compression,
            f"ckptkit {own_version()}".rstrip(),
            found.renamed,
            dict(self.new.versions),
            name,
            self.new.format,
        )
        with output_errors("" if target is None else target.given), _spool(target) as spool, Workers() as workers:
            packed = self._packed(found, spool, workers)
            self._refuse_changes()
            contents = patch_contents(patch, packed)
            layout = layout_safetensors(contents.infos, contents.metadata)
            if target is not None:
                self._write(target, patch, contents)
            sizes = {key: payload.nbytes for key, payload in packed.items()}
        path = "" if target is None else target.given
        notes = tuple(self._notes(found))
        new_name = name_of(self.new.path) if self.new.files else ""
        return make_result(patch, sizes, layout.nbytes, path, new_name=new_name, left_out=left_out, notes=notes)

    def _side(self, checkpoint: Checkpoint) -> Side:
        infos = {key: TensorInfo(key, info.dtype, info.shape) for key, info in checkpoint.items() if _is_read(info)}
        digests = digests_by_key(checkpoint, infos, _ALGORITHM, self.progress)
        digits = {key: digests[key].partition(":")[2] for key in infos}
        return Side(infos, digits, contents_of(digits))

    def _classified(self, base: Side, new: Side) -> _Classified:
        found = _Classified([], [], {}, [])
        tied = first_of_ties(self.new.values(), self.new.span)
        groups: dict[str, list[str]] = {}
        for later, first in tied.items():
            groups.setdefault(first, [first]).append(later)
        found.ties.extend(groups.values())
        dropped = defaultdict(list)
        for key, digits in base.digests.items():
            if key not in new.infos:
                dropped[digits].append(key)
        for key, info in new.infos.items():
            if key in tied:
                continue
            digits = new.digests[key]
            if base.digests.get(key) == digits:
                continue
            if dropped.get(digits):  # two keys that are equal, but not tied, are not made of one tensor
                found.renamed[key] = dropped[digits].pop(0)
            elif key in base.infos and _have_same_rows(base.infos[key], info):
                found.changed.append(key)
            else:
                found.whole.append(key)
        return found

    def _packed(self, found: _Classified, spool: Spool, workers: Workers) -> dict[str, Packed]:
        packed: dict[str, Packed] = {}
        waiting = {*found.changed, *found.whole}
        self.progress(2 * sum(info.nbytes for key, info in self.new.items() if key not in waiting))  # not read again
        for change, made in pack_changes(self._changes(found), spool, workers, self.compression, self.progress):
            if made is None:  # its digests differ
                self._refuse_changes()
                raise ChangedError(f"{quoted(change.info.key)} changed while it was read", path=self.new.path)
            packed[change.info.key] = made
        return packed

    def _changes(self, found: _Classified) -> Iterator[Change]:
        changed, whole = set(found.changed), set(found.whole)
        for key, info in self.new.items():
            if key in changed:
                yield Change(info, self.base.payload(key), self.new.payload(key))
            elif key in whole:
                yield Change(info, None, self.new.payload(key))

    def _refuse_changes(self) -> None:
        for checkpoint in (self.base, self.new):
            checkpoint.check_unchanged(by_path=True)

    def _write(self, target: Target, patch: Patch, contents: PatchContents) -> None:
        layout = layout_safetensors(contents.infos, contents.metadata)
        with output_file(target, layout.nbytes) as file:
            for _ in write_safetensors(layout, contents.payloads, file):
                pass
            self._prove(file.complete(), target, patch)
            self._refuse_changes()

    def _prove(self, path: str, target: Target, patch: Patch) -> None:
        """Read the patch back, and make of it each tensor that it holds; a patch that does not make them is removed."""
        try:
            with open_checkpoint(path) as written:
                if read_patch(written) != patch:
                    raise wrong_output("the patch was not written as planned", target.given)
                with pause_gc():
                    steps = [step for step in patched_steps(patch) if step.sources[-1].role == PATCH]
                if not steps:
                    return
                with opened_inputs(steps, {BASE: self.base, PATCH: written}) as inputs:
                    for payload in merge_extents(inputs.payload(step.out) for step in steps):
                        computed = self_writing(payload)
                        for _ in () if computed is None else computed.write_to(NullSink(), 0):
                            pass
        except CkptkitError as error:
            if isinstance(error, ChangedError) or is_wrong_output(error):
                raise
            self._refuse_changes()
            raise wrong_output(f"the patch does not make the new checkpoint: {error.reason}", target.given) from error

    def _notes(self, found: _Classified) -> Iterator[str]:
        together = {frozenset(group) for group in found.ties}
        for infos in overlapping_tensors(self.new.values()):
            keys = [info.key for info in infos]
            if frozenset(keys) not in together:
                yield f"{listed(keys, _MOST_NAMED)} overlap in memory, and will be apart in what the patch makes"
        nested = self.new.nested
        odd = [key for key, path in nested.paths.items() if path != (key,)] if nested is not None else []
        if odd:
            names = listed(odd, _MOST_NAMED)
            yield f"{names} will be plain names in what the patch makes: in new they are nested, or not text"
        unread = [info.key for info in self.base.values() if not _is_read(info)]
        if unread:
            yield f"a patch does not compare tensors of the base without plain bytes: {listed(unread, _MOST_NAMED)}"
        if not set(self.base) & set(self.new) and not found.renamed:
            yield "no tensor has the same name on both sides; ckpt align BASE NEW finds the rules that rename one side"


def _spool(target: Target | None) -> Spool:
    """Return where the packed bytes wait: beside the patch, since the file system there has space for them."""
    if target is None:
        return CountingSpool()
    return Spool(None if is_url(target.path) else parent_of(target.path) or ".")


def _have_same_rows(old: TensorInfo, info: TensorInfo) -> bool:
    """Return whether the elements of two tensors are at the same places, also where one has more rows."""
    if not old.nbytes and not info.nbytes:
        return False  # they have no bytes, and other shapes
    return old.dtype == info.dtype and old.shape[1:] == info.shape[1:] and len(old.shape) == len(info.shape)


def _is_read(info: TensorInfo) -> bool:
    return info.kind == "dense"
