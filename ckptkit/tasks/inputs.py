"""Inputs that a worker opens again by their paths, and reads only if they are what the caller saw."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.hub_prefix import is_hub_path
from ckptkit.core.files.places import is_url, version_at
from ckptkit.core.text import kind_of, printable
from ckptkit.errors import ArgumentError, ChangedError, CkptkitError, FormatError, PathError
from ckptkit.formats import open_checkpoint, split_path

__all__ = ["SentInput", "opened_again", "paths_of", "send_input"]

_BY_PATH = "workers of an executor open each input by its path: give a path, or leave out executor"
_LEAVE_OUT = "leave out --jobs and --engine", "leave out executor"
_SAME_PATH = "each worker must reach the inputs under the same paths"


@dataclass(frozen=True, slots=True)
class SentInput:
    """An input as a task names it: small, and the same on each machine that has its files under this path.

    ``path`` opens the input wherever the worker runs, and ``given`` is how the user wrote it. ``versions`` has the size
    and the time of the last change of each file, or the ETag where a store has one.
    """

    path: str
    given: str
    versions: tuple[tuple[object, ...], ...]


def paths_of(sources: Mapping[str, object]) -> dict[str, str]:
    """Return the paths of inputs that workers open, by their roles.

    Raises ``ArgumentError`` for an open Checkpoint, a model or a mapping: another process cannot read it.
    """
    for role, value in sources.items():
        if not isinstance(value, str | os.PathLike):
            what = "an open Checkpoint" if isinstance(value, Checkpoint) else kind_of(value)
            raise ArgumentError(f"the {printable(role)} is {what}", hint=_BY_PATH)
    return {role: os.fsdecode(value) for role, value in sources.items() if isinstance(value, str | os.PathLike)}


def send_input(given: str, checkpoint: Checkpoint) -> SentInput:
    """Return the input that ``given`` named when it was opened as ``checkpoint``, for ``opened_again``.

    Raises ``ArgumentError`` where it is only in memory, such as a live model. Raises ``PathError`` where nothing tells
    the version of a file, and ``ChangedError`` where a path names another file than when it was opened.
    """
    if not checkpoint.files:
        raise ArgumentError(f"{printable(given)} is only in memory", hint=_LEAVE_OUT[0], call=_BY_PATH)
    versions = tuple(_version(file) for file in checkpoint.files)
    checkpoint.check_unchanged(by_path=True)
    is_elsewhere = is_url(given) or is_hub_path(given)
    # Nothing is normalised: a/../b is not b where a is a link, nor in the name of a mapping of the file.
    return SentInput(given if is_elsewhere else os.path.join(os.getcwd(), given), given, versions)


@contextlib.contextmanager
def opened_again(sent: SentInput) -> Iterator[Checkpoint]:
    """Give the input in a worker, and close it at the end of the block.

    Raises what ``open_checkpoint`` raises, and ``ChangedError`` where the files are not those that the caller saw.
    Errors of the block name paths as the user wrote them.
    """
    try:
        try:
            opened = open_checkpoint(sent.path)
        except PathError as error:  # the caller could open it
            error.hint, error.call = _SAME_PATH, None
            raise
        except FormatError as error:  # one file that grew or was cut is not a valid file any more
            if (_version(split_path(sent.path)[0]),) != sent.versions and len(sent.versions) == 1:
                raise _changed(sent) from error
            raise
        with opened as checkpoint:
            if tuple(_version(file) for file in checkpoint.files) != sent.versions:
                raise _changed(sent)
            yield checkpoint
    except CkptkitError as error:
        here = sent.path.removesuffix(sent.given)
        if here and error.path is not None and error.path.startswith(here):
            path = error.path[len(here) :]
            if path.startswith(sent.given) or sent.given.startswith(path):  # the input, a file of it, or its file
                error.path = path
        raise


def _changed(sent: SentInput) -> ChangedError:
    return ChangedError("the file changed since the work began", hint="run it again", path=sent.path)


def _version(path: str) -> tuple[object, ...]:
    found = version_at(path)
    if found is None:
        hint, call = _LEAVE_OUT
        raise PathError("nothing tells the version of this file", hint=hint, call=call, path=path)
    return found[:2]  # each machine may give a file of shared storage another inode
