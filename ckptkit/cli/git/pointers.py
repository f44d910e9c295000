"""Pointers of Git LFS: small text files that are in git in place of large files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

from ckptkit.cli.git.repository import GitError, common_folder, configured

__all__ = ["Pointer", "object_path", "read_pointer"]

_LONGEST: Final = 1024  # bytes; Git LFS itself takes no longer file for a pointer
_VERSION: Final = b"version https://git-lfs"
_POINTER: Final = re.compile(r"oid sha256:(?P<oid>[0-9a-f]{64})\nsize (?P<size>[0-9]{1,19})\n", re.ASCII)


@dataclass(frozen=True, slots=True)
class Pointer:
    """The SHA-256 of the file that a pointer stands for, in hexadecimal, and its size in bytes."""

    oid: str
    size: int


def read_pointer(path: str) -> Pointer | None:
    """Return the pointer in the file at ``path``, or None for any other file. Raises ``OSError``."""
    with open(path, "rb") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST or not data.startswith(_VERSION):
        return None
    match = _POINTER.search(data.decode("ascii", "replace"))
    return Pointer(match["oid"], int(match["size"])) if match else None


def object_path(pointer: Pointer) -> str | None:
    """Return the path of the object in the repository of the current directory, or None where it is not there."""
    try:
        folder = common_folder()
    except GitError:  # git may be missing, or refuse a folder of another user
        return None
    # Git LFS takes a relative lfs.storage from the folder of git, not from the working tree.
    storage = os.path.join(folder, os.path.expanduser(configured("lfs.storage") or "lfs"))
    path = os.path.join(storage, "objects", pointer.oid[:2], pointer.oid[2:4], pointer.oid)
    try:
        return path if os.path.getsize(path) == pointer.size else None
    except OSError:
        return None
