"""The digests of some tensors of a checkpoint, by their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.checkpoint.stored import StoredBytes
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.digests.hashing import hash_tensors
from ckptkit.values.workers import Workers

__all__ = ["hash_each"]


def hash_each(
    checkpoint: Checkpoint, infos: Iterable[TensorInfo], algorithm: str, workers: Workers, progress: Progress | None
) -> Mapping[str, str]:
    """Return the digest of each tensor, which this process reads. Raises what reading raises."""
    found: dict[str, str] = {}
    stored = StoredBytes(checkpoint)
    tensors = ((info, stored.payload(info.key)) for info in infos)
    with pause_gc():
        for hashed, nbytes in hash_tensors(tensors, algorithm, workers):
            found |= {key: f"{algorithm}:{digits}" for key, digits in hashed}
            if progress is not None and nbytes:
                progress(nbytes)
    return found
