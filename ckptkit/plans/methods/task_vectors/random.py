"""What methods with random masks share: where their random numbers come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.plans.methods.model import MergedTensor, choice, count, planned
from ckptkit.plans.methods.task_vectors.weighted import WeightedVectors, density

if TYPE_CHECKING:
    from ckptkit.values.merging.masks import RandomNumbers

__all__ = ["RandomVectors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomVectors(WeightedVectors):
    """A method that keeps random elements of each task vector.

    With ``masks = "counter"``, a mask depends only on ``seed``, the key of the output, the number of the input and the
    index of the element. With ``"torch"``, the masks are those of mergekit on the CPU: all tensors take the random
    numbers of torch, sorted by their keys. Then ``drawn`` numbers were taken before this tensor.
    """

    density: tuple[float, ...] = density()
    rescale: str = choice("what the elements that are kept are multiplied by", "expected", "l1", "none")
    seed: int = count("seed of the random numbers", default=0)
    masks: str = choice("where random numbers come from", "counter", "torch")
    drawn: int = planned("random numbers of torch that were taken before")

    def draws(self, elements: int) -> int:
        """Return how many random numbers of torch a tensor takes: no input with a density of 1 takes any."""
        return elements * sum(share < 1 for share in self.density) if self.masks == "torch" else 0

    def numbers(self, tensor: MergedTensor, place: int) -> RandomNumbers:
        """Return the random numbers of the input with this place, from 0."""
        from ckptkit.values.merging.masks import Stream, TorchStream

        if self.masks == "counter":
            return Stream.named(self.seed, tensor.key, tensor.numbers[place])
        before = sum(share < 1 for share in self.density[:place])
        return TorchStream(self.seed, self.drawn + before * tensor.elements)

    def probability(self, share: float) -> float:
        """Return a density as it is compared with random numbers: torch rounds it to float32."""
        import numpy as np

        return float(np.float32(share)) if self.masks == "torch" else share
