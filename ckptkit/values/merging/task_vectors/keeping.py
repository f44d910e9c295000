"""Which elements of a task vector are kept: all, the largest, a band of them, or a random share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.values.merging.masks import BLOCK, RandomNumbers, bound_of
from ckptkit.values.merging.model import Array
from ckptkit.values.merging.selection import Cut, Mark, Stage, begin
from ckptkit.values.merging.task_vectors.ranks import ranks_in_rows
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["AtLeast", "Band", "Everything", "Keeper", "Keeping", "RandomByRank", "RandomShare"]


class Keeping(ABC):
    """Which elements of a task vector are kept: a frozen dataclass, with the numbers for one tensor."""

    __slots__ = ()

    @property
    def searches(self) -> tuple[Stage | Cut, ...]:
        """What must be found in the magnitudes of the whole tensor first: nothing, unless the class says so."""
        return ()

    @property
    def by_rows(self) -> bool:
        """Whether what is kept of a row depends on the whole row."""
        return False

    @abstractmethod
    def keeper(self, start: int, cuts: Sequence[Cut]) -> Keeper:
        """Return what thins the piece that begins at element ``start``; ``cuts`` are the results of the searches."""


class Keeper(ABC):
    """Thins one piece of a task vector, whose elements are given in order."""

    __slots__ = ()

    @abstractmethod
    def thin(self, vector: Array, start: int, workers: Workers) -> None:
        """Set the elements that are not kept to 0; the first one is the element ``start`` of the tensor."""


@dataclass(frozen=True, slots=True)
class Everything(Keeping, Keeper):
    """All elements."""

    def keeper(self, start: int, cuts: Sequence[Cut]) -> Keeper:
        """Return what keeps all."""
        del start, cuts
        return self

    def thin(self, vector: Array, start: int, workers: Workers) -> None:
        """Change nothing."""


@dataclass(frozen=True, slots=True)
class Band(Keeping):
    """The ``count`` elements of the largest magnitudes, but for the ``skipped`` largest."""

    elements: int
    count: int
    skipped: int = 0

    @property
    def searches(self) -> tuple[Stage | Cut, ...]:
        """Where the band ends, and where it begins."""
        ends = (self.skipped + self.count, self.skipped) if self.skipped else (self.count,)
        return tuple(begin(self.elements, end) for end in ends)

    def keeper(self, start: int, cuts: Sequence[Cut]) -> Keeper:
        """Return what keeps the band in this piece."""
        return _BandKeeper([cut.mark(start) for cut in cuts])


@dataclass(frozen=True, slots=True)
class AtLeast(Keeping):
    """All elements whose magnitude is at least ``limit``, which was found before."""

    limit: float

    @property
    def searches(self) -> tuple[Stage | Cut, ...]:
        """The limit, which needs no search."""
        return (Cut(self.limit),)

    def keeper(self, start: int, cuts: Sequence[Cut]) -> Keeper:
        """Return what keeps them in this piece."""
        return _BandKeeper([cut.mark(start) for cut in cuts])


@dataclass(frozen=True, slots=True)
class _BandKeeper(Keeper):
    marks: Sequence[Mark]

    def thin(self, vector: Array, start: int, workers: Workers) -> None:
        del start
        import numpy as np

        sizes = np.abs(vector, out=workers.buffer("merge sizes", vector.dtype, len(vector)))
        kept = workers.buffer("merge kept", np.bool_, len(vector))
        self.marks[0].into(sizes, kept)
        for mark in self.marks[1:]:
            skipped = workers.buffer("merge skipped", np.bool_, len(vector))
            mark.into(sizes, skipped)
            np.greater(kept, skipped, out=kept)
        np.multiply(vector, kept, out=vector)


@dataclass(frozen=True, slots=True)
class RandomShare(Keeping, Keeper):
    """Each element with probability ``density``, above 0 and below 1."""

    density: float
    numbers: RandomNumbers

    def keeper(self, start: int, cuts: Sequence[Cut]) -> Keeper:
        """Return what keeps the share, which is the same in any piece."""
        del start, cuts
        return self

    def thin(self, vector: Array, start: int, workers: Workers) -> None:
        """Set the others to 0."""
        import numpy as np

        bound = np.uint64(bound_of(self.density) << 40)
        for first, stop in pieces(len(vector), BLOCK):
            kept = workers.buffer("merge kept", np.bool_, stop - first)
            np.less(self.numbers.of(start + first, stop - first, workers), bound, out=kept)
            np.multiply(vector[first:stop], kept, out=vector[first:stop])


@dataclass(frozen=True, slots=True)
class RandomByRank(Keeping, Keeper):
    """Each element with a probability by the rank of its magnitude in its row, the largest with the highest.

    The probability is ``density - spread`` for the smallest and ``density + spread`` for the largest, both in (0, 1).
    With ``divides``, each kept element is divided by its own probability.
    """

    density: float
    spread: float
    row: int
    numbers: RandomNumbers
    divides: bool

    @property
    def by_rows(self) -> bool:
        """It does."""
        return True

    def keeper(self, start: int, cuts: Sequence[Cut]) -> Keeper:
        """Return what keeps the share, which is the same in any piece of whole rows."""
        del start, cuts
        return self

    def thin(self, vector: Array, start: int, workers: Workers) -> None:
        """Set the others to 0; the elements are whole rows."""
        import numpy as np

        size, kind = len(vector), vector.dtype.type
        if self.row > 1:
            sizes = np.abs(vector, out=workers.buffer("merge sizes", vector.dtype, size))
            probabilities = ranks_in_rows(sizes, self.row, workers).astype(kind, copy=False)
            np.divide(probabilities, kind(self.row - 1), out=probabilities)
            np.multiply(probabilities, kind(2 * self.spread), out=probabilities)
            np.add(probabilities, kind(self.density - self.spread), out=probabilities)
        else:
            probabilities = workers.buffer("merge probabilities", kind, size)
            probabilities.fill(self.density)
        for first, stop in pieces(size, BLOCK):
            part = probabilities[first:stop]
            kept = self._kept(part, start + first, workers)
            if self.divides:
                np.divide(vector[first:stop], part, out=vector[first:stop])
            np.multiply(vector[first:stop], kept, out=vector[first:stop])

    def _kept(self, probabilities: Array, start: int, workers: Workers) -> npt.NDArray[np.bool_]:
        import numpy as np

        size = len(probabilities)
        numbers = self.numbers.of(start, size, workers)
        np.right_shift(numbers, np.uint64(40), out=numbers)
        uniform = workers.buffer("merge uniform", np.float32, size)
        np.copyto(uniform, numbers.view(np.int64), casting="unsafe")
        np.multiply(uniform, np.float32(2.0**-24), out=uniform)
        kept: npt.NDArray[np.bool_] = workers.buffer("merge kept", np.bool_, size)
        np.less(uniform, probabilities, out=kept)
        return kept
