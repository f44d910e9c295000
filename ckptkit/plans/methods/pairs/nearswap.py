"""A base that takes elements of another model where they are near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Method, UsesBase, number
from ckptkit.values.merging.model import Array, Identity, Merging

if TYPE_CHECKING:
    from ckptkit.values.workers import Workers

__all__ = ["Nearswap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearswap(Method):
    """``w x + (1 - w) b`` with ``w = clamp(t / |b - x|, 0, 1)`` for each element; equal elements stay.

    So an element moves from b towards x by t at most: it is x where x is that near, else ``b + t`` or ``b - t``.

    Source: mergekit, "NearSwap".
    """

    t: float = number("how far an element of the base may move", low=0)
    name: ClassVar[str] = "nearswap"
    uses_base: ClassVar[UsesBase] = "always"
    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = 1

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the swap; the base where nothing may move."""
        from ckptkit.values.merging.combination import combination

        del tensor
        return _Swap(self.t) if self.t else combination([1.0, 0.0], is_mean=True)


@dataclass(frozen=True, slots=True)
class _Swap(Merging):
    t: float
    reads: tuple[int, ...] = (0, 1)

    @property
    def identity(self) -> Identity:
        return "piece"

    @property
    def hides_nonfinite(self) -> bool:
        return True

    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        import numpy as np

        del start, known
        base, other = inputs
        t = out.dtype.type(self.t)
        difference = np.subtract(other, base, out=workers.buffer("merge difference", out.dtype, len(out)))
        np.clip(difference, -t, t, out=out)
        np.add(out, base, out=out)
        np.copyto(out, other, where=np.abs(difference, out=difference) <= t)
