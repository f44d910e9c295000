"""The base of a patch: tensors that no step compares with a digest, and the error for another base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import quoted
from ckptkit.errors import PlanError

__all__ = ["BASE", "BaseOfPatch", "other_base"]

BASE = "base"  # its role


@dataclass(frozen=True, slots=True)
class BaseOfPatch:
    """The SHA-256 of tensors of the base in hexadecimal by key, as ``digest`` hashes them.

    These are the tensors of which the result may need no byte: dropped, packed without a base, or changed. Each other
    tensor of the base is one of the result, and is compared while it is written. ``name`` is what messages call the
    base that the patch was made from; it may be empty.
    """

    name: str
    digests: Mapping[str, str]

    def refuse_another(self, base: Checkpoint) -> None:
        """Read these tensors in all threads; raise ``PlanError`` for the first that has another digest."""
        from ckptkit.digests import digests_by_key

        for key, found in digests_by_key(base, self.digests).items():
            if found.partition(":")[2] != self.digests[key]:
                raise other_base(base, f"{quoted(key)} has other values", self.name)


def other_base(base: Checkpoint, reason: str, name: str) -> PlanError:
    """Return the error for a base that the patch was not made from; ``name`` is what the patch calls its base."""
    made_from = f", which was made from {quoted(name)}" if name else ""
    return PlanError(
        f"not the base of this patch{made_from}: {reason}",
        hint="ckpt show PATCH prints the digest of its base, and ckpt digest PATH that of a checkpoint",
        path=base.path,
    )
