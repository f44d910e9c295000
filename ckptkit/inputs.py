"""What an argument of the Python API may be where a function takes a checkpoint: a path, or what is open already."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias, cast

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.live_prefix import is_live_path
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import printable
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.core.torch_types import Module
from ckptkit.formats import open_checkpoint, open_optimizer
from ckptkit.formats.codes import PATCH, is_more_than_a_note

if TYPE_CHECKING:
    from ckptkit.rules.model import Rules, RulesLike

__all__ = ["CheckpointLike", "opened", "opened_model", "opened_optimizer", "rules_for"]

CheckpointLike: TypeAlias = str | os.PathLike[str] | StateDictLike


@contextlib.contextmanager
def opened(value: CheckpointLike, role: str, *, warn: bool = True) -> Iterator[Checkpoint]:
    """Give the Checkpoint that an argument describes; a path is opened here, and closed at the end of the block.

    A path is anything that ``open_checkpoint`` opens. A Checkpoint is given as it is, and stays open. A Module, and a
    mapping of tensors or of ``TensorInfo``, is described. Messages call the argument ``role``, such as ``base``.

    The warnings of the reader become warnings of Python, since the caller does not see the Checkpoint of a path:
    ``UserWarning`` with the path, at the line that called ckptkit. Notes are left out, and of the role ``patch`` that
    it is a patch. A caller that reports them all turns this off with ``warn=False``.

    Raises:
        PathError: The path cannot be read.
        FormatError: The file is not a valid checkpoint.
        ModelError: ``value`` is none of these, such as a mapping of arrays, or a live model cannot be built.

    Example:
        >>> with opened("fixtures/lenet_10class.pth", "base") as checkpoint:
        ...     len(checkpoint)
        10
    """
    if isinstance(value, str | os.PathLike):
        with open_checkpoint(value) as checkpoint:
            if warn:
                _warn_about(checkpoint, expected=PATCH.name if role == PATCH.name else "")
            yield checkpoint
    else:
        yield as_checkpoint(value, role)


@contextlib.contextmanager
def opened_model(value: CheckpointLike) -> Iterator[Module | Checkpoint]:
    """Give the live Module of an argument, or the Checkpoint that has its names and shapes, for param groups.

    ``py:package.module:callable`` builds the Module, on the meta device if possible. Anything that is not a live model
    is given as by ``opened``. Raises what ``opened`` raises.

    Example:
        >>> with opened_model("py:fixtures.lenet:build") as model:
        ...     type(model).__name__
        'Net'
    """
    if isinstance(value, str) and is_live_path(value):
        from ckptkit.formats.live import build_module

        yield build_module(value)
    elif hasattr(value, "named_parameters"):
        yield cast("Module", value)
    else:
        with opened(value, "model") as checkpoint:
            yield checkpoint


@contextlib.contextmanager
def opened_optimizer(value: object) -> Iterator[object]:
    """Give the optimizer state of an argument; a path is opened as by ``open_optimizer``, and closed at the end.

    Any other value is given as it is. Raises what ``open_optimizer`` raises.

    Example:
        >>> with opened_optimizer("fixtures/lenet_ddp.pt") as state:
        ...     state.envelope
        'optimizer'
    """
    if isinstance(value, str | os.PathLike):
        with open_optimizer(value) as checkpoint:
            _warn_about(checkpoint)
            yield checkpoint
    else:
        yield value


def _warn_about(checkpoint: Checkpoint, expected: str = "") -> None:
    """Give the warnings of a reader, but for those with the ``expected`` code."""
    level, frame = 2, sys._getframe(1)  # noqa: SLF001 - skip_file_prefixes needs Python 3.12
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("ckptkit", "contextlib"):
        level, frame = level + 1, frame.f_back
    for warning in filter(is_more_than_a_note, checkpoint.warnings):
        if expected and isinstance(warning, ReaderWarning) and warning.code.name == expected:
            continue
        warnings.warn(f"{printable(checkpoint.path)}: {warning}", stacklevel=level)


def rules_for(rules: RulesLike | None, checkpoint: Checkpoint, expected: Checkpoint | None = None) -> Rules:
    """Return the rules that an argument describes, for the keys of ``checkpoint``.

    A rule file may refer to the ``config.json`` in the directory of the checkpoint. If there is none, it is the one in
    the directory of ``expected``, which the keys are renamed for. Raises what ``as_rules`` raises.

    Example:
        >>> with opened("fixtures/lenet_ddp.pt", "found") as found:
        ...     len(rules_for(["module.*=*"], found).stages)
        1
    """
    from ckptkit.rules.load import as_rules

    config = None
    if isinstance(rules, str | os.PathLike):
        from ckptkit.formats.directories.side_files import file_beside

        sides = [side for side in (checkpoint, expected) if side is not None and side.files]
        config = next(filter(None, (file_beside(side.path, "config.json") for side in sides)), None)
    return as_rules(rules, config=config)
