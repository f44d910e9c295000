"""Files and folders of stores, which are named by URLs.

fsspec and its filesystems are imported by the first request.
"""

from __future__ import annotations

from ckptkit.core.files.remote.urls import clean_url as _clean
from ckptkit.core.files.source import ByteSource, Folder

__all__ = ["clean_url", "forget", "open_remote", "remote_folder", "remote_kind", "remote_version", "stop_waiting"]


def clean_url(url: str) -> str:
    """Return the URL without credentials, which its requests still have; what was known of the URL is asked again.

    Call it once, where a URL enters.
    """
    shown = _clean(url)
    forget(shown)
    return shown


def forget(url: str) -> None:
    """Ask again what is at the URL and below it: it was written or removed. A ``::KEY`` after the URL is left out."""
    import sys

    before, mark, key = url.rpartition("::")
    url = before if mark and "://" not in key else url

    kept = sys.modules.get("ckptkit.core.files.remote.kept")  # else nothing was asked
    if kept is not None:
        kept.forget(url)


def stop_waiting() -> None:
    """End the waiting of all threads for stores, after Ctrl-C; nothing is imported for it."""
    import sys

    running = sys.modules.get("ckptkit.core.files.remote.running")  # else nothing was asked
    if running is not None:
        running.stop_waiting()


def open_remote(url: str) -> ByteSource:
    """Return the open file at ``url``. Raises ``PathError`` where it is missing or cannot be read."""
    from ckptkit.core.files.remote.file import RemoteFile

    return RemoteFile(url)


def remote_folder(url: str) -> Folder:
    """Return the folder at ``url``; nothing is asked."""
    from ckptkit.core.files.remote.folder import RemoteFolder

    return RemoteFolder(url)


def remote_version(url: str) -> tuple[object, ...] | None:
    """Return the size and the ETag, or else the time, of the file at ``url``; None where the store tells neither.

    Raises ``PathError`` where the store cannot be asked.
    """
    from ckptkit.core.files.remote.failures import public_errors
    from ckptkit.core.files.remote.running import finish, start
    from ckptkit.core.files.remote.stores import store_of

    with public_errors():
        state = finish(start(store_of(url).state(url)))
    told = state.etag or state.modified
    return (state.size, told) if told else None


def remote_kind(url: str) -> str:
    """Return what is at ``url``: ``"file"``, ``"folder"``, or an empty string. The answer is kept for the next call.

    Raises ``PathError`` where the store cannot be asked.
    """
    from ckptkit.core.files.remote.kinds import kind_of_url

    return kind_of_url(url)
