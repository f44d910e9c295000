"""Read the safetensors form of DCP: each rank writes its own files, with the offset of each chunk in its tensor.

The format records neither the full shapes nor the number of ranks (``-of-00002`` counts the files of one rank). A
missing file is found only by a gap between chunks, or a gap in the file numbers. The consolidation of DCP itself fills
such a gap with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, TensorInfo
from ckptkit.core.config_files import parse_json
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.places import join
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.source import Folder
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, quoted
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.distributed.file_names import DCP_SHARD
from ckptkit.formats.foreign import refuse_selection
from ckptkit.formats.layout import Block, BlockTensor, Box, check_cover, step_budget
from ckptkit.formats.safetensors import open_safetensors
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_dcp_safetensors"]

_INFO, _VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
_KNOWN_VERSION = "1.0"


class _Shard(NamedTuple):
    rank: int  # counted from 1
    model: int  # number of the file among the files of the rank
    total: int
    name: str


@dataclass(frozen=True, slots=True)
class _Piece:
    file: Checkpoint
    info: TensorInfo
    box: Box


def open_dcp_safetensors(folder: Folder, names: Iterable[str], selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint of the whole tensors in a directory of unconsolidated shards.

    Raises ``FormatError`` with the missing rows, or the number of the missing shard. A missing last shard cannot be
    detected, and a warning says so.
    """
    directory = folder.path
    refuse_selection(selection, directory)
    found = [match for name in names if (match := DCP_SHARD.fullmatch(name))]
    shards = sorted(_Shard(int(match[1]), int(match[2]), int(match[3]), match[0]) for match in found)
    if not shards:
        raise FormatError("holds no shard of a distributed checkpoint", path=directory)
    numbers = {shard.rank for shard in shards}
    missing = _missing(numbers, "shard-{:05}-*.safetensors")
    pool = FilePool(folder)
    folder.will_open([shard.name for shard in shards])
    try:
        files = [_open_shard(pool, shard.name) for shard in shards]
        infos, opened = _join([piece for file in files for piece in _pieces(file)], missing, directory)
        _check_numbers(shards, missing, directory)
    except BaseException:
        pool.close()
        raise

    def payload(info: TensorInfo) -> Payload:
        return opened[info.key]()

    warnings = list(dict.fromkeys(text for file in files for text in file.warnings))
    text = f"{plural(len(numbers), 'shard')} joined; a missing last shard cannot be noticed: "
    warnings.append(
        ReaderWarning(f"{text}this form of DCP records neither their number nor whole shapes", codes.UNCOUNTED)
    )
    versions = (file.metadata.get(_VERSION) for file in files)
    version = next((other for other in versions if other != _KNOWN_VERSION), _KNOWN_VERSION)
    if version != _KNOWN_VERSION:
        warnings.append(f"written in version {quoted(str(version))} of the form; {_KNOWN_VERSION} is supported")
    return Checkpoint(
        infos,
        Access(
            payload,
            payload,
            records=lambda: chain.from_iterable(file.records() for file in files),
            check=pool.check_unchanged,
            close=pool.close,
        ),
        Description(
            directory,
            f"dcp safetensors ({plural(len(numbers), 'shard')})",
            files=[file.path for file in files],
            metadata={
                key: text for file in files for key, text in file.metadata.items() if key not in (_INFO, _VERSION)
            },
            warnings=warnings,
        ),
    )


def _missing(numbers: set[int], pattern: str) -> str:
    largest = max(numbers)
    gaps = list(islice((number for number in range(1, largest) if number not in numbers), 4))
    others = largest - 1 - sum(0 < number < largest for number in numbers) - len(gaps)
    return ", ".join(map(pattern.format, gaps)) + (f" and {others} more" if others else "")


def _check_numbers(shards: Sequence[_Shard], missing: str, directory: str) -> None:
    totals = sorted({shard.total for shard in shards})
    if len(totals) > 1:
        raise FormatError(f"shards of two saves: some count {totals[0]} files, some {totals[1]}", path=directory)
    if missing:
        # A tensor that is not split is in one shard only, so no other shard shows that the tensor is missing.
        raise FormatError(f"{missing} is missing", hint="copy the whole directory again", path=directory)
    present = {shard.model for shard in shards}
    absent = _missing(present | {totals[0] + 1}, "model-{:05}")
    if absent or max(present) > totals[0]:
        what = f"no shard holds {absent}" if absent else f"a shard holds model-{max(present):05}"
        raise FormatError(f"{what} of {totals[0]}", hint="copy the whole directory again", path=directory)


def _open_shard(pool: FilePool, name: str) -> Checkpoint:
    try:
        return open_safetensors(pool.get(name))
    except FormatError as error:
        error.path = error.path or join(pool.folder.path, name)
        raise


def _pieces(file: Checkpoint) -> list[_Piece]:
    if _INFO not in file.metadata:
        raise FormatError(f"is named like a shard of a distributed checkpoint, but has no {_INFO}", path=file.path)
    try:
        table = parse_json(file.metadata[_INFO].encode("utf-8", "surrogatepass"), _INFO)
    except FormatError as error:
        raise FormatError(error.reason, path=file.path) from None
    absent = sorted(table.keys() - file.keys())
    if absent:
        raise FormatError(f"{_INFO} names {quoted(absent[0])}, which the shard does not hold", path=file.path)
    return [_Piece(file, info, _box(info, table.get(info.key), file.path)) for info in file.values()]


def _box(info: TensorInfo, entry: object, path: str) -> Box:
    offsets = entry.get("saved_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != len(info.shape):
        raise FormatError(f"{quoted(info.key)}: {_INFO} has no saved_offsets of {plural(len(info.shape), 'number')}",
                          path=path)  # fmt: skip
    if any(type(offset) is not int or not 0 <= offset < 2**62 for offset in offsets):
        raise FormatError(f"{quoted(info.key)}: the saved_offsets {str(offsets)[:80]} are not valid offsets", path=path)
    return Box(tuple(offsets), info.shape)


def _join(
    pieces: list[_Piece], missing: str, directory: str
) -> tuple[dict[str, TensorInfo], Mapping[str, Callable[[], Payload]]]:
    by_key: dict[str, list[_Piece]] = {}
    for piece in pieces:
        by_key.setdefault(piece.info.key, []).append(piece)
    infos: dict[str, TensorInfo] = {}
    opened: dict[str, Callable[[], Payload]] = {}
    steps = step_budget(len(pieces))
    for key, parts in by_key.items():
        first = parts[0].info
        for part in parts:
            if part.info.dtype != first.dtype or len(part.info.shape) != len(first.shape):
                raise FormatError(f"{quoted(key)}: {part.info} here, {first} in another shard", path=part.file.path)
        shape = tuple(max(ends) for ends in zip(*map(_ends, parts), strict=True))
        bits = DTYPES[first.dtype].bits
        if bits < 8 and len(parts) > 1:
            raise FormatError(f"{quoted(key)}: {first.dtype} in several shards is not read", path=directory)
        try:
            check_cover(key, shape, [part.box for part in parts], steps)
        except FormatError as error:
            hint = f"{missing} is missing" if missing else "copy the whole directory again"
            raise FormatError(error.reason, hint=hint, path=directory) from None
        infos[key] = TensorInfo(key, first.dtype, shape)
        blocks = tuple(Block(part.box, partial(part.file.payload, key)) for part in parts if 0 not in part.box.sizes)
        opened[key] = blocks[0].open if len(blocks) == 1 else partial(BlockTensor, shape, max(bits // 8, 1), blocks)
    return infos, opened


def _ends(part: _Piece) -> list[int]:
    return [offset + size for offset, size in zip(*part.box, strict=True)]
