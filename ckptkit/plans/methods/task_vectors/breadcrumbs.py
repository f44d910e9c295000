"""Model breadcrumbs: each task vector without its smallest and its largest elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Paper, choice, flag, number
from ckptkit.plans.methods.task_vectors.weighted import WeightedVectors, density

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging
    from ckptkit.values.merging.task_vectors.combining import TaskVector

__all__ = ["Breadcrumbs", "BreadcrumbsTies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breadcrumbs(WeightedVectors):
    """``base + lambda * sum w_i kept_i``, where ``kept_i`` has the elements of a task vector of middle magnitudes.

    In descending order of the magnitudes, of equal ones the first, ``gamma * n`` elements are left out, and the next
    ``density * n`` are kept; both are rounded down. If fewer than ``density * n`` would be left, fewer are left out. A
    density of 1 keeps all. ``rescale`` is that of ``ties``.

    Source: Davari and Belilovsky, "Model Breadcrumbs", arXiv 2312.06795.
    """

    density: tuple[float, ...] = density()
    gamma: tuple[float, ...] = number(
        "share of the largest elements that are left out", default=0.01, low=0, high=1, per_input=True
    )
    normalize: bool = flag("divide by the sum of the weights", default=False)
    rescale: str = choice("what the elements that are kept are multiplied by", "none", "l1")
    name: ClassVar[str] = "breadcrumbs"
    paper: ClassVar[Paper | None] = Paper("Model Breadcrumbs", "2312.06795")

    def check(self) -> None:
        """Refuse weights that cancel each other."""
        if self.normalize:
            self.refuse_cancelling_weights()

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of what is kept."""
        return self.linear(tensor, self.vectors(tensor), normalize=self.normalize)

    def vectors(self, tensor: MergedTensor) -> Sequence[TaskVector | None]:
        """Return what is kept of each input."""
        return [
            self._vector(tensor, weight, share, largest)
            for weight, share, largest in zip(self.weight, self.density, self.gamma, strict=True)
        ]

    def _vector(self, tensor: MergedTensor, weight: float, share: float, largest: float) -> TaskVector | None:
        from ckptkit.values.merging.task_vectors.combining import TaskVector
        from ckptkit.values.merging.task_vectors.keeping import Band, Everything

        elements = tensor.elements
        if share == 1:
            return TaskVector(Everything(), weight)
        kept = math.floor(share * elements)
        skipped = min(elements - kept, math.floor(largest * elements))
        return TaskVector(Band(elements, kept, skipped), weight, restores_l1=self.rescale == "l1") if kept else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BreadcrumbsTies(Breadcrumbs):
    """As ``breadcrumbs``, but only elements with the elected sign are added, as ``ties`` elects it.

    Source: Davari and Belilovsky, "Model Breadcrumbs", arXiv 2312.06795; Yadav et al., arXiv 2306.01708.
    """

    normalize: bool = flag("divide by the weights of the elements that are added", default=False)
    name: ClassVar[str] = "breadcrumbs_ties"

    def check(self) -> None:
        """Nothing: weights of both signs do not cancel."""

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of the elements with the elected signs."""
        return self.elected(tensor, self.vectors(tensor), normalize=self.normalize)
