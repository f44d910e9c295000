"""Fusion by importance: the elements of a model that changed much in rows that changed much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckptkit.values.merging.masks import BLOCK
from ckptkit.values.merging.model import Array, Identity, Merging
from ckptkit.values.merging.selection import MOST_PASSES, Cut, Stage, sample_ranges, search, wants_sample
from ckptkit.values.workers import Workers, pieces

__all__ = ["Fusion"]

_QUARTILES: Final = (0.25, 0.5, 0.75)
_SMOOTHING: Final = 1e-8  # of each probability


@dataclass(frozen=True, slots=True)
class Fusion(Merging):
    """The elements of the second tensor whose importance reaches ``median + 1.5 * (q3 - q1)``, the others of the first.

    The importance is the size of the difference, times the divergence of the softmax of the row from that of the first
    tensor. The quantile ``q`` of n elements is the one with the place ``floor(q * (n - 1))``, from 0.
    """

    reads: tuple[int, ...]
    elements: int
    row: int

    @property
    def unit(self) -> int:
        """A row."""
        return max(self.row, 1)

    @property
    def passes(self) -> int:
        """Those of the search for the quantiles."""
        return MOST_PASSES

    @property
    def identity(self) -> Identity:
        """Each piece: both inputs are the result where they are equal."""
        return "piece"

    def needs(self, number: int, known: Any) -> bool:
        """Return whether a quantile is not known yet."""
        del number
        return known is None or any(isinstance(one, Stage) for one in known)

    def ranges(self, number: int, known: Any) -> Iterable[tuple[int, int]] | None:
        """Return the rows of a sample, if the next stages of all searches need only a sample."""
        del number
        stages = _stages(known or self._begin())
        return sample_ranges(self.elements, self.unit) if stages and all(map(wants_sample, stages)) else None

    def measure(self, number: int, inputs: Sequence[Array], start: int, known: Any, workers: Workers) -> Any:
        """Return what the searches need of the importance of a piece."""
        del number
        stages = _stages(known or self._begin())
        importance = self._importance(inputs, workers)
        return start, [stage.measure(importance, workers) for stage in stages]

    def combine(self, number: int, partials: Iterable[Any], known: Any) -> Any:
        """Return the next stages, or the quantiles."""
        del number
        known = known or self._begin()
        stages = _stages(known)
        for start, parts in partials:
            for stage, part in zip(stages, parts, strict=True):
                stage.add(start, part)
        return tuple(one.result() if isinstance(one, Stage) else one for one in known)

    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        """Take the elements of the second input that are important enough."""
        del start
        import numpy as np

        lower, median, upper = (one.value for one in known)
        threshold = median + 1.5 * (upper - lower)
        np.copyto(out, inputs[0])
        np.copyto(out, inputs[1], where=self._importance(inputs, workers) >= threshold)

    def _begin(self) -> tuple[Stage | Cut, ...]:
        places = [math.floor(quantile * (self.elements - 1)) for quantile in _QUARTILES]
        return tuple(search(self.elements, self.elements - place) for place in places)

    def _importance(self, inputs: Sequence[Array], workers: Workers) -> Array:
        """Return the importance of each element, in float64, in a buffer of this thread."""
        import numpy as np

        first, second = inputs
        found = workers.buffer("merge importance", np.float64, len(first))
        for start, stop in pieces(len(first), max(BLOCK // self.unit, 1) * self.unit):
            base, other = (one[start:stop].reshape(-1, self.unit).astype(np.float64) for one in (first, second))
            part = found[start:stop].reshape(base.shape)
            np.abs(np.subtract(other, base, out=part), out=part)
            before, after = _probabilities(base), _probabilities(other)
            np.divide(after, before, out=before)
            np.log(before, out=before)
            # Its sum is not below 0, but for the error of rounding.
            divergence = np.maximum(np.einsum("ij,ij->i", after, before), 0)
            np.multiply(part, divergence[:, None], out=part)
        return found


def _stages(known: Iterable[Stage | Cut]) -> list[Stage]:
    return [one for one in known if isinstance(one, Stage)]


def _probabilities(rows: Array) -> Array:
    """Return the softmax of each row, smoothed, in place of the rows."""
    import numpy as np

    np.subtract(rows, rows.max(axis=1, keepdims=True), out=rows)
    np.exp(rows, out=rows)
    np.divide(rows, rows.sum(axis=1, keepdims=True), out=rows)
    return np.add(rows, _SMOOTHING, out=rows)
