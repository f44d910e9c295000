"""Arcee fusion: the important changes of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Method, UsesBase

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = ["ArceeFusion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArceeFusion(Method):
    """The elements of the input whose importance is at least ``median + 1.5 * (q3 - q1)``, and the others of the base.

    The importance of an element is ``|x - b|``, times the divergence ``sum p log(p / q)`` of its row, which is the
    last dimension: p is the softmax of the row of the input, q that of the base, and each probability has 1e-8 added.
    The median and the quartiles are those of all elements of the tensor.

    Source: the method ``arcee_fusion`` of mergekit, https://github.com/arcee-ai/mergekit.
    """

    name: ClassVar[str] = "arcee_fusion"
    uses_base: ClassVar[UsesBase] = "always"
    most: ClassVar[int | None] = 1

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the choice between the two."""
        from ckptkit.values.merging.fusion import Fusion

        return Fusion((0, *tensor.positions), tensor.elements, tensor.row)
