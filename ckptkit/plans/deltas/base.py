"""The base of a patch: tensors that no step compares with a digest, and the error for another base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import plural, quoted
from ckptkit.errors import PlanError

__all__ = ["BASE", "BaseOfPatch", "ResultTensor", "has_headers", "other_base"]

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

    def refuse_another(self, base: Checkpoint, results: Callable[[], Mapping[str, ResultTensor]]) -> None:
        """Read these tensors in all threads; raise ``PlanError`` for the first that has another digest.

        ``results`` returns what the patch makes: the error says where the base agrees with all of it that was compared.
        """
        from ckptkit.digests import digests_by_key

        found = {key: digest.partition(":")[2] for key, digest in digests_by_key(base, self.digests).items()}
        other = next((key for key, digits in found.items() if digits != self.digests[key]), None)
        if other is None:
            return
        made = results()
        is_result = has_headers(base, made) and all(digits == made[key].digits for key, digits in found.items())
        compared = f"names, dtypes, shapes and {plural(len(found), 'tensor')}" if is_result else ""
        raise other_base(base, f"{quoted(other)} has other values", self.name, compared)


class ResultTensor(NamedTuple):
    """A tensor that a patch makes, with its SHA-256 in hexadecimal."""

    dtype: str
    shape: tuple[int, ...]
    digits: str


def has_headers(base: Checkpoint, made: Mapping[str, ResultTensor] | Mapping[str, TensorInfo]) -> bool:
    """Return whether a checkpoint has the names, dtypes and shapes of what a patch makes."""
    found = {key: (info.dtype, info.shape) for key, info in base.items() if info.kind == "dense"}
    return found == {key: (one.dtype, one.shape) for key, one in made.items()}


def other_base(base: Checkpoint, reason: str, name: str, as_result: str = "") -> PlanError:
    """Return the error for a base that the patch was not made from; ``name`` is what the patch calls its base.

    ``as_result`` names what was compared, where all of it is as in the result of the patch.
    """
    made_from = f", which was made from {quoted(name)}" if name else ""
    already = f"; it looks like the result already: all that was compared ({as_result}) agrees with it"
    return PlanError(
        f"not the base of this patch{made_from}: {reason}{already if as_result else ''}",
        hint="ckpt show PATCH prints the digests of its base and its result, and ckpt digest PATH that of a checkpoint",
        call="open_checkpoint(patch).metadata has the digests of base and result, digest(path) that of a checkpoint",
        path=base.path,
    )
