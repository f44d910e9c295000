"""Find a file in the directory of a checkpoint, such as the configuration of the model or of the adapter."""

from __future__ import annotations

import os

from ckptkit.formats import split_path
from ckptkit.formats.directories.keys import split_key

__all__ = ["file_beside"]


def file_beside(path: str, name: str) -> str | None:
    """Return the path of the file ``name`` in the directory of a checkpoint, or None if there is no such file.

    For ``DIR::unet``, the directory of the checkpoint is the folder ``unet``.
    """
    directory, key = split_path(path)
    if not os.path.exists(directory):
        return None
    if not os.path.isdir(directory):
        directory, key = os.path.dirname(directory), ""
    while key and (part := split_key(_folders(directory), key)) is not None:
        directory, key = os.path.join(directory, part[0]), part[1]
    found = os.path.join(directory, name)
    return found if os.path.isfile(found) else None


def _folders(directory: str) -> list[str]:
    with os.scandir(directory or ".") as entries:
        return [entry.name for entry in entries if entry.is_dir()]
