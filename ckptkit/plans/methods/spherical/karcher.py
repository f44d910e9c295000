"""The Karcher mean of directions, with the mean of the lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.averages.linear import refuse_cancelling
from ckptkit.plans.methods.model import MergedTensor, Method, Paper, count, number

if TYPE_CHECKING:
    from ckptkit.values.merging.gram import Factors
    from ckptkit.values.merging.model import Array, Merging

__all__ = ["Karcher"]

_OPPOSITE = -1 + 1e-12  # the cosine below which a direction is opposite to the mean, where no arc is the shortest


@dataclass(frozen=True, slots=True, kw_only=True)
class Karcher(Method):
    """``m * sum w_i |x_i|``, where m is the point of the unit sphere with the least squared arcs to ``x_i / |x_i|``.

    From the mean direction, ``m <- exp_m(sum w_i log_m(x_i / |x_i|))`` is repeated until a step is shorter than
    ``tol``, or ``max_iter`` times. A tensor of zeros counts for the length only, and a direction that is opposite to m
    does not pull. Where the mean of the directions is 0, the result is the mean of the tensors.

    Source: arXiv 2603.04972; Karcher, "Riemannian center of mass and mollifier smoothing", 1977.
    """

    weight: tuple[float, ...] = number("weight of the input", default=1.0, low=0, per_input=True)
    max_iter: int = count("the most steps", default=10, low=0)
    tol: float = number("the length of a step that is short enough", default=1e-5, low=0)
    name: ClassVar[str] = "karcher"
    paper: ClassVar[Paper | None] = Paper("Karcher means of models", "2603.04972")

    def check(self) -> None:
        """Refuse weights of which none is above 0."""
        refuse_cancelling(self.weight)

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the combination along the mean direction; an input of weight 0 is not read."""
        from ckptkit.values.merging.gram import ByAngles

        reads = tuple(number for number, weight in zip(tensor.positions, self.weight, strict=True) if weight)
        return ByAngles(reads, tensor.has_base, self.factors)

    def factors(self, gram: Array) -> Factors:
        """Return the factors of the tensors; m is kept as a sum of the directions."""
        import numpy as np

        from ckptkit.values.merging.gram import NO_DIRECTION, Factors, cosines
        from ckptkit.values.merging.model import Facts

        weights = np.array([weight for weight in self.weight if weight])
        weights = weights / weights.sum()
        norms, cosine = cosines(gram)
        if not norms.any():
            return Factors([0.0] * len(norms))
        shares = np.where(norms > 0, weights, 0.0)
        shares = shares / shares.sum()
        length = _length(shares, cosine)
        if length < NO_DIRECTION:
            return Factors(weights.tolist(), Facts("the directions of the inputs add up to 0: merged linearly"))
        mean = shares / length
        for _ in range(self.max_iter):
            near = np.clip(cosine @ mean, -1.0, 1.0)
            angle = np.where(norms > 0, np.arccos(near), 0.0)
            sine = np.sin(angle)
            pulls = shares * np.divide(angle, sine, out=np.ones_like(angle), where=sine > 0)
            pulls[near < _OPPOSITE] = 0
            step = pulls - float(pulls @ near) * mean
            size = _length(step, cosine)
            if size < self.tol or not size:
                break
            mean = np.cos(size) * mean + np.sin(size) / size * step
            mean = mean / _length(mean, cosine)
        of_units = mean * float(weights @ norms)
        return Factors(np.divide(of_units, norms, out=np.zeros_like(norms), where=norms > 0).tolist())


def _length(of_units: Array, cosine: Array) -> float:
    """Return the length of a sum of directions with these factors."""
    return math.sqrt(max(float(of_units @ cosine @ of_units), 0.0))
