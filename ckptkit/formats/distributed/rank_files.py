"""Join the files of several ranks, which saved one state_dict of DTensors (FSDP2, verl) or ShardedTensors (FSDP1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.source import Folder
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, quoted
from ckptkit.errors import FormatError
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
from ckptkit.formats.layout import Block, Box, check_cover, step_budget
from ckptkit.formats.torch.checkpoint import build_checkpoint
from ckptkit.formats.torch.dtensor import DTENSOR, DTensorLayout, Mesh, piece_of, ranks_without_copies, read_layout
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.sharded_tensor import SHARDED, Shard, read_shards
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_rank_files"]

_MOST_SHARDS = 200_000  # in one file
_COPY_AGAIN = "copy the whole directory again"
_TWO_SAVES = "the directory holds files of two saves"
_CONVERT = "load it with as many ranks as saved it, and save full_tensor() of each parameter"


def open_rank_files(folder: Folder, files: RankFiles, selection: Selection = WEIGHTS) -> Checkpoint | None:
    """Return the Checkpoint of the whole tensors, or None if the first file holds no piece of a DTensor.

    Values that are equal on several ranks are read from the first of them. Raises ``FormatError`` if the file of a rank
    is missing, if the files do not belong together, and for a placement that is not read.
    """
    pool = FilePool(folder)
    folder.will_open([files.names[rank] for rank in sorted(files.names)])
    with pool.closed_on_error():
        first = min(files.names)
        try:
            parts = {first: open_part(pool, files.names[first], selection)}
        except FormatError:
            pool.close()
            return None  # the caller reports the error if the file is the only one
        if all(info.kind not in (DTENSOR, SHARDED) for info in parts[first].checkpoint.values()):
            pool.close()
            return None
        files.check_complete()
        for rank in sorted(files.names):
            parts[rank] = parts.get(rank) or open_part(pool, files.names[rank], selection)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        return _join(pool, {rank: _Rank.of(rank, part, known) for rank, part in sorted(parts.items())})


@dataclass(frozen=True, slots=True)
class _Rank:
    """The file of one rank: its tensors as the pickle describes them, and a Checkpoint of the pieces in the file.

    ``shards`` has the pieces of each ShardedTensor. ``known`` has the ranks of each mesh once, for all files.
    """

    number: int
    part: Part
    tensors: Mapping[str, TensorRef]
    shards: Mapping[str, list[Shard]]
    local: Checkpoint
    meshes: dict[int, Mesh]
    known: dict[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, number: int, part: Part, known: dict[tuple[int, ...], tuple[int, ...]]) -> _Rank:
        tensors = dict(_tensors_by_key(part))
        path = part.checkpoint.path
        shards: dict[str, list[Shard]] = {}
        left = _MOST_SHARDS
        for key, tensor in tensors.items():
            if tensor.kind == SHARDED:
                try:
                    shards[key] = read_shards(tensor)
                except FormatError as error:
                    raise FormatError(f"{quoted(key)} is a ShardedTensor with {error.reason}", path=path) from None
                left -= len(shards[key])
                if left < 0:
                    raise FormatError(f"holds more than {_MOST_SHARDS:,} shards of ShardedTensors", path=path)
        local = {_local_name(key, 0): tensor.local or tensor for key, tensor in tensors.items()}
        local |= {
            _local_name(key, number): shard.tensor
            for key in shards
            for number, shard in enumerate(shards[key], start=1)
        }
        return cls(
            number, part, tensors, shards, build_checkpoint(replace(part.file, tree=local), path=path), {}, known
        )

    def layout(self, key: str) -> DTensorLayout:
        """Return the layout of a DTensor. Raises ``FormatError`` if another rank saved the DTensor."""
        try:
            layout = read_layout(self.tensors[key], self.number, self.meshes)
        except FormatError as error:
            raise FormatError(
                f"{quoted(key)} is a DTensor with {error.reason}", hint=_CONVERT, path=self.part.checkpoint.path
            ) from None
        mesh = layout.mesh
        if mesh.own not in (None, self.number):
            raise FormatError(
                f"the name says rank {self.number}, but rank {mesh.own} saved {quoted(key)}",
                hint=_COPY_AGAIN,
                path=self.part.checkpoint.path,
            )
        # One tuple for equal ranks makes comparing the meshes of a thousand files fast.
        return replace(layout, mesh=replace(mesh, ranks=self.known.setdefault(mesh.ranks, mesh.ranks)))


def _local_name(key: str, number: int) -> str:
    return f"{number} {key}"


def _tensors_by_key(part: Part) -> Iterator[tuple[str, TensorRef]]:
    nested = part.checkpoint.nested
    for key, path in nested.paths.items() if nested is not None else ():
        value = nested.value if nested is not None else None
        for step in path:
            value = _child(value, step)
        if isinstance(value, TensorRef):
            yield key, value


def _child(value: object, step: object) -> object:
    if isinstance(value, list | tuple) and isinstance(step, int):
        return value[step]
    return value.get(step) if isinstance(value, Mapping) else None


def _join(pool: FilePool, ranks: Mapping[int, _Rank]) -> Checkpoint:
    parts = [rank.part for rank in ranks.values()]
    infos = parts[0].checkpoint
    flat = next((key for key in infos if key.endswith("flat_param") and infos[key].kind == SHARDED), None)
    if flat is not None:
        raise FormatError(
            f"{quoted(flat)} is a flat parameter of FSDP1 (LOCAL_STATE_DICT), without the names of its parameters",
            hint="save with StateDictType.FULL_STATE_DICT, or with torch.distributed.checkpoint",
        )
    check_same_keys(parts)
    steps = step_budget(len(parts) * len(infos))
    tensors: dict[str, JoinedTensor] = {}
    different: list[str] = []
    for key, info in infos.items():
        if info.kind == DTENSOR:
            tensors[key] = _join_pieces(key, info, ranks, steps)
            continue
        if info.kind == SHARDED:
            tensors[key] = _join_shards(key, info, ranks, steps)
            continue
        tensors[key] = _first_copy(key, parts)
        checksums = {checksum_of(part, key) for part in parts} - {None}
        if len(checksums) > 1:
            different.append(key)
    warnings = []
    if different:
        text = f"{listed(different, 3)} differ between the ranks: the values of rank {min(ranks)} are read"
        warnings.append(ReaderWarning(text, codes.RANKS_DIFFER))
    form = "dtensor" if any(info.kind == DTENSOR for info in infos.values()) else "sharded-tensor"
    return joined_checkpoint(pool, parts, tensors, f"{form} torch-zip", *warnings)


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
        if rank is not first and not _is_same_layout(rank.layout(key), layout):
            raise FormatError(
                f"{quoted(key)} has another mesh or placement in {rank.part.name} than in {first.part.name}",
                hint=_TWO_SAVES,
            )
        box = piece_of(layout, coordinate)
        blocks.append(_block(key, rank, 0, box))
    check_cover(key, info.shape, [block.box for block in blocks], steps)
    return join_blocks(replace(info, kind="dense", view=None, dtype=first.local[_local_name(key, 0)].dtype), blocks)


def _join_shards(key: str, info: TensorInfo, ranks: Mapping[int, _Rank], steps: list[int]) -> JoinedTensor:
    """Return a ShardedTensor, joined by the offsets that each file states for its pieces."""
    first = ranks[min(ranks)]
    blocks: dict[Box, Block] = {}
    for rank in ranks.values():
        found = rank.part.checkpoint[key]
        if (found.kind, found.shape) != (info.kind, info.shape):
            raise FormatError(
                f"{quoted(key)} is {info} in {first.part.name}, but {found} in {rank.part.name}", hint=_TWO_SAVES
            )
        for number, shard in enumerate(rank.shards[key], start=1):
            if shard.box not in blocks:  # in hybrid sharding, several ranks hold equal pieces
                blocks[shard.box] = _block(key, rank, number, shard.box, info.dtype)
    try:
        check_cover(key, info.shape, list(blocks), steps)
    except FormatError as error:
        raise FormatError(error.reason, hint=_COPY_AGAIN) from None
    return join_blocks(replace(info, kind="dense", view=None), blocks.values())


def _block(key: str, rank: _Rank, number: int, box: Box, dtype: str = "") -> Block:
    """Return a piece that a file holds, after comparing its shape with the shape that the layout gives the rank."""
    name = _local_name(key, number)
    found = rank.local[name]
    if found.shape != box.sizes or found.kind != "dense" or DTYPES[found.dtype].bits < 8:
        raise FormatError(
            f"{quoted(key)}: {rank.part.name} holds {found}, but the layout gives rank {rank.number} the shape "
            f"{list(box.sizes)}",
            hint=_CONVERT,
        )
    if dtype and found.dtype != dtype:
        raise FormatError(f"{quoted(key)} is {dtype}, but {rank.part.name} holds {found}", hint=_TWO_SAVES)
    return Block(box, partial(rank.local.payload, name))


def _is_same_layout(one: DTensorLayout, two: DTensorLayout) -> bool:
    is_same_mesh = one.mesh.ranks is two.mesh.ranks and one.mesh.shape == two.mesh.shape
    return is_same_mesh and one.shape == two.shape and one.cuts == two.cuts


def _check_same_tensor(key: str, first: _Rank, ranks: Mapping[int, _Rank]) -> None:
    expected = first.part.checkpoint[key]
    for rank in ranks.values():
        found = rank.part.checkpoint[key]
        if found.kind != DTENSOR or found.shape != expected.shape or rank.tensors[key].local is None:
            raise FormatError(
                f"{quoted(key)} is {expected} in {first.part.name}, but {found} in {rank.part.name}",
                hint=_TWO_SAVES,
            )
        name = _local_name(key, 0)
        if rank.local[name].dtype != first.local[name].dtype:
            raise FormatError(f"{quoted(key)} has another dtype in {rank.part.name} than in {first.part.name}")
