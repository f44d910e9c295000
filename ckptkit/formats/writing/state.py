"""The path of an output, and its state when the output was chosen: what another program does meanwhile is noticed."""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptkit.core.files.local import FileState, file_state
from ckptkit.core.files.places import is_url
from ckptkit.core.text import printable, quoted
from ckptkit.errors import CkptkitError, OutputError

__all__ = [
    "PathState",
    "Target",
    "add_to_hint",
    "changed_meanwhile",
    "created_meanwhile",
    "exists_already",
    "folder_exists_already",
    "holds_directory",
    "is_wrong_output",
    "leftover",
    "name_leftover",
    "path_state",
    "wrong_output",
]


@dataclass(frozen=True, slots=True)
class PathState:
    """The state of the file or directory at a path; ``file`` is None for a path that does not exist.

    ``entries`` has the state of each entry of a directory, whose own size and time are not compared. A state is a
    ``FileState``, or what a store tells of a version of a file, such as its ETag.
    """

    file: Hashable = None
    entries: Mapping[str, Hashable] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """The real path of an output, the path that the user gave, and its state when the output was chosen."""

    path: str
    given: str
    before: PathState


def path_state(path: str) -> PathState:
    """Return the present state of a path of this machine, after following symbolic links.

    Raises ``OSError`` if it cannot be read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return PathState()
    if not stat.S_ISDIR(status.st_mode):
        return PathState(file_state(status))
    entries = {entry.name: file_state(entry.stat(follow_symlinks=False)) for entry in os.scandir(path)}
    return PathState(FileState(status.st_dev, status.st_ino, 0, 0), entries)


def created_meanwhile(target: str) -> OutputError:
    """Return the error for a path that did not exist when the output was chosen."""
    return OutputError(
        "another program created this path during this run; it was not replaced",
        hint="run the command again with --force to replace it",
        call="call it again with force=True to replace it",
        path=target,
    )


def changed_meanwhile(kind: str, path: str) -> OutputError:
    """Return the error for a file or directory that has another state than when the output was chosen."""
    return OutputError(
        f"another program changed this {kind} during this run; it was not replaced",
        hint="run the command again",
        path=path,
    )


def exists_already(path: str) -> OutputError:
    """Return the error for a file that exists, without ``force``."""
    if is_url(path):
        return OutputError("already exists", hint="--force replaces it", path=path)
    return OutputError(
        "already exists",
        hint="--force replaces it, completely or not at all",
        path=path,
        call="force=True replaces it, completely or not at all",
    )


def folder_exists_already(path: str) -> OutputError:
    """Return the error for a directory with files, without ``force``."""
    return OutputError(
        "already exists", hint="--force replaces its weights of this format and keeps its other files", path=path
    )


def holds_directory(path: str, name: str) -> OutputError:
    """Return the error for a directory with another directory in it."""
    return OutputError(
        f"contains the directory {quoted(name)}, so it is not replaced", hint="give a new directory", path=path
    )


_DELETED = "so the new file was deleted"


def wrong_output(reason: str, path: str) -> OutputError:
    """Return the error for a written file that is not as it was planned, and is removed."""
    return OutputError(f"{reason}, {_DELETED}", path=path)


def is_wrong_output(error: BaseException | None) -> bool:
    """Return whether an error is of ``wrong_output``."""
    return isinstance(error, OutputError) and error.reason.endswith(_DELETED)


def add_to_hint(error: CkptkitError, what: str) -> None:
    """Add a clause to the hint of an error."""
    error.hint = f"{error.hint}; {what}" if error.hint else what


def name_leftover(error: CkptkitError, left: Sequence[str]) -> None:
    """Add to the hint of an error what could not be removed."""
    if left:
        add_to_hint(error, leftover(left))


def leftover(left: Sequence[str]) -> str:
    """Return the sentence about what could not be removed, or an empty string."""
    if not left:
        return ""
    more = f" and {len(left) - 1} more" if left[1:] else ""
    return f"{printable(left[0])}{more} could not be removed: remove {'them' if left[1:] else 'it'} by hand"
