"""SCE: the elements in which models differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Method, Paper, UsesBase, number

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = ["Sce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sce(Method):
    """``base + sum w_i e_i / sum w_i``: ``w_i`` is found, and ``e_i`` has the selected elements with the elected sign.

    Of the elements in which the inputs differ, the ``select_topk`` with the largest variance are selected; 1 selects
    all elements. The weight ``w_i`` of an input is the mean square of what is selected of its task vector; no parameter
    sets it. The sign of the sum of the selected elements is elected; 0 elects the positive sign.

    Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
    """

    select_topk: float = number("share of the elements that are selected", default=1.0, low=0, high=1)
    name: ClassVar[str] = "sce"
    paper: ClassVar[Paper | None] = Paper("FuseChat", "2408.07990")
    uses_base: ClassVar[UsesBase] = "always"

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the weighted mean of what is selected."""
        from ckptkit.values.merging.task_vectors.sce import SelectCalculateErase

        return SelectCalculateErase((0, *tensor.positions), tensor.elements, self.select_topk)
