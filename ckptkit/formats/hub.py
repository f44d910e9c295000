"""Find the checkpoint of ``hf:org/name``: in the cache of Hugging Face libraries if it is whole, or at the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from ckptkit.core.files.hub import HubPath, may_ask_hub, parse_hub_path
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, printable, quoted
from ckptkit.formats import codes
from ckptkit.formats.detect import WEIGHT_SUFFIXES, has_suffix
from ckptkit.formats.directories.keys import split_key
from ckptkit.formats.directories.trainer_files import is_trainer_file
from ckptkit.formats.distributed.file_names import is_dcp, is_zero
from ckptkit.formats.foreign import find_foreign_weights
from ckptkit.formats.shard_names import group_shards, is_index

__all__ = ["locate_hub_checkpoint"]

_MOST_FOLDERS = 300
_DIGITS = 12  # of a commit


def locate_hub_checkpoint(name: str) -> tuple[str, ReaderWarning]:
    """Return where the checkpoint ``hf:org/name`` is, with its commit in the cache or as a URL, and a note of this.

    ``::a.b`` stays at the end. What the cache holds only in part is read at the hub. Raises ``PathError`` where the
    cache does not have it whole and the hub cannot be asked.
    """
    text, mark, key = name.partition("::")
    path = parse_hub_path(text)
    is_cached = bool(path.commit) and os.path.exists(path.place)
    lack = _lack(path.place, key) if is_cached else "not in the Hugging Face cache"
    if not lack:
        return path.pinned + mark + key, _note_of_cache(path)
    may_ask_hub(path, lack)
    note = lack if is_cached else f"{printable(text)} is {lack}"
    return path.url + mark + key, ReaderWarning(f"{note}: the hub was read", codes.HUB)


def _note_of_cache(path: HubPath) -> ReaderWarning:
    text = f"{printable(path.text)} was read in the Hugging Face cache: commit {path.commit[:_DIGITS]}"
    if not path.commit.startswith(path.revision):
        text += f", which was {quoted(path.revision)} when it was downloaded"
    return ReaderWarning(text, codes.HUB)


def _lack(path: str, key: str) -> str:
    """Return what the cache lacks of the checkpoint at ``path``, or an empty string; file names decide."""
    folder, name = (path, "") if os.path.isdir(path) else os.path.split(path)
    if name and not is_index(name):
        return ""
    names = sorted(os.listdir(folder))
    if key and ("*" in key or split_key(names, key) is not None):
        return ""
    has_weights = False
    for files in _files_of(folder):
        present = [file for file in files if os.path.exists(file)]
        missing = [file for file in files if file not in present]
        if missing and has_suffix(missing[0], WEIGHT_SUFFIXES):
            return f"the Hugging Face cache has not got all of {quoted(os.path.basename(missing[0]))}"
        shown = [os.path.basename(file) for file in present]
        for shards in group_shards(shown):
            if shards.missing:
                return f"the Hugging Face cache has {len(shards.names):,} of {plural(shards.count, 'shard')}"
        has_weights = has_weights or _hold_weights(shown)
    return "" if has_weights else "the Hugging Face cache has files of the repository, but no weights"


def _hold_weights(names: Sequence[str]) -> bool:
    if is_dcp(names) or is_zero(names) or find_foreign_weights(names):
        return True
    return any(has_suffix(name, WEIGHT_SUFFIXES) and not is_trainer_file(name) for name in names)


def _files_of(folder: str) -> Iterator[list[str]]:
    """Yield the paths of the files of the folder, and of each of the folders in it."""
    for number, (inside, folders, files) in enumerate(os.walk(folder)):
        folders.sort()
        yield [os.path.join(inside, name) for name in sorted(files)]
        if number == _MOST_FOLDERS:
            return
