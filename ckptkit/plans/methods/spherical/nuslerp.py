"""Spherical linear interpolation of two tensors by their weights: of whole tensors, of rows or of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.averages.linear import refuse_cancelling
from ckptkit.plans.methods.model import MergedTensor, Method, UsesBase, choice, number

if TYPE_CHECKING:
    from ckptkit.values.merging.gram import Factors
    from ckptkit.values.merging.model import Array, Merging

__all__ = ["Nuslerp"]

_LEAST_SINE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Nuslerp(Method):
    """``(sin((1-t) o) a + sin(t o) b) / sin o`` with ``t = w_2 / (w_1 + w_2)``; linear where ``sin o < 0.001``.

    With a base, a and b are the differences from it, and it is added. ``rows`` does this for each vector along the last
    dimension, ``columns`` for each along the first. A vector of zeros counts as orthogonal to any other.

    Source: mergekit, "NuSLERP".
    """

    weight: tuple[float, ...] = number("weight of the input", default=1.0, per_input=True)
    axis: str = choice("which vectors have an angle of their own", "whole", "rows", "columns")
    name: ClassVar[str] = "nuslerp"
    uses_base: ClassVar[UsesBase] = "optional"
    fewest: ClassVar[int] = 2
    most: ClassVar[int | None] = 2

    def check(self) -> None:
        """Refuse weights that cancel each other."""
        refuse_cancelling(self.weight)

    @property
    def t(self) -> float:
        """The place between the first input and the second."""
        return self.weight[1] / sum(self.weight)

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the interpolation; at the ends, one of the inputs."""
        from ckptkit.values.merging.combination import combination
        from ckptkit.values.merging.gram import ByAngles, PairByVectors

        if self.t in (0, 1):
            base = [0.0] if tensor.has_base else []
            return combination([*base, 1 - self.t, self.t], is_mean=True)
        reads = tuple(range(tensor.positions.stop))
        if self.axis == "whole" or len(tensor.shape) < 2:
            return ByAngles(reads, tensor.has_base, self.factors)
        is_columns = self.axis == "columns"
        row = tensor.elements // max(tensor.shape[0], 1) if is_columns else tensor.row
        return PairByVectors(reads, tensor.has_base, row, is_columns, self.pair_factors)

    def factors(self, gram: Array) -> Factors:
        """Return the factors of the whole tensors."""
        from ckptkit.values.merging.gram import Factors

        f, g = self.pair_factors(gram[0, :1], gram[1, 1:], gram[0, 1:])
        return Factors((float(f[0]), float(g[0])))

    def pair_factors(self, aa: Array, bb: Array, ab: Array) -> tuple[Array, Array]:
        """Return the factors of each pair of vectors, given their dot products."""
        import numpy as np

        t, norms = self.t, np.sqrt(aa * bb)
        cosine = np.clip(np.divide(ab, norms, out=np.zeros_like(ab), where=norms > 0), -1, 1)
        angle = np.arccos(cosine)
        sine = np.sin(angle)
        is_line = sine < _LEAST_SINE
        sine = np.where(is_line, 1.0, sine)
        f = np.where(is_line, 1 - t, np.sin((1 - t) * angle) / sine)
        g = np.where(is_line, t, np.sin(t * angle) / sine)
        return f, g
