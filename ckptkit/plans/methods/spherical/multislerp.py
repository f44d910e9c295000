"""A weighted mean of directions, with the weighted mean of the lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.averages.linear import refuse_cancelling
from ckptkit.plans.methods.model import MergedTensor, Method, Paper, UsesBase, flag, number

if TYPE_CHECKING:
    from ckptkit.values.merging.gram import Factors
    from ckptkit.values.merging.model import Array, Merging

__all__ = ["Multislerp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Multislerp(Method):
    """``m / |m| * sum w_i |x_i|`` with ``m = sum w_i x_i / |x_i|``; with a base, of ``x_i - b``, plus b.

    The source then moves m along ``v = sum w_i (u_i - (u_i . m) m)``, the part of its own sum that is orthogonal to it.
    That part is 0 for any inputs, so the step is left out.

    Source: Goddard, "Multi-SLERP", goddard.blog.
    """

    weight: tuple[float, ...] = number("weight of the input", default=1.0, per_input=True)
    normalize: bool = flag("divide the weights by their sum", default=True)
    name: ClassVar[str] = "multislerp"
    paper: ClassVar[Paper | None] = Paper("Multi-SLERP, goddard.blog")
    uses_base: ClassVar[UsesBase] = "optional"

    def check(self) -> None:
        """Refuse weights that cancel each other."""
        if self.normalize:
            refuse_cancelling(self.weight)

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the combination along the mean direction; an input of weight 0 is not read."""
        from ckptkit.values.merging.combination import combination
        from ckptkit.values.merging.gram import ByAngles

        counted = [place for place, weight in zip(tensor.positions, self.weight, strict=True) if weight]
        if not counted:
            return combination([1.0] * tensor.has_base + [0.0] * tensor.inputs, is_mean=tensor.has_base)
        base = [0] if tensor.has_base else []
        return ByAngles((*base, *counted), tensor.has_base, self.factors, self.normalize)

    def factors(self, gram: Array) -> Factors:
        """Return the factors of the tensors."""
        import numpy as np

        from ckptkit.values.merging.gram import NO_DIRECTION, Factors, cosines
        from ckptkit.values.merging.model import Facts, NoResultError

        weights = np.array([weight for weight in self.weight if weight])
        if self.normalize:
            weights = weights / weights.sum()
        norms, cosine = cosines(gram)
        if not norms.any():
            return Factors([0.0] * len(norms))
        length = np.sqrt(max(float(weights @ cosine @ weights), 0.0))
        if length < NO_DIRECTION:
            if len(weights) == 2:
                return Factors(weights.tolist(), Facts("the inputs are opposite: merged linearly"))
            raise NoResultError("the weighted directions of the inputs add up to 0")
        of_units = weights / length * float(weights @ norms)
        return Factors(np.divide(of_units, norms, out=np.zeros_like(norms), where=norms > 0).tolist())
