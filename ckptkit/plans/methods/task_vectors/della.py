"""DELLA: a random share of each task vector, in which large elements are more often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.core.text import short_number
from ckptkit.errors import ArgumentError
from ckptkit.plans.methods.model import MergedTensor, Paper, flag, number
from ckptkit.plans.methods.task_vectors.random import RandomVectors

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging
    from ckptkit.values.merging.task_vectors.combining import TaskVector

__all__ = ["Della", "DellaLinear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DellaLinear(RandomVectors):
    """``base + lambda * sum w_i kept_i``, where a task vector keeps large elements more often than small ones.

    The elements of a row, which is the last dimension, are ranked by their magnitudes; of equal ones the first has the
    lower rank. The probability rises with the rank from ``density - epsilon``, which must be above 0, to ``density +
    epsilon``, which must be below 1: the default epsilon of 0.15 fits densities between 0.15 and 0.85. A row of one
    element keeps it with ``density``. ``rescale = "expected"`` divides each element that is kept by its own
    probability; ``l1`` multiplies all so that the sum of the magnitudes is what it was. The random numbers are those
    of ``dare_linear``.

    Source: Deep et al., "DELLA-Merging", arXiv 2406.11617.
    """

    epsilon: tuple[float, ...] = number(
        "how far probabilities are from the density: less than density and 1 - density",
        default=0.15,
        low=0,
        high=0.5,
        per_input=True,
    )
    normalize: bool = flag("divide by the sum of the weights", default=False)
    name: ClassVar[str] = "della_linear"
    paper: ClassVar[Paper | None] = Paper("DELLA-Merging", "2406.11617")

    def check(self) -> None:
        """Refuse probabilities outside of 0 to 1, and weights that cancel each other."""
        self.check_probabilities()
        if self.normalize:
            self.refuse_cancelling_weights()

    def check_probabilities(self) -> None:
        """Raise ``ArgumentError`` where a probability would not be above 0 and below 1."""
        for share, spread in zip(self.density, self.epsilon, strict=True):
            if share - spread <= 0 or share + spread >= 1:
                widest = min(share, 1 - share)
                raise ArgumentError(
                    f"density is {short_number(share)} and epsilon {short_number(spread)}, "
                    "and density - epsilon must be above 0, density + epsilon below 1",
                    hint=f"with this density, epsilon must be below {short_number(widest)}" if widest > 0 else None,
                )

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of what is kept."""
        return self.linear(tensor, self.vectors(tensor), normalize=self.normalize)

    def vectors(self, tensor: MergedTensor) -> Sequence[TaskVector]:
        """Return what is kept of each input."""
        from ckptkit.values.merging.task_vectors.combining import TaskVector
        from ckptkit.values.merging.task_vectors.keeping import RandomByRank

        divides, restores = self.rescale == "expected", self.rescale == "l1"
        found = enumerate(zip(self.weight, self.density, self.epsilon, strict=True))
        return [
            TaskVector(
                RandomByRank(share, spread, tensor.row, self.numbers(tensor, place), divides=divides),
                weight,
                restores_l1=restores,
            )
            for place, (weight, share, spread) in found
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Della(DellaLinear):
    """As ``della_linear``, but only elements with the elected sign are added, as ``ties`` elects it.

    The default epsilon of 0.15 fits densities between 0.15 and 0.85.

    Source: Deep et al., "DELLA-Merging", arXiv 2406.11617; Yadav et al., arXiv 2306.01708.
    """

    normalize: bool = flag("divide by the weights of the elements that are added", default=True)
    name: ClassVar[str] = "della"

    def check(self) -> None:
        """Refuse probabilities outside of 0 to 1."""
        self.check_probabilities()

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum of the elements with the elected signs."""
        return self.elected(tensor, self.vectors(tensor), normalize=self.normalize)
