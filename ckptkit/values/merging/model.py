"""One method of merging with its numbers, resolved for one tensor: what a payload needs to compute its pieces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy.typing as npt

    from ckptkit.values.workers import Workers

__all__ = ["Array", "Facts", "Identity", "Merging", "NoResultError"]

Array: TypeAlias = "npt.NDArray[Any]"
# Where the result has the bits of the inputs if all that are read have the same bits: in each piece, only where the
# whole tensors are equal, or never.
Identity: TypeAlias = Literal["piece", "tensor", "never"]


class Facts(NamedTuple):
    """What a user should know of one merged tensor, and no plan can say: a sentence without the key, and numbers."""

    warning: str = ""
    numbers: tuple[tuple[str, float], ...] = ()


class NoResultError(ValueError):
    """Raised where a method has no result for the numbers of a tensor; the message is a sentence without the key."""


class Merging(ABC):
    """How one tensor is made of several: a frozen dataclass, with the numbers of one method for this tensor.

    The tensor is computed in pieces of a fixed size, in any order and by several threads. Some methods first need
    numbers of the whole tensor: each of ``passes`` measures all pieces, and combines what was measured. The arrays are
    flat, and of float32 or float64. ``inputs`` always has the arrays of the sources ``reads``, in that order.

    Attributes:
        reads: The positions of the sources that count, in ascending order; the others are not read.
        unit: How many numbers stay together: a piece has a multiple of it. 1: any; the last size of the shape: rows.
        passes: How many times the whole tensor is measured before a piece is made, at most.
        identity: Where the result has the bits of the inputs if these are equal.
        hides_nonfinite: Whether a NaN or an infinity of an input may leave no trace in the result, as where elements
            are chosen: then every input is searched for such numbers. A method with passes need not say it.
    """

    __slots__ = ()

    reads: tuple[int, ...]

    @property
    def unit(self) -> int:
        """One: a piece may be cut at any element."""
        return 1

    @property
    def passes(self) -> int:
        """None: each piece depends on its own numbers only."""
        return 0

    @property
    def identity(self) -> Identity:
        """Never, unless the method says otherwise."""
        return "never"

    @property
    def hides_nonfinite(self) -> bool:
        """No: such a number of an input makes one of the result."""
        return False

    def needs(self, number: int, known: Any) -> bool:
        """Return whether the pass with this number, from 0, must be made; the passes after it are not made either."""
        del number, known
        return True

    def ranges(self, number: int, known: Any) -> Iterable[tuple[int, int]] | None:
        """Return the first element and the end of each range that a pass reads, in order, or None for all pieces."""
        del number, known
        return None

    def measure(self, number: int, inputs: Sequence[Array], start: int, known: Any, workers: Workers) -> Any:
        """Return what a pass needs of one piece, which begins at element ``start``.

        The result must not refer to a buffer of this thread. The inputs are buffers of this thread, and may be changed.
        """
        raise NotImplementedError

    def combine(self, number: int, partials: Iterable[Any], known: Any) -> Any:
        """Return what is known after a pass, from the results of ``measure`` in the order of the pieces.

        ``partials`` is made while it is read. Raises ``NoResultError`` where the method has no result.
        """
        raise NotImplementedError

    def facts(self, known: Any) -> Facts:
        """Return what a user should know of the tensor, from what is known after the passes."""
        del known
        return Facts()

    @abstractmethod
    def apply(self, inputs: Sequence[Array], start: int, known: Any, out: Array, workers: Workers) -> None:
        """Fill ``out`` with the result for one piece, which begins at element ``start``.

        ``known`` is None without passes. The inputs are buffers of this thread, and may be changed. ``workers`` has
        further scratch buffers for as many numbers: give them names that begin with ``merge``.
        """
