"""Parts of a directory that are opened by name: ``DIR::unet``, ``DIR::value_head.bin``, ``DIR::x-*-of-00002.bin``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckptkit.core.checkpoint import Access, Checkpoint, Description, Entry, Payload, TensorInfo
from ckptkit.core.config_files import read_json
from ckptkit.core.text import human_bytes, listed, plural, printable, quoted, shell_word
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats.directories.keys import split_key
from ckptkit.formats.directories.listing import MODEL_NAMES, PIPELINE, Listing, find_weights_files, list_directory
from ckptkit.formats.shard_names import NumberedShards, group_shards, is_index

__all__ = ["find_part", "find_parts", "is_pipeline", "list_parts", "parts_error"]

_MOST_OPENED, _MOST_LISTED = 64, 1000
_MOST_NAMED = 4
_DEEPEST = 4  # folders in each other; a link can lead back


def find_part(listing: Listing, key: str) -> tuple[str | NumberedShards, str] | None:
    """Return the part of the directory that ``key`` names and the key inside the part, or None.

    A part is a folder that holds a checkpoint, a file of weights, or numbered shards by their pattern.
    """
    groups = {shards.pattern: shards for shards in group_shards(listing.files)}
    if key in groups:
        return groups[key], ""
    found = split_key(listing.folders, key)
    if found is not None:
        only = Listing(listing.folder, (), (found[0],))
        return found if only.checkpoint_folders.readable else None
    found = split_key([name for name in listing.files if key.startswith(name)], key)
    return found if found is not None and find_weights_files(listing.folder, [found[0]]) else None


def is_pipeline(listing: Listing) -> bool:
    """Return whether the directory is a pipeline of diffusers, without a model of its own."""
    own = any(name in listing.files for name in MODEL_NAMES) or any(map(is_index, listing.files))
    return PIPELINE in listing.files and not own and bool(listing.checkpoint_folders.readable)


def find_parts(listing: Listing) -> list[str]:
    """Return the names of the parts of a directory without weights of its own, or of a pipeline.

    The first part can be read. There are no parts if only other frameworks read them.
    """
    folders = listing.checkpoint_folders
    readable = [*folders.readable, *find_weights_files(listing.folder, listing.files)]
    return [*readable, *folders.foreign] if readable else []


def parts_error(listing: Listing, parts: Sequence[str], key: str = "") -> FormatError:
    """Return the error that names the parts of a directory, because a checkpoint is only one of the parts.

    ``key`` is the name that was asked for and that no part has.
    """
    missing = f"has nothing called {quoted(key)}: it is " if key else ""
    what = "a pipeline" if PIPELINE in listing.files else "a directory"
    named = [_inner_part(listing, parts[0])] if len(parts) == 1 else parts[:_MOST_NAMED]
    shown = " or ".join(shell_word(f"{listing.path}::{part}") for part in named)
    more = ", and so on" if len(parts) > _MOST_NAMED else ""
    return FormatError(
        f"{missing}{what} of {plural(len(parts), 'checkpoint')}: {listed(parts, 2 * _MOST_NAMED, show=printable)}",
        hint=f"give {shown}{more}",
        path=listing.path,
    )


def _inner_part(listing: Listing, part: str) -> str:
    """Return the part, or the only part inside it where it is a folder of one part, and so on."""
    names = [part]
    while names[-1] in listing.folders and len(names) < _DEEPEST:
        listing = list_directory(listing.folder.folder(names[-1]))
        inner = find_parts(listing)
        if len(inner) != 1 or inner[0] not in listing.folders:
            break
        names.append(inner[0])
    return "::".join(names)


def list_parts(listing: Listing, parts: Sequence[str], open_part: Callable[[str], Checkpoint]) -> Checkpoint:
    """Return a Checkpoint without tensors, with an entry for each part; ``open_part`` opens a part by its name."""
    classes = _component_classes(listing)
    entries = []
    for number, part in enumerate(parts[:_MOST_LISTED]):
        entry = Entry(part, "checkpoint", "not opened", is_outside=True, is_file=True)
        if number < _MOST_OPENED:
            entry = _describe_part(part, open_part)
        if part in classes:
            entry = entry._replace(value=f"{classes[part]}: {entry.value}")
        entries.append(entry)
    what = "pipeline" if PIPELINE in listing.files else "directory"
    warnings = [f"{plural(len(parts), 'part')}, and no tensors of its own; {parts_error(listing, parts).hint}"]
    if len(parts) > _MOST_LISTED:
        warnings.append(f"{plural(len(parts) - _MOST_LISTED, 'more part')} are not listed")
    return Checkpoint(
        {},
        Access(_no_payload),
        Description(listing.path, f"{what} of {plural(len(parts), 'checkpoint')}", entries=entries, warnings=warnings),
    )


def _no_payload(info: TensorInfo) -> Payload:
    raise KeyError(info.key)


def _describe_part(part: str, open_part: Callable[[str], Checkpoint]) -> Entry:
    try:
        with open_part(part) as checkpoint:
            size = human_bytes(sum(info.nbytes for info in checkpoint.values()))
            value = f"{plural(len(checkpoint), 'tensor')}, {size}"
            return Entry(part, checkpoint.format, value, is_outside=True, is_file=True)
    except CkptkitError as error:
        return Entry(part, "not read", error.reason, is_outside=True, is_file=True)


def _component_classes(listing: Listing) -> dict[str, str]:
    """Return the class of each component that ``model_index.json`` of diffusers names."""
    if PIPELINE not in listing.files:
        return {}
    try:
        index = read_json(listing.folder, PIPELINE)
    except CkptkitError:
        return {}
    return {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }
