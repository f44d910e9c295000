"""A directory of shards with an index: ``weight_map`` says which file holds which tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import PureWindowsPath
from typing import Any

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Payload, Record, TensorInfo
from ckptkit.core.files import LocalFile
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats import codes
from ckptkit.formats.safetensors import parse_json

__all__ = [
    "INDEX_SUFFIXES",
    "Shard",
    "find_index",
    "is_output_shard_name",
    "is_plain_name",
    "is_shard_name",
    "link_warnings",
    "open_sharded",
    "split_into_shards",
    "weight_index",
]


INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json", ".pt.index.json")
_LARGEST_INDEX = 256 << 20
_CACHE = "blobs"  # where the caches of hubs keep the files that their snapshots are links to
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin|pt)")


def find_index(names: Sequence[str]) -> str | None:
    """Return which of a directory's file names is the index to read, or None.

    With one of each kind, that of the safetensors shards. Raises ``FormatError`` where two of a kind compete.
    """
    for suffix in INDEX_SUFFIXES:
        found = sorted(name for name in names if name.endswith(suffix))
        if len(found) > 1:
            listed = ", ".join(map(printable, found[:4]))
            raise FormatError(f"holds {len(found)} indexes: {listed}", hint="give the path of the one meant")
        if found:
            return found[0]
    return None


def open_sharded(
    directory: str, index_name: str, open_shard: Callable[[str], Checkpoint], *, whole: bool
) -> Checkpoint:
    """Return one Checkpoint over every shard that the index names, each opened by ``open_shard``.

    With ``whole``, a shard beside the index that the index does not name is an error: it is usually left
    over from another save. Raises ``FormatError`` for a missing shard, a tensor in the wrong place or in
    none, and a shard name that leads out of the directory.
    """
    index_path = os.path.join(directory, index_name)
    index = _read_index(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("the index has no weight_map", path=index_path)
    shards: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        _check_name(key, name, index_name, index_path)
        shards.setdefault(name, []).append(key)
    extra = _extra(directory, shards)
    if whole and extra:
        raise FormatError(
            f"shard {quoted(extra[0])} lies beside the index and is not named in it: left from another save?",
            hint="remove it, or give the path of the index itself to read without it",
            path=directory,
        )
    opened: dict[str, Checkpoint] = {}
    try:
        for name, keys in shards.items():
            opened[name] = _open_one(os.path.join(directory, name), keys, open_shard)
        checkpoint = _joined(directory, index_path, index, weight_map, opened)
    except BaseException:
        for shard in opened.values():
            shard.close()
        raise
    return checkpoint.with_warnings(*_odd_names(list(shards), extra))


def _read_index(path: str) -> Mapping[str, Any]:
    file = LocalFile(path)
    try:
        if file.size > _LARGEST_INDEX:
            raise FormatError(
                f"the index has {file.size:,} bytes, more than the limit of {_LARGEST_INDEX:,}", path=path
            )
        try:
            return parse_json(file.read(0, file.size), "the index")
        except FormatError as error:
            raise FormatError(error.reason, path=path) from None
    finally:
        file.close()


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` names a file of the directory itself, on every system, and leads nowhere else."""
    # Windows rules see drives, roots and both kinds of slash.
    parts = PureWindowsPath(name)
    return bool(name) and parts.name == name and not parts.drive and name not in (".", "..") and "\0" not in name


def link_warnings(directory: str, names: Iterable[str]) -> list[ReaderWarning]:
    """Return a remark where some of these files are links out of the directory; those of a hub's cache are as usual."""
    home = os.path.realpath(directory)
    found = []
    for name in names:
        path = os.path.join(directory, name)
        if os.path.islink(path):
            target = os.path.realpath(path)
            where = os.path.dirname(target)
            if where != home and os.path.basename(where) != _CACHE:
                found.append((name, target))
    if not found:
        return []
    (name, target), more = found[0], len(found) - 1
    others = f", and {plural(more, 'other')} too" if more else ""
    return [
        ReaderWarning(f"{quoted(name)} is a link out of the directory, to {quoted(target)}{others}", codes.LINK_OUTSIDE)
    ]


def _check_name(key: str, name: object, index_name: str, path: str) -> None:
    if not isinstance(name, str):
        raise FormatError(f"the index maps {quoted(key)} to a {type(name).__name__}, not to a file name", path=path)
    if not is_plain_name(name):
        raise FormatError(f"the index names the unsafe shard {quoted(name)}", path=path)
    kind = index_name.removesuffix(".index.json").rpartition(".")[2]
    if kind == "safetensors" and not name.endswith(".safetensors"):
        raise FormatError(f"an index of safetensors shards names {quoted(name)}", path=path)


def _extra(directory: str, shards: Mapping[str, object]) -> list[str]:
    """Return the shards in the directory that are called like those of the index, and that it does not name."""
    families = {match[1] for name in shards if (match := _NUMBERED.fullmatch(name))}
    suffixes = {name.rpartition(".")[2] for name in shards}
    matches = [match for name in sorted(os.listdir(directory)) if (match := _NUMBERED.fullmatch(name))]
    return [match[0] for match in matches if match[1] in families and match[4] in suffixes and match[0] not in shards]


def _odd_names(names: Sequence[str], extra: Sequence[str]) -> Iterator[ReaderWarning]:
    """Yield what the names of the shards tell of others: those that lie there, and those that should."""
    if extra:
        more = f" and {len(extra) - 1:,} more" if extra[1:] else ""
        yield ReaderWarning(
            f"shard {quoted(extra[0])}{more} lies beside the index and is not named in it", codes.STALE_SHARD
        )
    families: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        if (match := _NUMBERED.fullmatch(name)) is not None:
            families.setdefault((match[1], int(match[3]), match[4]), set()).add(int(match[2]))
    for (family, count, suffix), numbers in families.items():
        absent = next((number for number in range(1, count + 1) if number not in numbers), None)
        if absent is not None:
            lost = f"{family}-{absent:05}-of-{count:05}.{suffix}"
            yield ReaderWarning(
                f"the index names {len(numbers):,} of {count:,} shards, and not {quoted(lost)}", codes.SHARD_COUNT
            )


def _open_one(path: str, keys: list[str], open_shard: Callable[[str], Checkpoint]) -> Checkpoint:
    # A link may lead anywhere (caches link shards to their blobs): the name is plain, and what it names is only read.
    try:
        shard = open_shard(path)
    except CkptkitError as error:
        raise FormatError(
            f"{error.reason} (a shard that should hold {quoted(keys[0])})",
            hint=error.hint or (None if os.path.lexists(path) else "download or copy it again"),
            path=error.path or path,
        ) from None
    absent = [key for key in keys if key not in shard]
    extra = sorted(shard.keys() - set(keys))
    if absent or extra:
        shard.close()
        key, others = (absent or extra)[0], len(absent or extra) - 1
        more = f" and {others} more" if others else ""
        what = "the shard does not hold it" if absent else "the index does not say so"
        how = "the index places" if absent else "the shard holds"
        raise FormatError(f"{how} {quoted(key)}{more} here, but {what}", path=path)
    return shard


def _joined(
    directory: str,
    index_path: str,
    index: Mapping[str, Any],
    weight_map: Mapping[str, str],
    opened: Mapping[str, Checkpoint],
) -> Checkpoint:
    order = list(opened)
    infos: dict[str, TensorInfo] = {}
    for name, shard in opened.items():
        base = order.index(name) << 32
        for key, info in shard.items():
            view = info.view._replace(storage=info.view.storage + base) if info.view else None
            infos[key] = replace(info, view=view)
    warnings = list(dict.fromkeys(text for shard in opened.values() for text in shard.warnings))
    warnings += link_warnings(directory, order)
    folded = {name.casefold(): name for name in order}
    alike = next((name for name in order if folded[name.casefold()] != name), None)
    if alike is not None:
        other = folded[alike.casefold()]
        warnings.append(f"shards {quoted(alike)} and {quoted(other)} differ in case alone: one file on some systems")
    total = index.get("metadata", {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
    actual = sum(info.nbytes for info in infos.values())
    # Some writers count a tensor that is tied to another once, some as often as it has a key.
    once = actual - sum(infos[key].nbytes for keys in tied_keys(infos.values()) for key in keys[1:])
    if total is not None and total not in (actual, once):
        stated = str(total)[:40] if isinstance(total, int | float) else f"a {type(total).__name__} of"
        said = f"the index gives a total size of {stated} bytes, the tensors have {actual}"
        warnings.append(ReaderWarning(said, codes.TOTAL_SIZE))
    metadata: dict[str, str] = {}
    for shard in opened.values():
        metadata |= shard.metadata

    def close() -> None:
        for shard in opened.values():
            shard.close()

    def check() -> None:
        for shard in opened.values():
            shard.check_unchanged()

    def payload(info: TensorInfo) -> Payload:
        return opened[weight_map[info.key]].payload(info.key)

    def span(info: TensorInfo) -> Payload | None:
        return opened[weight_map[info.key]].span(info.key)

    def records() -> Iterable[Record]:
        return chain.from_iterable(shard.records() for shard in opened.values())

    formats = {shard.format for shard in opened.values()}
    return Checkpoint(
        infos,
        Access(payload, span, records, check, close),
        Description(
            directory,
            f"sharded {'/'.join(sorted(formats))} ({plural(len(opened), 'shard')})",
            files=[index_path, *(file for shard in opened.values() for file in shard.files)],
            entries=[entry for shard in opened.values() for entry in shard.entries],
            metadata=metadata,
            warnings=warnings,
            references=list(dict.fromkeys(name for shard in opened.values() for name in shard.references)),
            suspicious=any(shard.suspicious for shard in opened.values()),
        ),
    )


_INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_PART = re.compile(r".+-\d{5}-of-\d{5}\.\w+|.+\.index\.json")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a sharded checkpoint, and the tensors in it."""

    name: str
    infos: tuple[TensorInfo, ...]


def is_output_shard_name(name: str) -> bool:
    """Return whether a file of this name would be stale beside new shards."""
    return _OURS.fullmatch(name) is not None


def is_shard_name(name: str) -> bool:
    """Return whether a file of this name would be taken for a part of the sharded checkpoint that it lies beside."""
    return _PART.fullmatch(name) is not None


def split_into_shards(infos: Sequence[TensorInfo], max_bytes: int) -> tuple[Shard, ...]:
    """Return shards of at most ``max_bytes`` of tensors each, in order; a larger tensor gets one of its own."""
    parts: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if parts[-1] and size + info.nbytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(info)
        size += info.nbytes
    if len(parts) == 1:
        return (Shard("model.safetensors", tuple(parts[0])),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", tuple(part))
        for number, part in enumerate(parts, start=1)
    )


def weight_index(shards: Sequence[Shard]) -> tuple[str, bytes]:
    """Return the name and the bytes of the index over these shards, as Hugging Face libraries read it."""
    weight_map = {info.key: shard.name for shard in shards for info in shard.infos}
    total = sum(info.nbytes for shard in shards for info in shard.infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return _INDEX, (json.dumps(index, indent=2) + "\n").encode()
