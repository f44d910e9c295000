"""A base plus what is kept of task vectors: their weighted sum, with or without an election of signs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.values.merging.masks import BLOCK
from ckptkit.values.merging.model import Array, Identity, Merging
from ckptkit.values.merging.selection import MOST_PASSES, Cut, Stage, sample_ranges, wants_sample
from ckptkit.values.merging.task_vectors.election import Election, add_elected, add_weighted
from ckptkit.values.merging.task_vectors.keeping import Keeper, Keeping
from ckptkit.values.workers import Workers, pieces

__all__ = ["TaskVector", "TaskVectors"]


@dataclass(frozen=True, slots=True)
class TaskVector:
    """What counts of one input: the elements that are kept, times ``scale`` and ``weight``.

    With ``restores_l1``, they are also multiplied so that the sum of their magnitudes is that of the whole vector.
    """

    keeping: Keeping
    weight: float
    scale: float = 1.0
    restores_l1: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found of each task vector: the results of its searches, and its further factor."""

    searches: tuple[tuple[Stage | Cut, ...], ...]
    factors: tuple[float, ...] | None

    @property
    def stages(self) -> list[Stage]:
        """The searches that have not ended."""
        return [search for several in self.searches for search in several if isinstance(search, Stage)]


@dataclass(frozen=True, slots=True)
class TaskVectors(Merging):
    """``base + factor * sum e_i``, where ``e_i`` is what is kept of input i minus the base, times its weight.

    With an ``election``, only elements with the elected sign are added. With ``normalizes``, their sum is then divided
    by the sum of the sizes of their weights.
    """

    reads: tuple[int, ...]  # the base first
    elements: int
    row: int
    vectors: tuple[TaskVector, ...]
    factor: float = 1.0
    election: Election | None = None
    normalizes: bool = False

    @property
    def unit(self) -> int:
        """Whole rows, if what is kept depends on them."""
        return self.row if any(one.keeping.by_rows for one in self.vectors) else 1

    @property
    def passes(self) -> int:
        """Those of the searches, and one for the sums of magnitudes."""
        begun = self._begin()
        return MOST_PASSES * bool(begun.stages) + (begun.factors is None)

    @property
    def identity(self) -> Identity:
        """Each piece: the base is the result where nothing differs from it."""
        return "piece"

    @property
    def hides_nonfinite(self) -> bool:
        """Whether an infinity may lose the election: as one vote of several, or by its negative weight."""
        return self.election in ("count", "plain")

    def needs(self, number: int, known: Any) -> bool:
        """Return whether something is not known yet."""
        del number
        known = known or self._begin()
        return bool(known.stages) or known.factors is None

    def ranges(self, number: int, known: Any) -> Iterator[tuple[int, int]] | None:
        """Return the ranges of a sample, if the next stages of all searches need only a sample."""
        del number
        stages = (known or self._begin()).stages
        return sample_ranges(self.elements) if stages and all(map(wants_sample, stages)) else None

    def measure(self, number: int, inputs: Sequence[Array], start: int, known: Any, workers: Workers) -> Any:
        """Return what the searches need of this piece, or the sums of the magnitudes before and after."""
        del number
        import numpy as np

        known = known or self._begin()
        for first, stop in pieces(len(inputs[0]), BLOCK):
            for vector in inputs[1:]:
                np.subtract(vector[first:stop], inputs[0][first:stop], out=vector[first:stop])
                if known.stages:
                    np.abs(vector[first:stop], out=vector[first:stop])
        if known.stages:
            found = zip(inputs[1:], known.searches, strict=True)
            stages = ((stage, vector) for vector, several in found for stage in several if isinstance(stage, Stage))
            return start, [stage.measure(vector, workers) for stage, vector in stages]
        keepers = self._keepers(start, known)
        vectors = zip(self.vectors, inputs[1:], keepers, strict=True)
        return [
            _sums(vector, keeper, self._block, start, workers) for one, vector, keeper in vectors if one.restores_l1
        ]

    def combine(self, number: int, partials: Iterable[Any], known: Any) -> Any:
        """Return the next stages of the searches, or the factors that restore the sums of the magnitudes."""
        del number
        known = known or self._begin()
        stages = known.stages
        if not stages:
            totals = [
                [math.fsum(sums) for sums in zip(*several, strict=True)] for several in zip(*partials, strict=True)
            ]
            ratios = iter([before / after if after else 1.0 for before, after in totals])
            return _Known(known.searches, tuple(next(ratios) if one.restores_l1 else 1.0 for one in self.vectors))
        for start, parts in partials:
            for stage, part in zip(stages, parts, strict=True):
                stage.add(start, part)
        searches = (
            tuple(search.result() if isinstance(search, Stage) else search for search in several)
            for several in known.searches
        )
        return _Known(tuple(searches), known.factors)

    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        """Thin, weigh and add the task vectors."""
        import numpy as np

        known = known or self._begin()
        keepers = self._keepers(start, known)
        scales = [one.scale * factor for one, factor in zip(self.vectors, known.factors, strict=True)]
        weights = [one.weight for one in self.vectors]
        for first, stop in pieces(len(out), self._block):
            made, base = out[first:stop], inputs[0][first:stop]
            vectors = [vector[first:stop] for vector in inputs[1:]]
            for vector, keeper in zip(vectors, keepers, strict=True):
                np.subtract(vector, base, out=vector)
                keeper.thin(vector, start + first, workers)
            if self.election is None:
                add_weighted(vectors, scales, weights, made)
            else:
                add_elected(vectors, scales, weights, made, workers, election=self.election, normalizes=self.normalizes)
            if self.factor != 1:
                np.multiply(made, made.dtype.type(self.factor), out=made)
            np.add(made, base, out=made)

    def _begin(self) -> _Known:
        needs_sums = any(one.restores_l1 for one in self.vectors)
        searches = tuple(one.keeping.searches for one in self.vectors)
        return _Known(searches, None if needs_sums else (1.0,) * len(self.vectors))

    @property
    def _block(self) -> int:
        """The elements that are computed together, which are whole rows if what is kept depends on them.

        The ranks of so few elements need no memory from the system.
        """
        return BLOCK if self.unit == 1 else max(BLOCK // 2 // self.unit, 1) * self.unit

    def _keepers(self, start: int, known: _Known) -> list[Keeper]:
        cuts = ([search for search in several if isinstance(search, Cut)] for several in known.searches)
        return [one.keeping.keeper(start, several) for one, several in zip(self.vectors, cuts, strict=True)]


def _sums(vector: Array, keeper: Keeper, block: int, start: int, workers: Workers) -> tuple[float, float]:
    """Return the sum of the magnitudes of a piece, and the sum of those that are kept."""
    import numpy as np

    before = after = 0.0
    for first, stop in pieces(len(vector), block):
        part = vector[first:stop]
        sizes = np.abs(part, out=workers.buffer("merge sizes", part.dtype, len(part)))
        before += float(np.sum(sizes, dtype=np.float64))
        keeper.thin(part, start + first, workers)
        after += float(np.sum(np.abs(part, out=part), dtype=np.float64))
    return before, after
