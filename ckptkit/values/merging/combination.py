"""Linear combinations of tensors, and of their differences from a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptkit.values.merging.model import Array, Identity, Merging

if TYPE_CHECKING:
    from ckptkit.values.workers import Workers

__all__ = ["Combination", "add_products", "combination"]


@dataclass(frozen=True, slots=True)
class Combination(Merging):
    """``sum factor_i * x_i / divisor``; ``is_mean`` says that equal inputs are the result."""

    reads: tuple[int, ...]
    factors: tuple[float, ...]
    divisor: float
    is_mean: bool

    @property
    def identity(self) -> Identity:
        """Each piece, if the result is a mean."""
        return "piece" if self.is_mean else "never"

    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        """Multiply, add and divide."""
        import numpy as np

        del start, known, workers
        add_products(inputs, self.factors, out)
        if self.divisor != 1:
            np.divide(out, out.dtype.type(self.divisor), out=out)


def combination(factors: Sequence[float], divisor: float = 1.0, *, is_mean: bool) -> Combination:
    """Return the combination with a factor for each source, of which those with the factor 0 are not read."""
    reads = tuple(number for number, factor in enumerate(factors) if factor)
    return Combination(reads, tuple(factors[number] for number in reads), divisor, is_mean)


def add_products(inputs: Sequence[Array], factors: Sequence[float], out: Array) -> None:
    """Set ``out`` to the sum of the inputs times their factors; the inputs but the first are changed."""
    import numpy as np

    if not inputs:
        out.fill(0)
        return
    np.multiply(inputs[0], out.dtype.type(factors[0]), out=out)
    for numbers, factor in zip(inputs[1:], factors[1:], strict=True):
        if factor != 1:
            np.multiply(numbers, out.dtype.type(factor), out=numbers)
        np.add(out, numbers, out=out)
