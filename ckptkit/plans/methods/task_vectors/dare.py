"""DARE: a random share of each task vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Paper, flag
from ckptkit.plans.methods.task_vectors.random import RandomVectors

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging
    from ckptkit.values.merging.task_vectors.combining import TaskVector

__all__ = ["DareLinear", "DareTies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DareLinear(RandomVectors):
    """``base + lambda * sum w_i kept_i``, where ``kept_i`` has each element of a task vector with some probability.

    The probability is ``density``. ``rescale = "expected"`` divides what is kept by it; ``l1`` multiplies it so that
    the sum of the magnitudes is what it was. Which elements are kept depends only on ``seed``, the key of the output,
    the number of the input and the index of the element; with ``masks = "torch"``, they are those of mergekit.

    Source: Yu et al., "Language Models are Super Mario", arXiv 2311.03099.
    """

    normalize: bool = flag("divide by the sum of the weights", default=False)
    name: ClassVar[str] = "dare_linear"
    paper: ClassVar[Paper | None] = Paper("Language Models are Super Mario", "2311.03099")

    def check(self) -> None:
        """Refuse weights that cancel each other."""
        if self.normalize:
            self.refuse_cancelling_weights()

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of what is kept."""
        return self.linear(tensor, self.vectors(tensor), normalize=self.normalize)

    def vectors(self, tensor: MergedTensor) -> Sequence[TaskVector | None]:
        """Return what is kept of each input."""
        return [self._vector(tensor, place) for place in range(tensor.inputs)]

    def _vector(self, tensor: MergedTensor, place: int) -> TaskVector | None:
        from ckptkit.values.merging.task_vectors.combining import TaskVector
        from ckptkit.values.merging.task_vectors.keeping import Everything, RandomShare

        weight, share = self.weight[place], self.density[place]
        if not share:
            return None
        if share == 1:
            return TaskVector(Everything(), weight)
        scale = 1 / share if self.rescale == "expected" else 1.0
        keeping = RandomShare(self.probability(share), self.numbers(tensor, place))
        return TaskVector(keeping, weight, scale, restores_l1=self.rescale == "l1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DareTies(DareLinear):
    """As ``dare_linear``, but only elements with the elected sign are added, as ``ties`` elects it.

    Source: Yu et al., "Language Models are Super Mario", arXiv 2311.03099; Yadav et al., arXiv 2306.01708.
    """

    normalize: bool = flag("divide by the weights of the elements that are added", default=False)
    name: ClassVar[str] = "dare_ties"

    def check(self) -> None:
        """Nothing: weights of both signs do not cancel."""

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of the elements with the elected signs."""
        return self.elected(tensor, self.vectors(tensor), normalize=self.normalize)
