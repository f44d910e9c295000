"""A short description of a checkpoint, which a result keeps in place of the open file."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Self

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.checkpoint.provenance import DELTA
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.live_prefix import LIVE_PREFIX
from ckptkit.core.text import shell_word
from ckptkit.errors import PLAIN_WORD
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["NO_CHECKPOINT", "CheckpointSummary", "totals"]

_PLAIN_WORD = lazy_pattern(PLAIN_WORD, re.ASCII)  # a shell takes it as it is, and a hint shows where it ends
_IN_MEMORY = frozenset({"", "live model", "state_dict", "description"})
_SIZE = attrgetter("dtype", "shape", "stored_bytes")


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """Path, format, selected mapping (``envelope``), and the numbers of tensors, elements and bytes.

    ``format`` is empty if the checkpoint could not be opened. ``library_names`` has the model type of a live model of a
    library, and its classes. ``is_patch`` says that the file is a patch of ``ckpt delta``.
    """

    path: str = ""
    format: str = ""
    envelope: str = ""
    tensors: int = 0
    elements: int = 0
    nbytes: int = 0
    library_names: tuple[str, ...] = ()
    is_patch: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint, infos: Iterable[TensorInfo] | None = None) -> Self:
        """Return the description of a checkpoint, with the totals of ``infos``, or of all its tensors."""
        counts = totals(checkpoint.values() if infos is None else infos)
        live = checkpoint.configuration
        names = () if live is None else (live.model_type, *live.classes)
        return cls(
            checkpoint.path, checkpoint.format, checkpoint.envelope, *counts, names, DELTA in checkpoint.metadata
        )

    @property
    def is_stored(self) -> bool:
        """Whether the checkpoint is a file or a directory, and not in memory."""
        return self.format not in _IN_MEMORY

    @property
    def is_built(self) -> bool:
        """Whether ``py:package.module:callable`` named the checkpoint, so that it was built for this result."""
        return not self.is_stored and self.path.startswith(LIVE_PREFIX)

    @property
    def argument(self) -> str:
        """The word that gives the checkpoint to a command, or an empty string for one that is only in memory."""
        if not self.is_stored and not self.is_built:
            return ""
        path = f"{self.path}::{self.envelope}" if self.envelope else self.path
        return path if _PLAIN_WORD.fullmatch(path) else shell_word(path)


NO_CHECKPOINT = CheckpointSummary()


def totals(infos: Iterable[TensorInfo]) -> tuple[int, int, int]:
    """Return the number of tensors, of their elements, and of their bytes."""
    tensors = elements = nbytes = 0
    # A large model has few dtypes and shapes.
    for (dtype, shape, stored_bytes), times in Counter(map(_SIZE, infos)).items():
        count = math.prod(shape)
        tensors += times
        elements += count * times
        nbytes += times * ((count * DTYPES[dtype].bits + 7) // 8 if dtype in DTYPES else stored_bytes)
    return tensors, elements, nbytes
