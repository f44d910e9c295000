"""One input as it is, or scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Method, number

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = ["Passthrough"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passthrough(Method):
    """``scale * x`` of one input; without a scale, its bits."""

    scale: tuple[float, ...] = number("factor of the tensor", default=1.0, per_input=True)
    name: ClassVar[str] = "passthrough"
    most: ClassVar[int | None] = 1
    takes_complex: ClassVar[bool] = True

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the scaled tensor; with the scale 0, the input is not read."""
        from ckptkit.values.merging.combination import combination

        del tensor
        return combination(self.scale, is_mean=self.scale == (1,))
