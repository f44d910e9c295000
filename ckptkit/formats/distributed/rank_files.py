"""Join the files of several ranks, which saved one state_dict of DTensors, as FSDP2 and verl do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, quoted
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import codes
from ckptkit.formats.distributed.file_names import RankFiles
from ckptkit.formats.distributed.parts import (
    JoinedTensor,
    Part,
    check_same_keys,
    checksum_of,
    join_blocks,
    joined_checkpoint,
    open_part,
)
from ckptkit.formats.file_pool import FilePool
from ckptkit.formats.layout import Block, check_cover, step_budget
from ckptkit.formats.torch.checkpoint import build_checkpoint
from ckptkit.formats.torch.dtensor import DTENSOR, DTensorLayout, Mesh, piece_of, ranks_without_copies, read_layout
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.tree import children
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_rank_files"]

_COPY_AGAIN = "copy the whole directory again"
_CONVERT = "load it with as many ranks as saved it, and save full_tensor() of each parameter"


def open_rank_files(directory: str, files: RankFiles, selection: Selection = WEIGHTS) -> Checkpoint | None:
    """Return the Checkpoint of the whole tensors, or None if the first file holds no piece of a DTensor.

    Values that are equal on several ranks are read from the first of them. Raises ``FormatError`` if the file of a rank
    is missing, if the files do not belong together, and for a placement that is not read.
    """
    pool = FilePool(directory)
    try:
        first = min(files.names)
        try:
            parts = {first: open_part(pool, files.names[first], selection)}
        except FormatError:
            pool.close()
            return None  # the caller reports the error if the file is the only one
        if all(info.kind != DTENSOR for info in parts[first].checkpoint.values()):
            pool.close()
            return None
        files.check_complete()
        for rank in sorted(files.names):
            parts[rank] = parts.get(rank) or open_part(pool, files.names[rank], selection)
        return _join(pool, {rank: _Rank.of(rank, part) for rank, part in parts.items()})
    except BaseException as error:
        pool.close()
        if isinstance(error, CkptkitError) and error.path is None:
            error.path = directory
        raise


@dataclass(frozen=True, slots=True)
class _Rank:
    """The file of one rank: the tensors as the pickle describes them, and a Checkpoint of their local tensors."""

    number: int
    part: Part
    tensors: Mapping[str, TensorRef]
    local: Checkpoint
    meshes: dict[int, Mesh]

    @classmethod
    def of(cls, number: int, part: Part) -> _Rank:
        tensors = dict(_tensors_by_key(part))
        local = {key: tensor.local or tensor for key, tensor in tensors.items()}
        path = part.checkpoint.path
        return cls(number, part, tensors, build_checkpoint(replace(part.file, tree=local), path=path), {})

    def layout(self, key: str) -> DTensorLayout:
        """Return the layout of a DTensor. Raises ``FormatError`` if another rank saved the DTensor."""
        try:
            layout = read_layout(self.tensors[key], self.number, self.meshes)
        except FormatError as error:
            raise FormatError(
                f"{quoted(key)} is a DTensor with {error.reason}", hint=_CONVERT, path=self.part.checkpoint.path
            ) from None
        if layout.mesh.own not in (None, self.number):
            raise FormatError(
                f"the name says rank {self.number}, but rank {layout.mesh.own} saved {quoted(key)}",
                hint=_COPY_AGAIN,
                path=self.part.checkpoint.path,
            )
        return layout


def _tensors_by_key(part: Part) -> Iterator[tuple[str, TensorRef]]:
    nested = part.checkpoint.nested
    for key, path in nested.paths.items() if nested is not None else ():
        value = nested.value if nested is not None else None
        for step in path:
            value = children(value).get(step)
        if isinstance(value, TensorRef):
            yield key, value


def _join(pool: FilePool, ranks: Mapping[int, _Rank]) -> Checkpoint:
    parts = [rank.part for rank in ranks.values()]
    check_same_keys(parts)
    steps = step_budget(len(parts) * len(parts[0].checkpoint))
    tensors: dict[str, JoinedTensor] = {}
    different: list[str] = []
    for key, info in parts[0].checkpoint.items():
        if info.kind == DTENSOR:
            tensors[key] = _join_pieces(key, info, ranks, steps)
            continue
        tensors[key] = _first_copy(key, parts)
        checksums = {checksum_of(part, key) for part in parts} - {None}
        if len(checksums) > 1:
            different.append(key)
    warnings = []
    if different:
        text = f"{listed(different, 3)} differ between the ranks: the values of rank {min(ranks)} are read"
        warnings.append(ReaderWarning(text, codes.RANKS_DIFFER))
    return joined_checkpoint(pool, parts, tensors, "dtensor torch-zip", *warnings)


def _first_copy(key: str, parts: Sequence[Part]) -> JoinedTensor:
    info = parts[0].checkpoint[key]
    for part in parts[1:]:
        if (found := part.checkpoint[key]).shape != info.shape or found.kind != info.kind:
            raise FormatError(
                f"{quoted(key)} is {info} in {parts[0].name}, but {found} in {part.name}", hint=_COPY_AGAIN
            )
    return JoinedTensor(replace(info, view=None), partial(parts[0].checkpoint.payload, key))


def _join_pieces(key: str, info: TensorInfo, ranks: Mapping[int, _Rank], steps: list[int]) -> JoinedTensor:
    first = ranks[min(ranks)]
    layout = first.layout(key)
    _check_same_tensor(key, first, ranks)
    missing = [rank for rank in layout.mesh.ranks if rank not in ranks]
    if missing:
        raise FormatError(
            f"{quoted(key)} is split among {len(layout.mesh.ranks):,} ranks, and the files of some are missing: "
            f"{listed([f'rank {rank}' for rank in missing], 4, show=str)}",
            hint=_COPY_AGAIN,
        )
    blocks = []
    for number, coordinate in ranks_without_copies(layout):
        rank = ranks[number]
        if rank is not first and rank.layout(key) != replace(layout, mesh=replace(layout.mesh, own=_own(rank, key))):
            raise FormatError(
                f"{quoted(key)} has another mesh or placement in {rank.part.name} than in {first.part.name}",
                hint="the directory holds files of two saves",
            )
        box = piece_of(layout, coordinate)
        found = rank.local[key]
        if found.shape != box.sizes or found.kind != "dense" or DTYPES[found.dtype].bits < 8:
            raise FormatError(
                f"{quoted(key)}: {rank.part.name} holds {found}, but the placements give rank {number} the shape "
                f"{list(box.sizes)}",
                hint=_CONVERT,
            )
        blocks.append(Block(box, partial(rank.local.payload, key)))
    check_cover(key, info.shape, [block.box for block in blocks], steps)
    return join_blocks(replace(info, kind="dense", view=None, dtype=first.local[key].dtype), blocks)


def _own(rank: _Rank, key: str) -> int | None:
    return rank.layout(key).mesh.own


def _check_same_tensor(key: str, first: _Rank, ranks: Mapping[int, _Rank]) -> None:
    expected = first.part.checkpoint[key]
    for rank in ranks.values():
        found = rank.part.checkpoint[key]
        if found.kind != DTENSOR or found.shape != expected.shape or rank.tensors[key].local is None:
            raise FormatError(
                f"{quoted(key)} is {expected} in {first.part.name}, but {found} in {rank.part.name}",
                hint="the directory holds files of two saves",
            )
        if rank.local[key].dtype != first.local[key].dtype:
            raise FormatError(f"{quoted(key)} has another dtype in {rank.part.name} than in {first.part.name}")
