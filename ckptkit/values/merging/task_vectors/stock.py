"""Model stock: how far to go from a base to the mean of models, by the angles between their task vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.values.merging.gram import Factors, cosines
from ckptkit.values.merging.masks import BLOCK
from ckptkit.values.merging.model import Array, Facts, Identity, Merging
from ckptkit.values.workers import Workers, pieces

__all__ = ["StockByRow", "stock_factors"]


def stock_factors(gram: Array) -> Factors:
    """Return the factor of each task vector, given the dot products of all of them; a report has t."""
    import numpy as np

    count = len(gram)
    _, found = cosines(gram)
    mean = found[np.triu_indices(count, 1)].mean()
    t = float(_ratio(mean, count))
    return Factors([t / count] * count, Facts(numbers=(("t", t),)))


@dataclass(frozen=True, slots=True)
class StockByRow(Merging):
    """``base + t * mean(x_i - base)`` with a ``t`` for each row."""

    reads: tuple[int, ...]  # the base first
    row: int

    @property
    def unit(self) -> int:
        """A row."""
        return max(self.row, 1)

    @property
    def identity(self) -> Identity:
        """Each piece: the base is the result where nothing differs from it."""
        return "piece"

    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        """Find the factor of each row, and add the task vectors."""
        del start, known
        import numpy as np

        base, count = inputs[0], len(inputs) - 1
        for first, stop in pieces(len(out), max(BLOCK // self.unit, 1) * self.unit):
            made = out[first:stop].reshape(-1, self.unit)
            vectors = [vector[first:stop].reshape(made.shape) for vector in inputs[1:]]
            for vector in vectors:
                np.subtract(vector, base[first:stop].reshape(made.shape), out=vector)
            factors = _ratio(_mean_cosine(vectors, workers), count) / count
            made.fill(0)
            for vector in vectors:
                np.add(made, vector, out=made)
            np.multiply(made, factors.astype(made.dtype)[:, None], out=made)
            np.add(made, base[first:stop].reshape(made.shape), out=made)


def _mean_cosine(vectors: Sequence[Array], workers: Workers) -> Array:
    """Return the mean of the cosines of each two vectors, for each row; a row of zeros has the cosine 0."""
    import numpy as np

    wide = [workers.buffer(f"merge wide {number}", np.float64, one.size) for number, one in enumerate(vectors)]
    rows = [numbers.reshape(one.shape) for numbers, one in zip(wide, vectors, strict=True)]
    for numbers, vector in zip(rows, vectors, strict=True):
        np.copyto(numbers, vector)
    norms = [np.sqrt(np.einsum("ij,ij->i", numbers, numbers)) for numbers in rows]
    total = np.zeros(len(norms[0]))
    pairs = list(itertools.combinations(range(len(rows)), 2))
    for one, other in pairs:
        product, norm = np.einsum("ij,ij->i", rows[one], rows[other]), norms[one] * norms[other]
        total += np.clip(np.divide(product, norm, out=np.zeros_like(norm), where=norm > 0), -1, 1)
    return total / len(pairs)


def _ratio(cosine: Any, count: int) -> Any:
    """Return how far to go towards the mean: 0 if the vectors are opposite or at right angles, 1 if they are alike."""
    import numpy as np

    positive = np.maximum(cosine, 0)
    return count * positive / (1 + (count - 1) * positive)
