"""Linear combinations whose factors depend on the norms and the angles of the whole tensors, or of their vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from ckptkit.values.merging.combination import add_products
from ckptkit.values.merging.model import Array, Facts, Identity, Merging
from ckptkit.values.moments import dot
from ckptkit.values.workers import pieces

if TYPE_CHECKING:
    from ckptkit.values.workers import Workers

__all__ = ["NO_DIRECTION", "ByAngles", "Factors", "PairByVectors", "PairFactors", "cosines", "gram_matrix"]

# The length of a sum of unit vectors that cannot be told from 0: its square is a sum of cosines, each of which has an
# error of some 1e-16.
NO_DIRECTION: Final = 1e-7
_IN_CACHE: Final = 1 << 15  # numbers whose products are summed at once


class Factors(NamedTuple):
    """A factor for each vector, and what a user should know of them, such as that a method fell back to a mean."""

    factors: Sequence[float]
    facts: Facts = Facts()


# Gram matrices have the dot products of the vectors: gram[i, j] = x_i . x_j, in float64.
FactorsOf: TypeAlias = Callable[[Array], Factors]
# Makes two arrays of factors of the arrays |a|**2, |b|**2 and a . b, which have a number for each pair of vectors.
PairFactors: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class ByAngles(Merging):
    """``sum f_i x_i``, or ``b + sum f_i (x_i - b)`` with a base, with factors of the Gram matrix of the vectors.

    The base is the first of ``reads``. ``is_mean`` says that the result is x if all x_i are.
    """

    reads: tuple[int, ...]
    has_base: bool
    factors: FactorsOf
    is_mean: bool = True

    @property
    def passes(self) -> int:
        """One: it gives the Gram matrix."""
        return 1

    @property
    def identity(self) -> Identity:
        """The whole tensor, if the result is a mean."""
        return "tensor" if self.is_mean else "never"

    def measure(self, number: int, inputs: Sequence[Array], start: int, known: Any, workers: Workers) -> Array:
        """Return the Gram matrix of a piece."""
        del number, start, known
        return gram_matrix(_vectors(inputs, has_base=self.has_base), workers)

    def combine(self, number: int, partials: Iterable[Array], known: Any) -> Factors:
        """Add the matrices, and make the factors of them."""
        del number, known
        return self.factors(_total(partials))

    def facts(self, known: Factors) -> Facts:
        """Return the facts that came with the factors."""
        return known.facts

    def apply(self, inputs: Sequence[Array], start: int, known: Factors, out: Array, workers: Workers) -> None:
        """Multiply and add."""
        import numpy as np

        del start, workers
        add_products(_vectors(inputs, has_base=self.has_base), known.factors, out)
        if self.has_base:
            np.add(out, inputs[0], out=out)


@dataclass(frozen=True, slots=True)
class PairByVectors(Merging):
    """``f a + g b`` for each pair of vectors of two tensors, or the same of their differences from a base, plus it.

    The vectors are the rows of ``row`` numbers, or with ``are_columns`` the columns of a matrix with such rows.
    """

    reads: tuple[int, ...]
    has_base: bool
    row: int
    are_columns: bool
    factors: PairFactors

    @property
    def unit(self) -> int:
        """A row."""
        return self.row

    @property
    def passes(self) -> int:
        """None for rows; one for columns, whose sums need all rows."""
        return int(self.are_columns)

    @property
    def identity(self) -> Identity:
        """Each piece of rows, and the whole tensor of columns."""
        return "tensor" if self.are_columns else "piece"

    def measure(self, number: int, inputs: Sequence[Array], start: int, known: Any, workers: Workers) -> Array:
        """Return the sums of each column of a piece."""
        del number, start, known
        return self._sums(_vectors(inputs, has_base=self.has_base), workers)

    def combine(self, number: int, partials: Iterable[Array], known: Any) -> tuple[Array, Array]:
        """Add the sums, and make the factors of them."""
        del number, known
        squares, other_squares, products = _total(partials)
        return self.factors(squares, other_squares, products)

    def apply(
        self, inputs: Sequence[Array], start: int, known: tuple[Array, Array] | None, out: Array, workers: Workers
    ) -> None:
        """Multiply and add."""
        import numpy as np

        del start
        a, b = _vectors(inputs, has_base=self.has_base)
        factors = known or self.factors(*self._sums((a, b), workers))
        wide = [factor.astype(out.dtype) for factor in factors]
        f, g = wide if self.are_columns else [factor[:, None] for factor in wide]
        rows = out.reshape(-1, self.row)
        np.multiply(a.reshape(rows.shape), f, out=rows)
        np.multiply(b.reshape(rows.shape), g, out=b.reshape(rows.shape))
        np.add(out, b, out=out)
        if self.has_base:
            np.add(out, inputs[0], out=out)

    def _sums(self, pair: Sequence[Array], workers: Workers) -> Array:
        """Return ``|a|**2``, ``|b|**2`` and ``a . b`` of each vector of the pieces."""
        import numpy as np

        count = len(pair[0])
        a, b = (workers.buffer(f"merge wide {number}", np.float64, count) for number in range(2))
        for wide, numbers in zip((a, b), pair, strict=True):
            np.copyto(wide, numbers)
        a, b = a.reshape(-1, self.row), b.reshape(-1, self.row)
        form = "ij,ij->j" if self.are_columns else "ij,ij->i"
        return np.stack([np.einsum(form, one, other) for one, other in ((a, a), (b, b), (a, b))])


def gram_matrix(vectors: Sequence[Array], workers: Workers) -> Array:
    """Return the dot product of each two of the vectors, in float64.

    Its sums do not depend on the number of threads of a library.
    """
    import numpy as np

    count = len(vectors)
    gram = np.zeros((count, count))
    wide = [workers.buffer(f"merge wide {number}", np.float64, _IN_CACHE) for number in range(count)]
    for start, stop in pieces(len(vectors[0]), _IN_CACHE):
        parts = [row[: stop - start] for row in wide]
        for part, vector in zip(parts, vectors, strict=True):
            np.copyto(part, vector[start:stop])
        for one, other in _pairs(count):
            gram[one, other] += dot(parts[one], parts[other])
    for one, other in _pairs(count):
        gram[other, one] = gram[one, other]
    return gram


def cosines(gram: Array) -> tuple[Array, Array]:
    """Return the norms of the vectors, and the cosine of each two; with a vector of zeros, the cosine is 0."""
    import numpy as np

    norms = np.sqrt(np.diagonal(gram))
    products = np.multiply.outer(norms, norms)
    found = np.divide(gram, products, out=np.zeros_like(gram), where=products > 0)
    return norms, np.clip(found, -1.0, 1.0, out=found)


def _total(partials: Iterable[Array]) -> Array:
    """Return the sum, which is added up in the order of the pieces."""
    remaining = iter(partials)
    total = next(remaining)
    for partial in remaining:
        total += partial
    return total


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    return ((one, other) for one in range(count) for other in range(one, count))


def _vectors(inputs: Sequence[Array], *, has_base: bool) -> Sequence[Array]:
    """Return the inputs, or their differences from the first, in the same buffers."""
    if not has_base:
        return inputs
    import numpy as np

    base, *others = inputs
    return [np.subtract(other, base, out=other) for other in others]
