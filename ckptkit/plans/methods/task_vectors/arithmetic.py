"""Weighted sums of task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Paper, flag
from ckptkit.plans.methods.task_vectors.weighted import WeightedVectors

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArithmetic(WeightedVectors):
    """``base + lambda * sum w_i d_i``, where ``d_i`` is input i minus the base.

    With ``normalize``, the sum is divided by the sum of the weights.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089.
    """

    normalize: bool = flag("divide by the sum of the weights", default=False)
    name: ClassVar[str] = "task_arithmetic"
    paper: ClassVar[Paper | None] = Paper("Editing Models with Task Arithmetic", "2212.04089")

    def check(self) -> None:
        """Refuse weights that cancel each other."""
        if self.normalize:
            self.refuse_cancelling_weights()

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum with these weights."""
        from ckptkit.values.merging.task_vectors.combining import TaskVector
        from ckptkit.values.merging.task_vectors.keeping import Everything

        vectors = [TaskVector(Everything(), weight) for weight in self.weight]
        return self.linear(tensor, vectors, normalize=self.normalize)
