"""The result of one shard: what a run has to know of it, also where another run or another process made it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ckptkit.core.cast_losses import CastLoss
from ckptkit.errors import ArgumentError
from ckptkit.formats.sharded import Shard
from ckptkit.formats.writing.journal import FinishedFile
from ckptkit.plans.inputs import PlanInputs
from ckptkit.plans.plan.extracted import ExtractedChange
from ckptkit.plans.plan.merged import MergedFacts
from ckptkit.plans.produce import Producer

__all__ = ["ShardResult", "digest_of", "hash_of", "result_of"]

_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a run has to know of a shard: its bytes, how many are shared, and what is known only once it was made."""

    nbytes: int
    shared: int = 0
    losses: tuple[CastLoss, ...] = ()
    extracted: tuple[ExtractedChange, ...] = ()
    merged: tuple[MergedFacts, ...] = ()

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a later run reads the shard faster than it makes it again: most blocks are not those of an input."""
        return 2 * self.shared <= self.nbytes

    def to_json(self) -> dict[str, Any]:
        """Return what a journal holds beside the number of bytes."""
        found: dict[str, Sequence[CastLoss | ExtractedChange | MergedFacts]]
        found = {"losses": self.losses, "extracted": self.extracted, "merged": self.merged}
        return {"shared": self.shared, **{name: [asdict(one) for one in several] for name, several in found.items()}}

    @classmethod
    def of(cls, file: FinishedFile) -> ShardResult:
        """Return what a journal holds. Raises ``KeyError`` and ``TypeError`` where another version wrote it."""
        about = file.about
        return cls(
            file.nbytes,
            about["shared"],
            tuple(CastLoss(**loss) for loss in about["losses"]),
            tuple(ExtractedChange(**change) for change in about["extracted"]),
            tuple(MergedFacts(**facts) for facts in about["merged"]),
        )

    def tell(self, producer: Producer) -> None:
        """Let the producer know what it would know if it had made the shard."""
        from ckptkit.values.merging.model import Facts

        producer.losses.update({loss.key: loss for loss in self.losses})
        producer.extracted.update({change.key: change for change in self.extracted})
        producer.merged.update({one.key: Facts(one.warning, tuple(one.numbers.items())) for one in self.merged})


def result_of(inputs: PlanInputs, shard: Shard, nbytes: int, shared: int, before: Collection[str]) -> ShardResult:
    """Return the result of a shard that was just written; ``before`` names the changes extracted before it."""
    keys = [info.key for info in shard.infos]
    extracted = tuple(change for key, change in inputs.producer.extracted.items() if key not in before)
    return ShardResult(nbytes, shared, inputs.losses(keys), extracted, inputs.merged(keys))


def digest_of(path: str, is_stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the digest of all bytes of a file, by the fastest algorithm that is there, as ``FinishedFile`` has it.

    It is an empty string where it was stopped. Raises ``OSError``.
    """
    try:
        algorithm, digest = "xxh3", hash_of(path, "xxh3", is_stopped)
    except ArgumentError:
        algorithm, digest = "sha256", hash_of(path, "sha256", is_stopped)
    return f"{algorithm}:{digest}" if digest else ""


def hash_of(path: str, algorithm: str, is_stopped: Callable[[], bool]) -> str:
    """Return the hash of all bytes of a file in hexadecimal, or an empty string where it was stopped.

    Raises ``ArgumentError`` where the library of the algorithm is not there, and ``OSError``.
    """
    from ckptkit.digests.hashing import hash_function

    found = hash_function(algorithm)(b"")
    buffer = memoryview(bytearray(_PIECE))
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while count := os.readv(fd, [buffer]):
            if is_stopped():
                return ""
            found.update(buffer[:count])
    finally:
        os.close(fd)
    return found.hexdigest()
