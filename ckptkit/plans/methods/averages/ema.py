"""The moving average of snapshots in their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.plans.methods.model import MergedTensor, Method, number

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = ["Ema"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ema(Method):
    """``y_1 = x_1``, ``y_k = decay * y_(k-1) + (1 - decay) * x_k``; the last y is the result.

    The inputs are snapshots of one run in their order, as those that ``torch.optim.swa_utils`` averages.
    """

    decay: float = number(
        "what remains of the average at each input", default=0.9, low=0, high=1, is_open=(False, True)
    )
    name: ClassVar[str] = "ema"
    takes_complex: ClassVar[bool] = True

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum with the weights ``decay**(n-1)``, then ``(1 - decay) * decay**(n-k)``."""
        from ckptkit.values.merging.combination import combination

        count = tensor.inputs
        others = [(1 - self.decay) * self.decay ** (count - k) for k in range(2, count + 1)]
        return combination([self.decay ** (count - 1), *others], is_mean=True)
