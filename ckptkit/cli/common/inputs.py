"""Open the checkpoints that a command names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

from ckptkit.cli.common.printing import print_message
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Code, ReaderWarning
from ckptkit.core.text import listed, printable
from ckptkit.formats import open_checkpoint, open_checkpoint_or_parts

__all__ = ["note_what_is_beside", "open_checkpoints", "open_with_warnings", "print_warnings"]


@contextlib.contextmanager
def open_checkpoints(
    *paths: str, quiet: bool, listing_parts: bool = False, expected: Collection[Code] = ()
) -> Iterator[list[Checkpoint]]:
    """Open checkpoints, print the warnings about each unless ``quiet``, and close all of them at the end.

    With ``listing_parts``, a directory of several checkpoints is not an error but a list of its parts. Warnings with an
    ``expected`` code are not printed, because the options of the user say the same.
    """
    opener = open_checkpoint_or_parts if listing_parts else open_checkpoint
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(opener(path)) for path in paths]
        for checkpoint in checkpoints:
            print_warnings(checkpoint, quiet=quiet, expected=expected)
        yield checkpoints


@contextlib.contextmanager
def open_with_warnings(path: str, opener: Callable[[str], Checkpoint], *, quiet: bool) -> Iterator[Checkpoint]:
    """Open one checkpoint with ``opener``, print the warnings about it unless ``quiet``, and close it at the end."""
    with opener(path) as checkpoint:
        print_warnings(checkpoint, quiet=quiet)
        yield checkpoint


def note_what_is_beside(checkpoint: Checkpoint, verb: str, *, quiet: bool) -> None:
    """Say which mapping of a training checkpoint is read, and which entries beside it are not, unless ``quiet``.

    ``verb`` says what is done with the mapping, such as ``hashed``. A user who has named the mapping knows it.
    """
    envelope = checkpoint.envelope
    beside = [entry.path for entry in checkpoint.entries if entry.is_outside]
    if quiet or not envelope or not beside or checkpoint.is_selected:
        return
    read = f"only {printable(f'::{envelope}')} is {verb}, not what is beside it: {listed(beside)}"
    print_message(f"ckpt: {printable(checkpoint.path)}: note: {read}")


def print_warnings(checkpoint: Checkpoint, *, quiet: bool, expected: Collection[Code] = ()) -> None:
    """Print the warnings about a checkpoint unless ``quiet``, but for those with an ``expected`` code."""
    for warning in () if quiet else checkpoint.warnings:
        if not isinstance(warning, ReaderWarning) or warning.code not in expected:
            kind = "note" if isinstance(warning, ReaderWarning) and warning.severity == "note" else "warning"
            print_message(f"ckpt: {printable(checkpoint.path)}: {kind}: {warning}")
