"""TIES: the largest elements of each task vector, and one sign for each element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from ckptkit.plans.methods.model import MergedTensor, Paper, choice, flag
from ckptkit.plans.methods.task_vectors.weighted import WeightedVectors, density

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging
    from ckptkit.values.merging.task_vectors.combining import TaskVector
    from ckptkit.values.merging.task_vectors.election import Election

__all__ = ["Ties"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ties(WeightedVectors):
    """``base + lambda * m``, where ``m`` has the elements of the trimmed task vectors whose sign is elected.

    Of each task vector, the ``density * n`` elements of the largest magnitudes are kept, rounded down, and at least
    one; of equal magnitudes the first. The sign of the weighted sum of an element is elected; 0 elects the positive
    sign. The weighted elements with this sign are added, and with ``normalize`` divided by the sum of the sizes of
    their weights.

    ``elect`` says which sum has the sign: that of the ``weighted`` task vectors, of the ``plain`` ones, or the
    ``count`` of the signs of the weighted ones. ``rescale = "l1"`` multiplies each trimmed task vector so that the sum
    of its magnitudes is what it was.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708.
    """

    density: tuple[float, ...] = density()
    normalize: bool = flag("divide by the weights of the elements that are added", default=True)
    elect: str = choice("whose signs are elected", "weighted", "plain", "count")
    rescale: str = choice("what the elements that are kept are multiplied by", "none", "l1")
    name: ClassVar[str] = "ties"
    paper: ClassVar[Paper | None] = Paper("TIES-Merging", "2306.01708")

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of the elements with the elected signs."""
        vectors = [self._vector(tensor, weight, share) for weight, share in zip(self.weight, self.density, strict=True)]
        election = cast("Election", self.elect)
        return self.elected(tensor, vectors, normalize=self.normalize, election=election)

    def _vector(self, tensor: MergedTensor, weight: float, share: float) -> TaskVector | None:
        from ckptkit.values.merging.task_vectors.combining import TaskVector
        from ckptkit.values.merging.task_vectors.keeping import Band, Everything

        if not share:
            return None
        if share == 1:
            return TaskVector(Everything(), weight)
        kept = max(1, math.floor(share * tensor.elements))
        return TaskVector(Band(tensor.elements, kept), weight, restores_l1=self.rescale == "l1")
