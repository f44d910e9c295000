"""The text of a file for ``git diff``: of a checkpoint, of a pointer, and of a file that cannot be read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator

from ckptkit.cli.git.pointers import object_path, read_pointer
from ckptkit.core.checkpoint.stored import has_stored_bytes
from ckptkit.core.text import first_line, plural
from ckptkit.digests import digests_by_key
from ckptkit.errors import CkptkitError, PathError, one_line
from ckptkit.formats import open_inside
from ckptkit.render.show.for_git import DIGITS, lines_for_git
from ckptkit.wrappers.envelopes import EVERYTHING

__all__ = ["text_of_file"]


def text_of_file(path: str) -> Iterator[str]:
    """Yield the lines that stand for the file at ``path``; the name is never a URL, a live model or a part of a file.

    A file that cannot be read has lines too, with its size, its digest and the reason: git would show no difference of
    any file after an error. Raises ``OSError`` where the file does not exist or must not be read, and
    ``PathError`` for a folder, a pipe or a device.
    """
    path = os.path.abspath(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise PathError("is not a regular file", path=path)
    pointer = read_pointer(path)
    if pointer is not None:
        target = object_path(pointer)
        if target is None:
            yield f"Git LFS object: {plural(pointer.size, 'byte')}, sha256 {pointer.oid}"
            yield "not in this repository: git lfs fetch, then ckpt git install, which forgets the texts that git keeps"
            return
        path = target
    try:
        lines = _checkpoint(path)
    except (CkptkitError, OSError) as error:
        reason = error.reason if isinstance(error, CkptkitError) else (error.strerror or str(error)).lower()
    except Exception as error:  # noqa: BLE001 - also a bug must not end git diff
        reason = f"this is a bug in ckptkit: {first_line(error)}"
    else:
        yield from lines
        return
    yield f"not read: {one_line(reason)}"
    yield from _any_file(path)


def _checkpoint(path: str) -> list[str]:
    with open_inside(path, EVERYTHING) as checkpoint:
        readable = [key for key, info in checkpoint.items() if has_stored_bytes(info)]
        digests = digests_by_key(checkpoint, readable)
        checkpoint.check_unchanged()
        return list(lines_for_git(checkpoint, digests))


def _any_file(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    yield f"{plural(size, 'byte')}, sha256 {digest[:DIGITS]}"
