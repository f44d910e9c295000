"""What methods of task vectors share: a weight for each input, and the factor of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ckptkit.plans.methods.averages.linear import refuse_cancelling
from ckptkit.plans.methods.model import MergedTensor, Method, UsesBase, number

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging
    from ckptkit.values.merging.task_vectors.combining import TaskVector
    from ckptkit.values.merging.task_vectors.election import Election

__all__ = ["WeightedVectors", "density"]


def density(*, default: float | None = None) -> Any:
    """Return the field for the share of its elements that each input keeps."""
    return number("share of the elements that are kept", default=default, low=0, high=1, per_input=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedVectors(Method):
    """A method that adds ``lambda`` times the sum of thinned task vectors, each with its weight, to the base."""

    weight: tuple[float, ...] = number("weight of the input", per_input=True)
    lambda_: float = number("factor of the sum of all task vectors", default=1.0)
    uses_base: ClassVar[UsesBase] = "always"

    def linear(self, tensor: MergedTensor, vectors: Sequence[TaskVector | None], *, normalize: bool) -> Merging:
        """Return the sum of the vectors, divided by the sum of all weights with ``normalize``; None counts as 0."""
        return self._merging(tensor, vectors, self.lambda_ / (sum(self.weight) if normalize else 1.0))

    def elected(
        self,
        tensor: MergedTensor,
        vectors: Sequence[TaskVector | None],
        *,
        normalize: bool,
        election: Election = "weighted",
    ) -> Merging:
        """Return the sum of the elements with the elected sign; with ``normalize``, divided by their weights."""
        return self._merging(tensor, vectors, self.lambda_, election, normalizes=normalize)

    def refuse_cancelling_weights(self) -> None:
        """Raise ``ArgumentError`` where the weights cannot be divided by their sum."""
        refuse_cancelling(self.weight)

    def _merging(
        self,
        tensor: MergedTensor,
        vectors: Sequence[TaskVector | None],
        factor: float,
        election: Election | None = None,
        *,
        normalizes: bool = False,
    ) -> Merging:
        from ckptkit.values.merging.task_vectors.combining import TaskVectors

        found = zip(tensor.positions, vectors, strict=True)
        counted = [(position, vector) for position, vector in found if vector is not None and vector.weight]
        reads = (0, *(position for position, _ in counted))
        kept = tuple(vector for _, vector in counted)
        return TaskVectors(reads, tensor.elements, tensor.row, kept, factor, election, normalizes)
