"""TIES: the largest elements of each task vector, and one sign for each element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from ckptkit.plans.methods.model import MergedTensor, Paper, Share, choice, flag, planned
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

    With ``trim = "model"``, one limit holds for all merged tensors of an input, as in the paper: the magnitude that the
    smallest of the ``density * n`` largest elements has, of the ``n`` elements of all these tensors. All elements of at
    least this magnitude are kept, also where more than ``density * n`` have it. The inputs are read several times.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708.
    """

    density: tuple[float, ...] = density()
    normalize: bool = flag("divide by the weights of the elements that are added", default=True)
    elect: str = choice("whose signs are elected", "weighted", "plain", "count")
    rescale: str = choice("what the elements that are kept are multiplied by", "none", "l1")
    trim: str = choice("whose largest elements are kept: of each tensor, or of all tensors together", "tensor", "model")
    counted: tuple[int, ...] = planned("elements of all merged tensors of the input", per_input=True)
    name: ClassVar[str] = "ties"
    paper: ClassVar[Paper | None] = Paper("TIES-Merging", "2306.01708")

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of the elements with the elected signs."""
        vectors = [self._vector(tensor, place) for place in range(tensor.inputs)]
        election = cast("Election", self.elect)
        return self.elected(tensor, vectors, normalize=self.normalize, election=election)

    def shares(self) -> tuple[Share | None, ...]:
        """Return what each input keeps of all its tensors together, with ``trim = "model"``."""
        if self.trim == "tensor":
            return ()
        counted = self.counted or (0,) * len(self.weight)
        each = zip(self.weight, self.density, counted, strict=True)
        return tuple(Share(density, total) if weight and 0 < density < 1 else None for weight, density, total in each)

    def _vector(self, tensor: MergedTensor, place: int) -> TaskVector | None:
        from ckptkit.values.merging.task_vectors.combining import TaskVector
        from ckptkit.values.merging.task_vectors.keeping import AtLeast, Band, Everything

        weight, share = self.weight[place], self.density[place]
        if not share:
            return None
        if share == 1:
            return TaskVector(Everything(), weight)
        restores_l1 = self.rescale == "l1"
        if self.trim == "model":  # without limits nothing but the shape counts
            return TaskVector(AtLeast(tensor.limits[place] if tensor.limits else 0.0), weight, restores_l1=restores_l1)
        kept = max(1, math.floor(share * tensor.elements))
        return TaskVector(Band(tensor.elements, kept), weight, restores_l1=restores_l1)
