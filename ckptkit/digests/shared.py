"""Digests of tensors that workers of an executor hash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.progress import Progress
from ckptkit.digests.by_key import hash_each
from ckptkit.tasks.inputs import opened_again
from ckptkit.tasks.sharing import Part, Sharing, name_of_part
from ckptkit.values.workers import Workers

__all__ = ["hash_shared"]


class _Hashing(NamedTuple):
    keys: tuple[str, ...]
    algorithm: str


def hash_shared(
    checkpoint: Checkpoint, infos: Sequence[TensorInfo], algorithm: str, sharing: Sharing, progress: Progress | None
) -> Mapping[str, str]:
    """Return what ``hash_each`` returns; the workers read the bytes. Raises what ``Sharing.run`` raises."""
    if not sharing.pays(sum(info.nbytes for info in infos)):
        with Workers() as workers:
            return hash_each(checkpoint, infos, algorithm, workers, progress)
    groups = [[info.key for info in group] for group in sharing.parts_of(infos, lambda info: info.nbytes)]
    parts = [
        Part(
            sharing.inputs,
            _Hashing(tuple(keys), algorithm),
            name_of_part(keys),
            sum(checkpoint[key].nbytes for key in keys),
        )
        for keys in groups
    ]
    found: dict[str, str] = {}
    for digests in sharing.run(_hash, parts, progress):
        found |= digests
    return found


def _hash(part: Part[_Hashing]) -> Mapping[str, str]:
    with opened_again(part.inputs[0]) as checkpoint, Workers() as workers:
        infos = [checkpoint[key] for key in part.work.keys]
        found = hash_each(checkpoint, infos, part.work.algorithm, workers, None)
        checkpoint.check_unchanged()
        return found
