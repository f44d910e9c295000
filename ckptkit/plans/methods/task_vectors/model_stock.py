"""Model stock: between a base and the mean of models that were trained from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Method, Paper, UsesBase, choice

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = ["ModelStock"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStock(Method):
    """``t * mean(x_i) + (1 - t) * base``: the wider the angles between the task vectors, the nearer to the base.

    ``t = N c / (1 + (N - 1) c)`` for N inputs, where ``c`` is the mean cosine of each two task vectors, of the whole
    tensor or ``per`` row; t is 0 where c is below 0. A task vector of zeros has the cosine 0.

    Source: Jang et al., "Model Stock: All we need is just a few fine-tuned models", arXiv 2403.19522.
    """

    per: str = choice("what has a t of its own", "tensor", "row")
    name: ClassVar[str] = "model_stock"
    paper: ClassVar[Paper | None] = Paper("Model Stock", "2403.19522")
    uses_base: ClassVar[UsesBase] = "always"
    fewest: ClassVar[int] = 2

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the point between the base and the mean."""
        from ckptkit.values.merging.gram import ByAngles
        from ckptkit.values.merging.task_vectors.stock import StockByRow, stock_factors

        reads = (0, *tensor.positions)
        return StockByRow(reads, tensor.row) if self.per == "row" else ByAngles(reads, True, stock_factors)
