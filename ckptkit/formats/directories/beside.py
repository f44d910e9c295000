"""Name the weights of a directory that are not read: files, folders with checkpoints, files of other frameworks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.places import folder_at, join, name_of, parent_of
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.formats import codes
from ckptkit.formats.directories.listing import (
    Listing,
    find_weights_files,
    list_directory,
    read_module_folders,
)
from ckptkit.formats.foreign import find_foreign_weights
from ckptkit.formats.shard_names import group_shards, index_shards, is_index

__all__ = ["unread_beside", "unread_warnings"]

_MOST_NAMED = 8


def unread_warnings(listing: Listing, checkpoint: Checkpoint) -> Iterator[ReaderWarning]:
    """Yield warnings that name all weights of the directory that ``checkpoint`` does not hold.

    Folders with further checkpoints, and files of other frameworks, are notes.
    """
    inside = [file.removeprefix(listing.join("")) for file in checkpoint.files]
    read = {name.replace("\\", "/").split("/")[0] for name in inside}
    what = f"only {_describe_read(checkpoint, inside)} is read"
    if files := _unread_files(listing, read):
        yield ReaderWarning(f"{_named(files)} not read; {what}", codes.UNREAD_WEIGHTS)
    yield from _folder_warnings(listing, read, what)


def unread_beside(files: Sequence[str]) -> list[str]:
    """Return the paths of the weights in the directory of ``files``, the files of one checkpoint, that are not read."""
    directory = parent_of(files[0]) if files else ""
    listing = list_directory(folder_at(directory)) if files else None
    names = _unread_files(listing, {name_of(file) for file in files}) if listing is not None else []
    return [join(directory, name) for name in names]


def _describe_read(checkpoint: Checkpoint, inside: Sequence[str]) -> str:
    folders = {name.replace("\\", "/").rpartition("/")[0] for name in inside}
    if "" not in folders:
        return f"the folder {listed(sorted(folders), 1)}"
    if len(inside) == 1:
        return quoted(inside[0])
    if index := next(filter(is_index, inside), None):
        return f"the index {quoted(index)}"
    if checkpoint.format.startswith("dcp"):
        return "the distributed checkpoint"
    return f"the checkpoint of {plural(len(inside), 'file')}"


def _named(names: Collection[str]) -> str:
    return f"{listed(names, _MOST_NAMED)} {'is' if len(names) == 1 else 'are'}"


def _unread_files(listing: Listing, read: Collection[str]) -> list[str]:
    """Return the files of weights that are not read. The name of an index represents the shards of the index."""
    unread = [name for name in listing.files if name not in read]
    indexes = [name for name in unread if is_index(name)]
    indexed = {index_shards(name) for name in indexes}
    represented = {
        name for group in group_shards(unread) if (group.stem, group.kind) in indexed for name in group.names
    }
    return [*indexes, *find_weights_files(listing.folder, [name for name in unread if name not in represented])]


def _folder_warnings(listing: Listing, read: Collection[str], what: str) -> Iterator[ReaderWarning]:
    folders = listing.checkpoint_folders
    others = [name for name in folders.readable if name not in read]
    parts = [name for name in read_module_folders(listing) if name in others]
    if parts:
        opens = _how_to_open(listing, parts)
        text = f"modules.json makes {listed(parts, _MOST_NAMED)} a part of the model, which is not read; {opens}"
        yield ReaderWarning(text, codes.UNREAD_WEIGHTS)
    if further := [name for name in others if name not in parts]:
        nouns = ("folder", "holds a further checkpoint") if len(further) == 1 else ("folders", "hold checkpoints")
        text = (
            f"the {nouns[0]} {listed(further, _MOST_NAMED)} {nouns[1]}, not read; {what}; "
            f"{_how_to_open(listing, further)}"
        )
        yield ReaderWarning(text, codes.UNREAD_WEIGHTS, "note")
    if folders.unknown:
        verb = "was" if len(folders.unknown) == 1 else "were"
        text = f"{plural(len(folders.unknown), 'folder')} of the directory {verb} not searched"
        yield ReaderWarning(text, codes.UNREAD_WEIGHTS, "note")
    foreign = [name for name in find_foreign_weights(listing.names) if name not in read]
    foreign += [name for name in folders.foreign if name not in foreign]
    if foreign:
        text = f"{_named(foreign)} of other frameworks and not read; usually the same weights"
        yield ReaderWarning(text, codes.UNREAD_WEIGHTS, "note")


def _how_to_open(listing: Listing, folders: Sequence[str]) -> str:
    which = "it" if len(folders) == 1 else "the first"
    return f"{shell_word(f'{listing.path}::{folders[0]}')} opens {which}"
