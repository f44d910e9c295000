"""Targets: the paths of outputs, checked before anything is written. A path is of this machine or a URL."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable

from ckptkit.core.files.hub_prefix import is_hub_path
from ckptkit.core.files.local import file_state
from ckptkit.core.files.places import clean_path, is_same_file, is_url
from ckptkit.core.text import printable
from ckptkit.errors import OutputError
from ckptkit.formats.writing.state import (
    PathState,
    Target,
    changed_meanwhile,
    created_meanwhile,
    exists_already,
    folder_exists_already,
    holds_directory,
    path_state,
)

__all__ = ["output_path", "prepare_directory", "prepare_side_file", "prepare_target", "present_state", "real_path"]


def output_path(path: str) -> str:
    """Return the path of an output as all other functions take it; call it once, where a path enters.

    Raises ``OutputError`` for a URL of a store that is only read.
    """
    if is_hub_path(path):
        raise OutputError(
            "hf: is only read",
            hint="write to a path of this machine, or to hf://ORG/NAME/FILE",
            path=path,
        )
    path = clean_path(path)
    if is_url(path):
        from ckptkit.formats.writing.stores.targets import refuse_only_read

        refuse_only_read(path)
        return path.rstrip("/")
    return path


def real_path(path: str) -> str:
    """Return the absolute path of an output, after following symbolic links. A URL stays as it is.

    Raises ``OutputError`` for a relative path if the current directory was removed.
    """
    if is_url(path):
        return path
    try:
        return os.path.realpath(path)
    except OSError as error:
        raise OutputError(f"the current directory: {(error.strerror or str(error)).lower()}", path=path) from None


def present_state(path: str, *, is_folder: bool = False) -> PathState | None:
    """Return the present state of a path, or None where it cannot be read; preparing the target reports the error.

    ``is_folder`` says what the output will be: a store is asked only about that.
    """
    if is_url(path):
        from ckptkit.formats.writing.stores.targets import state_in_store

        try:
            return state_in_store(path, is_folder=is_folder)
        except OutputError:
            return None
    try:
        return path_state(path)
    except (OSError, ValueError):
        return None


def prepare_target(path: str, *, force: bool, before: PathState | None = None) -> Target:
    """Return the target for an output file; its real path follows symbolic links.

    ``before`` is the state of the path when the output was chosen; the default is its present state.
    Raises ``OutputError`` if the directory is missing, or the path is not a regular file. It is also raised if the file
    exists and ``force`` is not given.
    """
    if is_url(path):
        from ckptkit.formats.writing.stores.targets import file_target

        return file_target(path, before, force=force)
    target, status = _status(path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise OutputError(f"is {what}", hint="give a file name", path=path)
    if status is not None and not force:
        raise exists_already(path)
    return _target(target, path, before, PathState(None if status is None else file_state(status)))


def prepare_side_file(path: str, inputs: Iterable[str], output: str | None = None, *, force: bool) -> Target:
    """Return the target for a file beside the main result, such as a plan or rules.

    Raises ``OutputError`` if the path is a file of an input or the output, or ends as that of a directory, and as
    ``prepare_target`` does.
    """
    if path.endswith("/"):
        raise OutputError("is the name of a directory", hint="give a file name", path=path)
    path = output_path(path)
    if any(is_same_file(file, path) for file in inputs):
        raise OutputError("is an input", hint="give another name", path=path)
    if output is not None and real_path(path) == real_path(output):
        raise OutputError("is the output too", hint="give another name", path=path)
    return prepare_target(path, force=force)


def prepare_directory(path: str, *, force: bool, before: PathState | None = None) -> Target:
    """Return the target for an output directory; its real path follows symbolic links.

    ``before`` is the state of the path when the output was chosen; the default is its present state.
    Raises ``OutputError`` where the parent directory is missing, or the path is a file, the current directory or a
    directory that contains directories. Without ``force`` the directory must be empty.
    """
    if is_url(path):
        from ckptkit.formats.writing.stores.targets import folder_target

        return folder_target(path, before, force=force)
    target, status = _status(path)
    if status is None:
        return _target(target, path, before, PathState())
    if not stat.S_ISDIR(status.st_mode):
        raise OutputError("is a file, and the output is a directory", hint="give a new name", path=path)
    try:
        now = path_state(target)
        entries = list(os.scandir(target))
    except OSError as error:
        raise OutputError((error.strerror or str(error)).lower(), path=path) from None
    subdirectory = next((entry.name for entry in entries if entry.is_dir(follow_symlinks=False)), None)
    if is_same_file(target, "."):
        raise OutputError(
            "is the current directory, and replacing it would delete the current directory",
            hint="change to its parent",
            path=path,
        )
    if subdirectory is not None:
        raise holds_directory(path, subdirectory)
    if entries and not force:
        raise folder_exists_already(path)
    return _target(target, path, before, now)


def _target(path: str, given: str, before: PathState | None, now: PathState) -> Target:
    if before is not None and before.file != now.file:
        kind = "directory" if now.entries else "file"
        raise created_meanwhile(path) if before.file is None else changed_meanwhile(kind, path)
    return Target(path, given, before or now)


def _status(path: str) -> tuple[str, os.stat_result | None]:
    """Return the real path of an output, and the status of an existing file. Raises ``OutputError`` for a bad path."""
    target = real_path(path)
    parent = os.path.dirname(target)
    try:
        above = os.stat(parent).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise OutputError(
            f"the directory {printable(parent)} does not exist",
            hint=f"create it first: mkdir -p {shlex.quote(printable(os.path.dirname(path) or parent))}",
            call="create it first, as os.makedirs does",
            path=path,
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"the directory {printable(parent)}: {reason}", path=path) from None
    if not stat.S_ISDIR(above):
        raise OutputError(f"{printable(parent)} is not a directory", path=path)
    try:
        # The real path cannot be used here: a pipe behind /dev/stdout has none.
        return target, os.stat(path)
    except FileNotFoundError:
        return target, None
    except OSError as error:
        raise OutputError((error.strerror or str(error)).lower(), path=path) from None
