"""One model plus the difference of two others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Method, Paper, number
from ckptkit.values.merging.model import Array, Identity, Merging

if TYPE_CHECKING:
    from ckptkit.values.workers import Workers

__all__ = ["AddDifference", "TrainDifference"]

_STRENGTH = 1.8


@dataclass(frozen=True, slots=True, kw_only=True)
class AddDifference(Method):
    """``a + alpha * (p - q)`` of three inputs a, p, q.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, which adds such a difference.
    """

    alpha: float = number("factor of the difference", default=1.0)
    name: ClassVar[str] = "add_difference"
    paper: ClassVar[Paper | None] = Paper("Editing Models with Task Arithmetic", "2212.04089")
    fewest: ClassVar[int] = 3
    most: ClassVar[int | None] = 3
    takes_complex: ClassVar[bool] = True

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum; without a factor, the first input."""
        return _difference(tensor, self.alpha, is_trained=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainDifference(Method):
    """``a + 1.8 * alpha * m * (p - q)`` with ``m = |p - a| / (|p - a| + |p - q|)``, 0 where both are 0, of a, p, q.

    An element changes as if a had been trained like p, and little where a is near p already. The formula is that of
    "train difference" in the extension supermerger for Stable Diffusion.
    """

    alpha: float = number("factor of the difference", default=1.0)
    name: ClassVar[str] = "train_difference"
    fewest: ClassVar[int] = 3
    most: ClassVar[int | None] = 3

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum; without a factor, the first input."""
        return _difference(tensor, _STRENGTH * self.alpha, is_trained=True)


def _difference(tensor: MergedTensor, factor: float, *, is_trained: bool) -> Merging:
    from ckptkit.values.merging.combination import combination

    if not factor:
        return combination([1.0, 0.0, 0.0], is_mean=True)
    return _Difference(tuple(tensor.positions), factor, is_trained)


@dataclass(frozen=True, slots=True)
class _Difference(Merging):
    reads: tuple[int, ...]
    factor: float
    is_trained: bool

    @property
    def identity(self) -> Identity:
        return "piece"

    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        import numpy as np

        del start, known
        a, p, q = inputs
        np.subtract(p, q, out=q)
        if self.is_trained:
            both = workers.buffer("merge both", out.dtype, len(out))
            np.subtract(p, a, out=p)
            np.abs(p, out=p)
            np.add(p, np.abs(q, out=both), out=both)
            np.divide(p, both, out=p, where=both != 0)  # where both are 0, p is 0 already
            np.multiply(q, p, out=q)
        np.multiply(q, out.dtype.type(self.factor), out=q)
        np.add(a, q, out=out)
