"""SCE: the elements in which models differ most, with weights by how far each model went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.values.merging.masks import BLOCK
from ckptkit.values.merging.model import Array, Identity, Merging
from ckptkit.values.merging.selection import MOST_PASSES, Cut, Mark, Stage, begin, sample_ranges, wants_sample
from ckptkit.values.merging.task_vectors.election import add_elected
from ckptkit.values.workers import Workers, pieces

__all__ = ["SelectCalculateErase"]


@dataclass(frozen=True, slots=True)
class _Known:
    """Which elements are selected, or how to find them, and the weights of the task vectors once they are known."""

    selected: Stage | Cut
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class SelectCalculateErase(Merging):
    """``base`` plus the weighted mean of the selected elements with the elected sign of the task vectors.

    Of the elements whose variance is not 0, the ``share`` with the largest is selected; a share of 1 selects all. The
    weight of a task vector is the mean square of what is selected of it. All sums are in float64.
    """

    reads: tuple[int, ...]  # the base first
    elements: int
    share: float

    @property
    def passes(self) -> int:
        """One for the weights, and before it those of the selection: one counts the variances that are not 0."""
        return 1 if self.share == 1 else 2 + MOST_PASSES

    @property
    def identity(self) -> Identity:
        """Each piece: the base is the result where nothing differs from it."""
        return "piece"

    def needs(self, number: int, known: Any) -> bool:
        """Return whether the weights are not known yet."""
        del number
        return known is None or known.weights is None

    def ranges(self, number: int, known: Any) -> Iterable[tuple[int, int]] | None:
        """Return the ranges of a sample, if the selection begins with one."""
        del number
        return sample_ranges(self.elements) if known is not None and wants_sample(known.selected) else None

    def measure(self, number: int, inputs: Sequence[Array], start: int, known: Any, workers: Workers) -> Any:
        """Return the number of variances that are not 0, what their selection needs, or the sums of squares."""
        del number
        import numpy as np

        vectors = _vectors(inputs)
        known = known or self._begin()
        if known is None:
            return int(np.count_nonzero(_deviations(vectors, workers)))
        if isinstance(known.selected, Stage):
            return start, known.selected.measure(_deviations(vectors, workers), workers)
        self._thin(vectors, known.selected.mark(start), workers)
        return [float(np.einsum("i,i->", vector, vector, dtype=np.float64)) for vector in vectors]

    def combine(self, number: int, partials: Iterable[Any], known: Any) -> Any:
        """Return the selection, its next stage, or the weights."""
        del number
        known = known or self._begin()
        if known is None:
            return _Known(begin(self.elements, math.floor(self.share * sum(partials))))
        if isinstance(known.selected, Stage):
            for start, part in partials:
                known.selected.add(start, part)
            return _Known(known.selected.result())
        squares = [math.fsum(several) for several in zip(*partials, strict=True)]
        total = sum(squares)
        return _Known(known.selected, tuple(square / total if total else 0.0 for square in squares))

    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        """Select, weigh and add the task vectors."""
        import numpy as np

        vectors, mark = _vectors(inputs), known.selected.mark(start)
        for first, stop in pieces(len(out), BLOCK):
            made, parts = out[first:stop], [vector[first:stop] for vector in vectors]
            self._thin(parts, mark, workers)
            scales = [1.0] * len(parts)
            add_elected(parts, scales, known.weights, made, workers, election="plain", normalizes=True)
            np.add(made, inputs[0][first:stop], out=made)

    def _begin(self) -> _Known | None:
        """Return what is known without a pass."""
        return _Known(Cut(-math.inf)) if self.share == 1 else None

    def _thin(self, vectors: Sequence[Array], mark: Mark, workers: Workers) -> None:
        import numpy as np

        if self.share == 1:
            return
        kept = workers.buffer("merge kept", np.bool_, len(vectors[0]))
        mark.into(_deviations(vectors, workers), kept)
        for vector in vectors:
            np.multiply(vector, kept, out=vector)


def _vectors(inputs: Sequence[Array]) -> list[Array]:
    import numpy as np

    return [np.subtract(vector, inputs[0], out=vector) for vector in inputs[1:]]


def _deviations(vectors: Sequence[Array], workers: Workers) -> Array:
    """Return numbers that have the order of the variances, in a buffer of this thread; 0 where all are equal.

    They are the roots of the sums of squares, which are neither 0 nor infinite in the dtype of the vectors. They are
    computed in float64, so that the order of the vectors does not show in their digits.
    """
    import numpy as np

    size, dtype = len(vectors[0]), vectors[0].dtype
    mean, wide, variances = (
        workers.buffer(f"merge {name}", np.float64, size) for name in ("mean", "wide", "variances")
    )
    mean.fill(0)
    variances.fill(0)
    for vector in vectors:
        np.add(mean, vector, out=mean)
    np.divide(mean, len(vectors), out=mean)
    for vector in vectors:
        np.subtract(vector, mean, out=wide)
        np.multiply(wide, wide, out=wide)
        np.add(variances, wide, out=variances)
    found = workers.buffer("merge found", dtype, size)
    np.copyto(found, np.sqrt(variances, out=variances), casting="same_kind")
    return found
