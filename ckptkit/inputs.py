"""What an argument of the Python API may be where a function takes a checkpoint: a path, or what is open already."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeAlias

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.formats import open_checkpoint

__all__ = ["CheckpointLike", "opened"]

CheckpointLike: TypeAlias = str | os.PathLike[str] | StateDictLike


@contextlib.contextmanager
def opened(value: CheckpointLike, role: str) -> Iterator[Checkpoint]:
    """Give the Checkpoint that an argument describes; a path is opened here, and closed at the end of the block.

    A path is anything that ``open_checkpoint`` opens. A Checkpoint is given as it is, and stays open. A Module, and a
    mapping of tensors or of ``TensorInfo``, is described. Messages call the argument ``role``, such as ``base``.

    Raises:
        PathError: The path cannot be read.
        FormatError: The file is not a valid checkpoint.
        ModelError: ``value`` is none of these, or a live model cannot be built.

    Example:
        >>> with opened("fixtures/lenet_10class.pth", "base") as checkpoint:
        ...     len(checkpoint)
        10
    """
    if isinstance(value, str | os.PathLike):
        with open_checkpoint(value) as checkpoint:
            yield checkpoint
    else:
        yield as_checkpoint(value, role)
