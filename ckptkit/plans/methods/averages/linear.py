"""Weighted means and sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptkit.core.text import short_number
from ckptkit.errors import ArgumentError
from ckptkit.plans.methods.model import MergedTensor, Method, Paper, flag, number

if TYPE_CHECKING:
    from ckptkit.values.merging.model import Merging

__all__ = ["Average", "Linear", "refuse_cancelling"]

_CANCELLING = 1e-8  # of the sum of the sizes of the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Method):
    """``sum w_i x_i``, divided by ``sum w_i`` with ``normalize``: the mean of models of one origin.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", arXiv 2203.05482.
    """

    weight: tuple[float, ...] = number("weight of the input", default=1.0, per_input=True)
    normalize: bool = flag("divide by the sum of the weights", default=True)
    name: ClassVar[str] = "linear"
    paper: ClassVar[Paper | None] = Paper("Model soups", "2203.05482")
    takes_complex: ClassVar[bool] = True

    def check(self) -> None:
        """Refuse weights that cancel each other."""
        if self.normalize:
            refuse_cancelling(self.weight)

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the sum with these weights."""
        from ckptkit.values.merging.combination import combination

        del tensor
        return combination(self.weight, sum(self.weight) if self.normalize else 1.0, is_mean=self.normalize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Average(Method):
    """``sum x_i / n``: the mean of models, or of snapshots of one run.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv 1803.05407;
    Kaddour, "Stop Wasting My Time!", arXiv 2209.14981.
    """

    name: ClassVar[str] = "average"
    paper: ClassVar[Paper | None] = Paper("Averaging Weights Leads to Wider Optima", "1803.05407")
    takes_complex: ClassVar[bool] = True

    def resolve(self, tensor: MergedTensor) -> Merging:
        """Return the mean."""
        from ckptkit.values.merging.combination import combination

        return combination([1.0] * tensor.inputs, tensor.inputs, is_mean=True)


def refuse_cancelling(weights: Sequence[float]) -> None:
    """Raise ``ArgumentError`` where the sum of the weights is 0, or next to 0 beside their sizes."""
    if abs(sum(weights)) <= _CANCELLING * sum(map(abs, weights)):
        shown = ", ".join(f"{short_number(weight)}" for weight in weights)
        raise ArgumentError(f"the weights ({shown}) cancel: their sum is {short_number(sum(weights))}")
