"""Outputs in stores, checked before anything is written: with as few calls as possible."""

from __future__ import annotations

from ckptkit.errors import OutputError
from ckptkit.formats.writing.state import (
    PathState,
    Target,
    exists_already,
    folder_exists_already,
    holds_directory,
)
from ckptkit.formats.writing.stores.asking import WAY_OUT, Store, store_errors

__all__ = ["file_target", "folder_target", "refuse_only_read", "state_in_store"]

# Filesystems of fsspec that cannot write, or only into an archive or a cache of this machine.
_ONLY_READ = frozenset({
    "http", "https", "github", "gist", "git", "data", "zip", "tar", "libarchive", "reference", "jupyter", "jlab",
    "blockcache", "filecache", "simplecache", "cached", "asynclocal", "generic", "dir",
})  # fmt: skip


def refuse_only_read(url: str) -> None:
    """Raise ``OutputError`` for the URL of a store that is only read; nothing is asked."""
    scheme = url.partition("://")[0]
    if "::" in url:
        raise OutputError("a chain of filesystems is only read", hint=WAY_OUT, path=url)
    if scheme.lower() in _ONLY_READ:
        raise OutputError(f"{scheme}:// is only read", hint=WAY_OUT, path=url)


def state_in_store(url: str, *, is_folder: bool) -> PathState:
    """Return the present state of a file or folder. Raises ``OutputError`` where the store does not tell it."""
    with store_errors(url):
        store = Store(url)
        if not is_folder:
            return PathState(store.file_state())
        entries = store.entries()
    return PathState() if entries is None else PathState("folder", entries)


def file_target(url: str, before: PathState | None, *, force: bool) -> Target:
    """Return the target for a file, as ``prepare_target`` does; the store is asked only without ``before``."""
    refuse_only_read(url)
    before = before or state_in_store(url, is_folder=False)
    if before.file == "folder":
        raise OutputError("is a directory", hint="give a file name", path=url)
    if before.file is not None and not force:
        raise exists_already(url)
    return Target(url, url, before)


def folder_target(url: str, before: PathState | None, *, force: bool) -> Target:
    """Return the target for a folder, as ``prepare_directory`` does; the store is asked only without ``before``."""
    refuse_only_read(url)
    before = before or state_in_store(url, is_folder=True)
    if "" in before.entries:
        raise OutputError("is a file, and the output is a directory", hint="give a new name", path=url)
    if (inside := next((name for name, state in before.entries.items() if state == "folder"), None)) is not None:
        raise holds_directory(url, inside)
    if before.entries and not force:
        raise folder_exists_already(url)
    return Target(url, url, before)
