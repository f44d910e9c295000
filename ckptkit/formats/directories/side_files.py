"""Find a file in the directory of a checkpoint, such as the configuration of the model or of the adapter."""

from __future__ import annotations

from ckptkit.core.files.places import folder_at, is_file, join, kind_at, parent_of
from ckptkit.formats import split_path
from ckptkit.formats.directories.keys import split_key

__all__ = ["file_beside"]

_MOST_NAMES = 1_000_000


def file_beside(path: str, name: str) -> str | None:
    """Return the path of the file ``name`` in the directory of a checkpoint, or None if there is no such file.

    For ``DIR::unet``, the directory of the checkpoint is the folder ``unet``.
    """
    directory, key = split_path(path)
    kind = kind_at(directory)
    if not kind:
        return None
    if kind == "file":
        directory, key = parent_of(directory), ""
    while key and (part := split_key(folder_at(directory).names(_MOST_NAMES).folders, key)) is not None:
        directory, key = join(directory, part[0]), part[1]
    found = join(directory, name)
    return found if is_file(found) else None
