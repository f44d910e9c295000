"""Refuse views that repeat a few stored bytes so often that reading them takes hours or more."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from ckptkit.core.checkpoint import Checkpoint, TensorInfo, storage_range
from ckptkit.core.files.places import size_at
from ckptkit.core.text import human_bytes, quoted
from ckptkit.errors import PlanError

__all__ = ["refuse_endless", "why_endless"]

_ALWAYS_READ: Final = 1 << 36  # bytes, which take a minute
_MOST_REPEATED: Final = 1100  # times for each stored byte, which deflate makes 1032 of at most


def refuse_endless(checkpoint: Checkpoint, infos: Collection[TensorInfo]) -> None:
    """Raise ``PlanError`` if reading these tensors, tied ones once, takes hours or more."""
    why = why_endless(checkpoint, infos)
    if why:
        raise PlanError(why)


def why_endless(checkpoint: Checkpoint, infos: Collection[TensorInfo]) -> str:
    """Return why reading these tensors, tied ones once, takes hours or more; an empty string if not."""
    if sum(info.nbytes for info in infos) <= _ALWAYS_READ:
        return ""
    once = {(info.view, info.shape, info.dtype) if info.view is not None else info.key: info for info in infos}
    nbytes = sum(info.nbytes for info in once.values())
    stored = _stored_bytes(checkpoint, once.values())
    if nbytes <= _ALWAYS_READ + _MOST_REPEATED * stored:
        return ""
    longest = max(once.values(), key=lambda info: info.nbytes)
    repeated = f"views such as {quoted(longest.key)} repeat the {human_bytes(stored)} that are stored"
    return f"{human_bytes(nbytes)} would be read: {repeated}"


def _stored_bytes(checkpoint: Checkpoint, infos: Iterable[TensorInfo]) -> int:
    """Return the size of the files; in memory, the bytes of the storages that the tensors use."""
    if checkpoint.files:
        return sum(map(size_at, checkpoint.files))
    ends: dict[object, int] = {}
    for info in infos:
        place, end = (info.key, info.nbytes) if info.view is None else (info.view.storage, storage_range(info)[1])
        ends[place] = max(ends.get(place, 0), end)
    return sum(ends.values())
