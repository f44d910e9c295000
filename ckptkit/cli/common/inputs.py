"""Open the checkpoints and read the small files that a command names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping

from ckptkit.cli.common.printing import print_message
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import printable
from ckptkit.errors import CkptkitError, PathError
from ckptkit.formats import LIVE_PREFIX, open_checkpoint, open_checkpoint_or_parts, split_path

__all__ = [
    "default_error_path",
    "file_beside",
    "open_checkpoints",
    "open_with_warnings",
    "read_table_file",
]

_IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d][\w.]*(\(.*\))?", re.DOTALL)


@contextlib.contextmanager
def default_error_path(path: str | None) -> Iterator[None]:
    """Set the path of every error that names no file to ``path``."""
    try:
        yield
    except CkptkitError as error:
        if error.path is None:
            error.path = path
        raise


@contextlib.contextmanager
def open_checkpoints(*paths: str, quiet: bool, listing_parts: bool = False) -> Iterator[list[Checkpoint]]:
    """Open checkpoints, print the warnings about each unless ``quiet``, and close all of them at the end.

    With ``listing_parts``, a directory of several checkpoints is not an error but a list of its parts.
    """
    opener = open_checkpoint_or_parts if listing_parts else open_checkpoint
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(_open(path, opener)) for path in paths]
        for checkpoint in checkpoints:
            _print_warnings(checkpoint, quiet=quiet)
        yield checkpoints


@contextlib.contextmanager
def open_with_warnings(path: str, opener: Callable[[str], Checkpoint], *, quiet: bool) -> Iterator[Checkpoint]:
    """Open one checkpoint with ``opener``, print the warnings about it unless ``quiet``, and close it at the end."""
    with opener(path) as checkpoint:
        _print_warnings(checkpoint, quiet=quiet)
        yield checkpoint


def _open(path: str, opener: Callable[[str], Checkpoint]) -> Checkpoint:
    try:
        return opener(path)
    except PathError as error:
        if error.hint is None and _IMPORTABLE.fullmatch(path) and not os.path.lexists(path):
            error.hint = f"for a live model write {LIVE_PREFIX}{path}"
        raise


def _print_warnings(checkpoint: Checkpoint, *, quiet: bool) -> None:
    for warning in () if quiet else checkpoint.warnings:
        print_message(f"ckpt: {printable(checkpoint.path)}: warning: {warning}")


def file_beside(path: str, name: str) -> str | None:
    """Return the path of the file ``name`` in the directory of a checkpoint, or None if there is no such file.

    For ``DIR::unet``, the directory of the checkpoint is the folder ``unet``.
    """
    from ckptkit.formats.directories.keys import split_key

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


def read_table_file(path: str, text: str | None = None, *, as_json: bool = False) -> Mapping[str, object]:
    """Return the table in a TOML, JSON or YAML file; the suffix chooses the format, unless ``as_json``.

    ``text`` is the content of the file if the caller has read it. Raises ``RuleError`` if the content is not valid.
    """
    from ckptkit.core.config_files import format_of, parse_table, read_text_file

    text_format = "json" if as_json else format_of(path)
    text = read_text_file(path, text_format) if text is None else text
    with default_error_path(path):
        return parse_table(text, text_format)
