"""The door from a path to a file or folder: a path of this machine, or the URL of a store."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from contextlib import closing, suppress

from ckptkit.core.files.hub_prefix import is_hub_path
from ckptkit.core.files.local import LocalFile, LocalFolder, is_same_local
from ckptkit.core.files.source import ByteSource, Folder
from ckptkit.core.text import nearest
from ckptkit.errors import CkptkitError, PathError

__all__ = [
    "absolute",
    "clean_path",
    "folder_at",
    "identity_at",
    "is_file",
    "is_same_file",
    "is_url",
    "join",
    "kind_at",
    "name_of",
    "near_path",
    "open_source",
    "parent_of",
    "real_path",
    "size_at",
    "split",
    "version_at",
]

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FILE = "file://"
_MOST_NEAR = 10_000  # names of a folder that are compared with the name of a missing file


def is_url(path: str) -> bool:
    """Return whether ``path`` is the URL of a store, and not a path of this machine; nothing is asked.

    A name with ``::`` before its ``://`` is a URL of several filesystems, which fsspec chains.
    """
    if "://" not in path or path[:7].lower() == _FILE:
        return False
    return any(_SCHEME.match(part) for part in path.split("::"))


def clean_path(path: str) -> str:
    """Return the path that messages and all other functions take. Call it once, where a path enters.

    ``file://`` becomes a path of this machine. Credentials are taken out of a URL, and kept for its requests.
    """
    if is_url(path):
        from ckptkit.core.files.remote import clean_url

        return clean_url(path)
    if path[:7].lower() == _FILE:
        from urllib.parse import unquote

        return unquote(path[7:].removeprefix("localhost"))
    return path


def _place_of(path: str) -> str:
    """Return the local path or the URL of ``hf:org/name``; any other path is its own place. Raises ``PathError``."""
    if not is_hub_path(path):
        return path
    from ckptkit.core.files.hub import hub_path

    return hub_path(path)


def _judged_at(path: str) -> str:
    """Return where it is seen whether a path exists. The hub is not asked what a snapshot of the cache lacks."""
    if not is_hub_path(path):
        return path
    from ckptkit.core.files.hub import hub_path

    return hub_path(path, asking=False)


def open_source(path: str) -> ByteSource:
    """Return the open file at ``path``. Raises ``PathError`` where it is missing or cannot be read."""
    place = _place_of(path)
    if is_url(place):
        from ckptkit.core.files.remote import open_remote

        return open_remote(place)
    return LocalFile(place, path)


def folder_at(path: str) -> Folder:
    """Return the folder at ``path``; nothing is asked, and it need not exist. The empty path is the current folder."""
    place = _place_of(path)
    if is_url(place):
        from ckptkit.core.files.remote import remote_folder

        return remote_folder(place)
    return LocalFolder(place, path)


def kind_at(path: str) -> str:
    """Return ``"file"``, ``"folder"``, or an empty string where nothing is found.

    A store keeps what it answers, so that the file or folder that is opened next costs no second request.
    """
    path = _judged_at(path)
    if is_url(path):
        from ckptkit.core.files.remote import remote_kind

        return remote_kind(path)
    if os.path.isdir(path):
        return "folder"
    return "file" if os.path.exists(path) else ""


def is_file(path: str) -> bool:
    """Return whether ``path`` is a file, or a link to one; a pipe is not one."""
    path = _judged_at(path)
    return kind_at(path) == "file" if is_url(path) else os.path.isfile(path)


def size_at(path: str) -> int:
    """Return the number of bytes of the file at ``path``, or 0 where there is no file. An open one costs no request."""
    path = _judged_at(path)
    if not is_url(path):
        return os.path.getsize(path) if os.path.isfile(path) else 0
    with suppress(PathError), closing(open_source(path)) as file:
        return file.size
    return 0


def identity_at(path: str) -> Hashable:
    """Return a value that is equal for two names of one file, or None where nothing is found. URLs are not asked."""
    path = _judged_at(path)
    if is_url(path):
        return path
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def version_at(path: str) -> tuple[object, ...] | None:
    """Return what the version of the file at ``path`` has in common with no other, or None where nothing tells it.

    Unlike ``identity_at`` it is the same after the machine was started again: the size, the time of the last change and
    the inode of a local file; the size and the ETag, or else the time, of a file of a store, which is asked. Raises
    ``PathError`` where the store cannot be asked.
    """
    path = _judged_at(path)
    if is_url(path):
        from ckptkit.core.files.remote import remote_version

        return remote_version(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def is_same_file(first: str, second: str) -> bool:
    """Return whether two paths name the same file or folder; a path that does not exist is another file.

    URLs are compared as they are written. Raises ``PathError`` where the state of a local path cannot be read.
    """
    first, second = _judged_at(first), _judged_at(second)
    if is_url(first) or is_url(second):
        return first.rstrip("/") == second.rstrip("/")
    return is_same_local(first, second)


def join(path: str, *names: str) -> str:
    """Return the path of a name in the folder ``path``."""
    if not is_url(path):
        return os.path.join(path, *names)
    from ckptkit.core.files.remote.urls import join_url

    return join_url(path, *names)


def split(path: str) -> tuple[str, str]:
    """Return the folder in which ``path`` is, and its name there."""
    if not is_url(path):
        return os.path.split(path)
    from ckptkit.core.files.remote.urls import parts_of

    before, own, after = parts_of(path)
    scheme, mark, rest = own.rstrip("/").partition("://")
    parent, slash, name = rest.rpartition("/")
    if not slash:  # the name of a bucket or a server
        return path, ""
    return f"{before}{scheme}{mark}{parent}{after}", name


def name_of(path: str) -> str:
    """Return the last name of ``path``."""
    return split(path)[1]


def parent_of(path: str) -> str:
    """Return the folder in which ``path`` is; it is empty for a name in the current folder."""
    return split(path)[0]


def absolute(path: str) -> str:
    """Return ``path`` from the root, without relative parts; a URL stays as it is."""
    return path if is_url(path) or is_hub_path(path) else os.path.abspath(path)


def real_path(path: str) -> str:
    """Return ``path`` without links and relative parts; a URL stays as it is."""
    path = _judged_at(path)
    return path if is_url(path) else os.path.realpath(path)


def near_path(path: str) -> str:
    """Return the existing path that is most like ``path``, or an empty string.

    It has another name in the same folder, a suffix more, a folder of another name, or the home folder for ``~``.
    """
    folder, name = split(path)
    with suppress(CkptkitError):
        if path.startswith("~"):
            at_home = os.path.expanduser(path)
            return at_home if at_home != path and kind_at(at_home) else ""
        if folder and not is_url(path) and not kind_at(folder):
            near = join(near_folder, name) if (near_folder := near_path(folder)) else ""
            return near if near and kind_at(near) else ""
        names = folder_at(folder).names(_MOST_NEAR).all
        longer = [one for one in names if name and one.startswith(f"{name}.")]
        found = longer[0] if len(longer) == 1 else nearest(name, names, cutoff=0.8)
        return join(folder, found) if found else ""
    return ""
