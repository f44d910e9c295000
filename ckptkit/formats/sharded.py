"""Read and write directories of shards. The ``weight_map`` of the index names the file of each tensor."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ckptkit.core.checkpoint import MOST_TENSORS, Access, Checkpoint, Description, Payload, Record, TensorInfo
from ckptkit.core.config_files import json_value, parse_json
from ckptkit.core.files.places import join, kind_at, parent_of, real_path
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.source import ByteSource, Folder
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import kind_of, listed, plural, quoted, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.errors import CkptkitError, FormatError, PathError
from ckptkit.formats import codes
from ckptkit.formats.shard_names import NumberedShards, group_shards, index_kind, is_index
from ckptkit.quantized.configuration import CONFIGURATION_FILES

__all__ = [
    "Shard",
    "is_output_shard_name",
    "is_plain_name",
    "is_shard_name",
    "link_warnings",
    "open_sharded",
    "open_unindexed",
    "split_into_shards",
    "weight_index",
]


_MOST_NAMES = 1_000_000
_MOST_OTHER_KEYS = 1000  # of an index, beside the names of tensors
_LARGEST_INDEX = 256 << 20
_WHOLE_MODEL = re.compile(r"(?!adapter_).*(?:model|consolidated).*\.(?:safetensors|bin|pt|pth)")
_HUB_CACHE = "blobs"  # directory of a hub's cache that its snapshots link to


def open_sharded(
    folder: Folder, index_name: str, open_shard: Callable[[ByteSource], Checkpoint], *, whole: bool
) -> Checkpoint:
    """Return one Checkpoint of all shards that the index names; ``open_shard`` reads the shard in an open file.

    With ``whole``, a shard in the directory that the index does not name is an error: the index or the shard is from
    another save. Raises ``FormatError`` for a missing shard, for a shard outside the directory, and where a shard lacks
    a tensor that the index places in the shard.
    """
    folder.will_open([index_name])
    names = _names_beside(folder)
    index_path = join(folder.path, index_name)
    index = _read_index(folder, index_name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("the index has no weight_map", path=index_path)
    shards: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        _check_shard_name(key, name, index_name, index_path)
        shards.setdefault(name, []).append(key)
    _refuse_stale_index(folder, index_path, list(shards), names)
    extra = _unnamed_shards(names, shards)
    if whole and extra:
        raise FormatError(
            f"the index does not name shard {quoted(extra[0])} in its directory: from another save?",
            hint=f"{shell_word(index_path)} opens the shards that the index names{_ways_to_open(folder.path, extra)}",
            path=folder.path,
        )
    pool = FilePool(folder)
    folder.will_open([*shards, *CONFIGURATION_FILES])
    try:
        opened = {name: _open_shard(pool, name, keys, open_shard) for name, keys in shards.items()}
        checkpoint = _join(pool, weight_map, opened, [index_path])
    except BaseException:
        pool.close()
        raise
    return checkpoint.with_warnings(*_total_warning(index, checkpoint), *_shard_warnings(list(shards), extra))


def open_unindexed(
    folder: Folder, shards: NumberedShards, open_shard: Callable[[ByteSource], Checkpoint]
) -> Checkpoint:
    """Return one Checkpoint of numbered shards that have no index; ``open_shard`` reads the shard in an open file.

    Raises ``FormatError`` where two shards have the same key. A missing shard is a warning.
    """
    opened: dict[str, Checkpoint] = {}
    weight_map: dict[str, str] = {}
    pool = FilePool(folder)
    folder.will_open(shards.names)
    try:
        for name in shards.names:
            opened[name] = open_shard(pool.get(name))
            twice = next((key for key in opened[name] if key in weight_map), None)
            if twice is not None:
                raise FormatError(
                    f"{quoted(twice)} is in this shard and in {quoted(weight_map[twice])}",
                    hint="give the path of one file",
                    path=join(folder.path, name),
                )
            weight_map |= dict.fromkeys(opened[name], name)
        checkpoint = _join(pool, weight_map, opened, [])
    except BaseException:
        pool.close()
        raise
    if shards.missing:
        text = f"{len(opened):,} of {shards.count:,} shards are read, and {quoted(shards.missing[0])} is missing"
        return checkpoint.with_warnings(ReaderWarning(text, codes.SHARD_COUNT))
    text = f"there is no index; {len(opened):,} numbered shards are joined"
    return checkpoint.with_warnings(*([ReaderWarning(text, codes.NO_INDEX)] if shards.count > 1 else []))


def _names_beside(folder: Folder) -> list[str]:
    """Return the names in the folder of an index, or nothing where it cannot be listed: the index names the shards."""
    try:
        names = folder.names(_MOST_NAMES)
    except PathError:
        return []
    return sorted(names.all) if len(names.all) <= _MOST_NAMES else []


def _read_index(folder: Folder, name: str) -> Mapping[str, object]:
    file = folder.open(name)
    path = file.path
    try:
        if file.size > _LARGEST_INDEX:
            raise FormatError(
                f"the index has {file.size:,} bytes, more than the limit of {_LARGEST_INDEX:,}", path=path
            )
        data = file.read(0, file.size)
        if data.count(b'":') > MOST_TENSORS + _MOST_OTHER_KEYS:
            raise FormatError(f"the index names more than {MOST_TENSORS:,} tensors, the limit", path=path)
        try:
            return parse_json(data, "the index")
        except FormatError as error:
            raise FormatError(error.reason, path=path) from None
    finally:
        file.close()


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` is the name of a file in the same directory, on every operating system."""
    from pathlib import PureWindowsPath

    # The rules of Windows know drives, roots and both kinds of slash.
    parts = PureWindowsPath(name)
    return bool(name) and parts.name == name and not parts.drive and name not in (".", "..") and "\0" not in name


def link_warnings(folder: Folder, names: Iterable[str]) -> list[ReaderWarning]:
    """Return a warning if some of these files are links out of the directory. Links into a hub's cache are allowed."""
    real_directory = real_path(folder.path)
    found = []
    for name in names:
        if folder.has_link(name):
            target = real_path(join(folder.path, name))
            target_directory = parent_of(target)
            folders = target_directory.split("/")[-2:]  # repositories may share blobs in blobs/ab
            if target_directory != real_directory and _HUB_CACHE not in folders:
                found.append((name, target))
    if not found:
        return []
    name, target = found[0]
    others = f", like {plural(len(found) - 1, 'more link')}" if found[1:] else ""
    text = f"{quoted(name)} is a link out of the directory, to {quoted(target)}{others}"
    return [ReaderWarning(text, codes.LINK_OUTSIDE)]


def _check_shard_name(key: str, name: object, index_name: str, path: str) -> None:
    if not isinstance(name, str):
        raise FormatError(f"the index maps {quoted(key)} to {kind_of(name)}, not to a file name", path=path)
    if not is_plain_name(name):
        raise FormatError(f"the index names the unsafe shard {quoted(name)}", path=path)
    if index_kind(index_name) == "safetensors" and not name.endswith(".safetensors"):
        raise FormatError(f"an index of safetensors shards names {quoted(name)}", path=path)


def _refuse_stale_index(folder: Folder, index_path: str, named: Sequence[str], names: Collection[str]) -> None:
    """Raise ``FormatError`` if named shards are missing, and the directory has other shards: the index is stale."""
    present = set(names)
    missing = [name for name in named if name not in present and not folder.has_file(name)] if names else []
    if not missing:
        return
    numbered = {name for shards in group_shards(names) for name in shards.names}
    others = [name for name in names if (name in numbered or _WHOLE_MODEL.fullmatch(name)) and name not in named]
    if others:
        verb = "is" if len(missing) == 1 else "are"
        raise FormatError(
            f"the index names {listed(missing, 1)}, which {verb} missing; "
            f"the directory has {listed(others, 2)}: is the index from another save?",
            hint=_ways_to_open(folder.path, others).removeprefix("; "),
            path=index_path,
        )


def _ways_to_open(directory: str, names: Sequence[str]) -> str:
    """Return how to open these files of the directory without the index, as the end of a hint."""
    groups = group_shards(names)
    parts = [shards.pattern for shards in sorted(groups, key=lambda shards: len(shards.missing))]
    parts += sorted(set(names) - {name for shards in groups for name in shards.names})
    shown = " or ".join(shell_word(f"{directory}::{part}") for part in parts[:3])
    return f"; {shown} opens the files that are there"


def _unnamed_shards(names: Sequence[str], shards: Mapping[str, object]) -> list[str]:
    """Return the file names that look like shards of the index, and that the index does not name."""
    families = {(group.stem, group.kind) for group in group_shards(shards)}
    return [
        name
        for group in group_shards(names)
        if (group.stem, group.kind) in families
        for name in group.names
        if name not in shards
    ]


def _shard_warnings(names: Sequence[str], extra: Sequence[str]) -> Iterator[ReaderWarning]:
    """Yield a warning for shards that the index does not name, and for gaps in the numbers of the named shards."""
    if extra:
        noun = "shards" if extra[1:] else "shard"
        yield ReaderWarning(f"the index does not name {noun} {listed(extra, 1)} in its directory", codes.STALE_SHARD)
    for group in group_shards(names):
        if group.missing:
            missing = quoted(group.missing[0])
            text = f"the index names {len(group.names):,} of {group.count:,} shards, but not {missing}"
            yield ReaderWarning(text, codes.SHARD_COUNT)


def _open_shard(
    pool: FilePool, name: str, keys: list[str], open_shard: Callable[[ByteSource], Checkpoint]
) -> Checkpoint:
    # A link may point outside the directory, as in a hub's cache. This is safe because the file is only read.
    path = join(pool.folder.path, name)
    try:
        shard = open_shard(pool.get(name))
    except CkptkitError as error:
        raise FormatError(
            f"{error.reason} (a shard that should hold {quoted(keys[0])})",
            hint=error.hint or (None if kind_at(path) or pool.folder.has_link(name) else "download or copy it again"),
            path=error.path or path,
        ) from None
    absent = [key for key in keys if key not in shard]
    extra = sorted(shard.keys() - set(keys))
    if absent or extra:
        reason = (
            f"the index places {listed(absent, 1)} in this shard, but the shard has no such tensor"
            if absent
            else f"this shard holds {listed(extra, 1)}, but the index does not place the tensor here"
        )
        raise FormatError(
            reason,
            hint=f"if the index is from another save: {_ways_to_open(pool.folder.path, [name]).removeprefix('; ')}",
            path=path,
        )
    return shard


def _join(
    pool: FilePool, weight_map: Mapping[str, str], opened: Mapping[str, Checkpoint], other_files: Sequence[str]
) -> Checkpoint:
    folder, order = pool.folder, list(opened)
    infos: dict[str, TensorInfo] = {}
    for number, shard in enumerate(opened.values()):
        for key, info in shard.items():
            if info.view is not None:  # the storages of each shard get numbers of their own
                view = info.view._replace(storage=info.view.storage + (number << 32))
                infos[key] = replace(info, view=view)
            else:
                infos[key] = info
    warnings = list(dict.fromkeys(text for shard in opened.values() for text in shard.warnings))
    if len(opened) > 1:  # the parts that a shard asks for are joined, or SHARD_COUNT says which are missing
        warnings = [text for text in warnings if getattr(text, "code", None) is not codes.PART_OF_SEVERAL]
    warnings += link_warnings(folder, order)
    folded = {name.casefold(): name for name in order}
    similar = next((name for name in order if folded[name.casefold()] != name), None)
    if similar is not None:
        other = folded[similar.casefold()]
        warnings.append(f"shards {quoted(similar)} and {quoted(other)} differ only in case: one file on some systems")
    metadata = _joined_metadata([shard.metadata for shard in opened.values()])

    def payload(info: TensorInfo) -> Payload:
        return opened[weight_map[info.key]].payload(info.key)

    def span(info: TensorInfo) -> Payload | None:
        return opened[weight_map[info.key]].span(info.key)

    def records() -> Iterable[Record]:
        return chain.from_iterable(shard.records() for shard in opened.values())

    formats = {shard.format for shard in opened.values()}
    return Checkpoint(
        infos,
        Access(payload, span, records, pool.check_unchanged, pool.close),
        Description(
            folder.path,
            f"sharded {'/'.join(sorted(formats))} ({plural(len(opened), 'shard')})",
            files=[*other_files, *(file for shard in opened.values() for file in shard.files)],
            entries=[entry for shard in opened.values() for entry in shard.entries],
            metadata=metadata,
            warnings=warnings,
            references=list(dict.fromkeys(name for shard in opened.values() for name in shard.references)),
            suspicious=any(shard.suspicious for shard in opened.values()),
        ),
    )


def _joined_metadata(shards: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the metadata of all shards, with the lists of names joined that each shard has, as torchao's do."""
    joined: dict[str, str] = {}
    for key in dict.fromkeys(key for shard in shards for key in shard):
        texts = list(dict.fromkeys(shard[key] for shard in shards if key in shard))
        joined[key] = texts[-1]
        if len(texts) > 1 and all(text.startswith("[") for text in texts):
            with contextlib.suppress(ValueError):
                items = [item for text in texts if isinstance(one := json_value(text), list) for item in one]
                if all(isinstance(item, str) for item in items):
                    joined[key] = json.dumps(list(dict.fromkeys(items)))
    return joined


def _total_warning(index: Mapping[str, object], infos: Mapping[str, TensorInfo]) -> Iterator[ReaderWarning]:
    stated_metadata = index.get("metadata")
    total = stated_metadata.get("total_size") if isinstance(stated_metadata, dict) else None
    actual = sum(info.nbytes for info in infos.values())
    # Some writers count a tied tensor once, others once for each key.
    once = actual - sum(infos[key].nbytes for keys in tied_keys(infos.values()) for key in keys[1:])
    if total is not None and total not in (actual, once):
        stated = str(total)[:40] if isinstance(total, int | float) else f"a {type(total).__name__} of"
        text = f"the index gives a total size of {stated} bytes, but the tensors have {actual}"
        yield ReaderWarning(text, codes.TOTAL_SIZE)


_INDEX = "model.safetensors.index.json"
_OUTPUT_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a sharded checkpoint, and the tensors in it."""

    name: str
    infos: tuple[TensorInfo, ...]


def is_output_shard_name(name: str) -> bool:
    """Return whether ckptkit writes shards or an index of this name; new output replaces old files of such names."""
    return _OUTPUT_NAME.fullmatch(name) is not None


def is_shard_name(name: str) -> bool:
    """Return whether a reader would treat a file of this name as a shard or an index."""
    return bool(group_shards([name])) or is_index(name) or name.endswith(".index.json")


def split_into_shards(infos: Sequence[TensorInfo], max_bytes: int) -> tuple[Shard, ...]:
    """Return shards of at most ``max_bytes`` each, in order; a larger tensor gets a shard of its own."""
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
    """Return the file name and the content of the index of these shards, as Hugging Face libraries read it."""
    weight_map = {info.key: shard.name for shard in shards for info in shard.infos}
    total = sum(info.nbytes for shard in shards for info in shard.infos)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return _INDEX, (json.dumps(index, indent=2) + "\n").encode()
