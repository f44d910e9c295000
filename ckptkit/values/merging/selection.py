"""The largest numbers of a tensor, found in passes over its pieces, without sorting it and with bounded memory.

A sample gives two limits that almost surely lie around the smallest number that counts. One pass counts what is above
them, and gathers the few numbers between them. If the sample misleads, passes over the digits of the bits are exact in
any case. Of equal numbers, those with the lower index come first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ckptkit.values.merging.model import Array
from ckptkit.values.workers import PIECE, Workers, pieces

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "MOST_PASSES", "Cut", "Mark", "Stage", "begin", "count_digits", "kth_largest", "limit_of", "sample_ranges",
    "search", "wants_sample",
]  # fmt: skip

MOST_PASSES: Final = 7  # a sample, the numbers between two limits, four digits of float64, and the equal numbers
_SAMPLE: Final = 1 << 10  # numbers that are read together for a sample
_FEWEST_SAMPLES, _MOST_SAMPLES = 16, 512
_ERRORS: Final = 6.0  # standard errors between the estimate and a limit: such a miss costs passes, not the result
_DIGIT, _FEW_DIGIT = 16, 12  # bits, of all numbers and of the few that were gathered
_FEW: Final = 1 << 12  # numbers that are sorted
_MOST_GATHERED: Final = 1 << 24  # numbers, and at most an eighth of the tensor
_SLICE: Final = 1 << 16  # numbers that are counted together


@dataclass(frozen=True, slots=True)
class Cut:
    """The largest numbers of a tensor: all above ``value``, and the first of those that are equal to it.

    ``quotas`` says how many equal numbers count from the beginning of each piece on; None: all of them.
    """

    value: float
    quotas: Mapping[int, int] | None = None

    def mark(self, start: int) -> Mark:
        """Return what marks the numbers of the piece that begins at ``start``."""
        return Mark(self.value, None if self.quotas is None else self.quotas[start])


@dataclass(slots=True)
class Mark:
    """Marks the largest numbers of one piece, which are given in order."""

    value: float
    quota: int | None

    def into(self, numbers: Array, out: npt.NDArray[np.bool_]) -> None:
        """Set ``out`` where the next numbers of the piece are among the largest."""
        import numpy as np

        value = numbers.dtype.type(self.value)
        if self.quota is None:
            np.greater_equal(numbers, value, out=out)
            return
        np.greater(numbers, value, out=out)
        if self.quota:
            equal = np.flatnonzero(numbers == value)[: self.quota]
            out[equal] = True
            self.quota -= len(equal)


class Stage(ABC):
    """A pass over the numbers of a tensor, which must not be negative, before its largest numbers are known.

    Any thread may ``measure``; what it returns is given to ``add`` in the order of the pieces.
    """

    __slots__ = ()

    @abstractmethod
    def measure(self, numbers: Array, workers: Workers) -> Any:
        """Return what the pass needs of the numbers of one piece."""

    @abstractmethod
    def add(self, start: int, part: Any) -> None:
        """Take what was measured of the next piece, which begins at element ``start``."""

    @abstractmethod
    def result(self) -> Stage | Cut:
        """Return the next stage, or the result, after all pieces."""


def begin(elements: int, count: int) -> Stage | Cut:
    """Return how to find the ``count`` largest of so many numbers; none or all of them need no stage."""
    if count <= 0:
        return Cut(math.inf)
    return Cut(-math.inf) if count >= elements else search(elements, count)


def search(elements: int, count: int) -> Stage:
    """Return the first stage of a search for the ``count`` largest numbers, at least one and at most all of them.

    If it ``wants_sample``, it needs only the numbers of ``sample_ranges``.
    """
    return _Whole(elements, count) if elements <= PIECE else _Sampling(elements, count)


def count_digits(count: int) -> Stage:
    """Return the first stage of a search that needs no sample, and may go on over the numbers of several tensors."""
    return _Digits(count)


def limit_of(stage: Stage | Cut) -> float | None:
    """Return the smallest of the largest numbers as soon as it is known, also before equal numbers are counted."""
    return stage.value if isinstance(stage, Cut | _Equals) else None


def wants_sample(stage: Stage | Cut) -> bool:
    """Return whether a stage needs only the numbers of ``sample_ranges``."""
    return isinstance(stage, _Sampling)


def sample_ranges(elements: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the first index and the end of each range of a sample, both multiples of ``unit``.

    They are the same for every tensor of this size.
    """
    length = max(_SAMPLE // unit, 1) * unit
    number = min(max(math.isqrt(elements) // 46, _FEWEST_SAMPLES), _MOST_SAMPLES)
    space, last = elements / number, -1
    for index in range(number):
        # The golden ratio spreads the places within the spaces, so that no column of a matrix comes more often.
        place = int((index + index * 0.6180339887498949 % 1) * space)
        start = max(min(place, elements - length) // unit * unit, 0)
        if start > last:
            yield start, min(start + length, elements)
        last = start


@dataclass(slots=True, eq=False)
class _Sampling(Stage):
    """Takes some numbers for an estimate of the two limits."""

    elements: int
    count: int
    _samples: list[Array] = field(default_factory=list)

    def measure(self, numbers: Array, workers: Workers) -> Array:
        del workers
        return numbers.copy()

    def add(self, start: int, part: Array) -> None:
        del start
        self._samples.append(part)

    def result(self) -> Stage:
        import numpy as np

        together = np.sort(np.concatenate(self._samples))[::-1]
        share, size = self.count / self.elements, len(together)
        limit = together[min(int(share * size), size - 1)]
        # Neighbours are alike, so the error of the estimate is seen in how much the ranges differ from each other.
        above = np.array([np.count_nonzero(numbers > limit) / len(numbers) for numbers in self._samples])
        error = max(float(above.std()) / math.sqrt(len(above)), math.sqrt(share * (1 - share) / size))
        margin = _ERRORS * error + 16 / size
        first, last = math.floor((share - margin) * size), math.ceil((share + margin) * size)
        high = float(together[first]) if first >= 0 else math.inf
        low = float(together[last]) if last < size else 0.0
        return _Gathering(self.elements, self.count, low, high)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Of one piece: how many numbers are above the upper limit, at it and at the lower one, and those between them."""

    above: int
    at_high: int
    between: Array
    at_low: int


@dataclass(slots=True, eq=False)
class _Gathering(Stage):
    """Counts the numbers above two limits and at them, and gathers those between them.

    A limit is often a number that many others equal, so these are only counted.
    """

    elements: int
    count: int
    low: float = 0.0
    high: float = math.inf
    _parts: list[tuple[int, _Gathered]] = field(default_factory=list)
    _gathered: int = 0

    def measure(self, numbers: Array, workers: Workers) -> _Gathered:
        import numpy as np

        low, high = numbers.dtype.type(self.low), numbers.dtype.type(self.high)
        flags = workers.buffer("merge flags", np.bool_, len(numbers))
        inner = workers.buffer("merge inner", np.bool_, len(numbers))
        above = int(np.count_nonzero(np.greater(numbers, high, out=flags)))
        from_high = int(np.count_nonzero(np.greater_equal(numbers, high, out=flags)))
        from_low = int(np.count_nonzero(np.greater_equal(numbers, low, out=inner)))
        np.greater(numbers, low, out=inner)
        np.greater(inner, flags, out=inner)
        between = np.compress(inner, numbers)
        return _Gathered(above, from_high - above, between, from_low - from_high - len(between))

    @property
    def _is_too_much(self) -> bool:
        return self._gathered > max(min(self.elements // 8, _MOST_GATHERED), PIECE)

    def add(self, start: int, part: _Gathered) -> None:
        self._gathered += len(part.between)
        if self._is_too_much:
            self._parts.clear()
        else:
            self._parts.append((start, part))

    def result(self) -> Stage | Cut:
        import numpy as np

        parts, gathered = self._parts, self._gathered
        above, at_high, at_low = (
            sum(getattr(part, name) for _, part in parts) for name in ("above", "at_high", "at_low")
        )
        rest = self.count - above
        if self._is_too_much or rest <= 0 or rest > at_high + gathered + at_low:
            return _Digits(self.count)
        if rest <= at_high:
            return _cut(self.high, rest, [(start, part.at_high) for start, part in parts])
        rest -= at_high
        if rest > gathered:
            return _cut(self.low, rest - gathered, [(start, part.at_low) for start, part in parts])
        value = kth_largest([part.between for _, part in parts], rest)
        higher = sum(int(np.count_nonzero(part.between > value)) for _, part in parts)
        equal = [(start, int(np.count_nonzero(part.between == value))) for start, part in parts]
        return _cut(float(value), rest - higher, equal)


@dataclass(slots=True, eq=False)
class _Whole(_Gathering):
    """Finds the largest numbers at once if the tensor is one piece, with a sample of it; else gathers all numbers."""

    _found: Cut | None = None

    def measure(self, numbers: Array, workers: Workers) -> _Gathered | Cut:  # type: ignore[override]
        if _FEW < len(numbers) == self.elements:
            sampling = _Sampling(self.elements, self.count)
            # An odd step comes to all columns of most matrices.
            sampling.add(0, numbers[:: len(numbers) // (16 * math.isqrt(len(numbers))) | 1])
            between = sampling.result()
            between.add(0, between.measure(numbers, workers))
            found = between.result()
            if isinstance(found, Cut):
                return found
        return _Gathering.measure(self, numbers, workers)

    def add(self, start: int, part: _Gathered | Cut) -> None:
        if isinstance(part, Cut):
            self._found = part
        else:
            _Gathering.add(self, start, part)

    def result(self) -> Stage | Cut:
        return self._found or _Gathering.result(self)


@dataclass(slots=True, eq=False)
class _Digits(Stage):
    """Counts the numbers by the next digit of their bits; the digits before it are those of the wanted number."""

    count: int  # the place of the wanted number among those with the same digits
    digits: tuple[int, ...] = ()
    _width: int = 0
    _counts: list[Array] = field(default_factory=list)

    def measure(self, numbers: Array, workers: Workers) -> tuple[int, Array, Array | None]:
        import numpy as np

        width = numbers.dtype.itemsize * 8
        bits = numbers.view(f"u{numbers.dtype.itemsize}")
        shift = bits.dtype.type(width - _DIGIT * (len(self.digits) + 1))
        if self.digits:
            flags = workers.buffer("merge flags", np.bool_, len(bits))
            before = workers.buffer("merge bits", bits.dtype, len(bits))
            np.right_shift(bits, shift + bits.dtype.type(_DIGIT), out=before)
            bits = np.compress(np.equal(before, bits.dtype.type(_number(self.digits)), out=flags), bits)
        digits = workers.buffer("merge digits", np.intp, len(bits))
        np.right_shift(bits, shift, out=digits, casting="unsafe")
        np.bitwise_and(digits, (1 << _DIGIT) - 1, out=digits)
        if len(digits) < _FEW:  # of a small tensor, so that not all digits are added for each
            found, counts = np.unique(digits, return_counts=True)
            return width, counts, found
        return width, np.bincount(digits, minlength=1 << _DIGIT), None

    def add(self, start: int, part: tuple[int, Array, Array | None]) -> None:
        del start
        import numpy as np

        self._width, counts, digits = part
        if not self._counts:
            self._counts.append(np.zeros(1 << _DIGIT, np.int64))
        if digits is None:
            self._counts[0] += counts
        else:
            self._counts[0][digits] += counts

    def result(self) -> Stage | Cut:
        import numpy as np

        digit, above = _place(self._counts[0], self.count)
        digits, rest = (*self.digits, digit), self.count - above
        if len(digits) * _DIGIT < self._width:
            return _Digits(rest, digits)
        value = float(np.array([_number(digits)], f"u{self._width // 8}").view(f"f{self._width // 8}")[0])
        return Cut(value) if rest == self._counts[0][digit] else _Equals(value, rest)


@dataclass(slots=True, eq=False)
class _Equals(Stage):
    """Counts the numbers of each piece that are equal to the wanted one, of which not all count."""

    value: float
    count: int
    _equal: list[tuple[int, int]] = field(default_factory=list)

    def measure(self, numbers: Array, workers: Workers) -> int:
        import numpy as np

        flags = workers.buffer("merge flags", np.bool_, len(numbers))
        return int(np.count_nonzero(np.equal(numbers, numbers.dtype.type(self.value), out=flags)))

    def add(self, start: int, part: int) -> None:
        self._equal.append((start, part))

    def result(self) -> Stage | Cut:
        return _cut(self.value, self.count, self._equal)


def _cut(value: float, count: int, equal: Sequence[tuple[int, int]]) -> Cut:
    """Return the cut at ``value``; the first ``count`` of the numbers equal to it are among the largest.

    ``equal`` has the first index of each piece, and how many numbers of the piece are equal to the value.
    """
    if count == sum(number for _, number in equal):
        return Cut(value)
    quotas = {}
    for start, number in equal:
        quotas[start] = min(count, number)
        count -= quotas[start]
    return Cut(value, quotas)


def _number(digits: Sequence[int]) -> int:
    return sum(digit << _DIGIT * place for place, digit in enumerate(reversed(digits)))


def kth_largest(parts: Sequence[Array], count: int) -> Any:
    """Return the number that has the place ``count``, from 1, among all numbers of ``parts``, which are not negative.

    No part is sorted unless the numbers are few: equal numbers, of which weights have many, make sorting slow.
    """
    import numpy as np

    dtype = parts[0].dtype
    bits = [part.view(f"u{dtype.itemsize}") for part in parts if len(part)]  # in the same order as the numbers
    while sum(map(len, bits)) > _FEW:
        low, high = min(int(part.min()) for part in bits), max(int(part.max()) for part in bits)
        if low == high:
            return bits[0][:1].view(dtype)[0]
        kind = bits[0].dtype.type
        shift = max((high - low).bit_length() - _FEW_DIGIT, 0)
        total: Array = np.zeros(1 << _FEW_DIGIT, np.int64)
        for part in bits:
            for start, stop in pieces(len(part), _SLICE):
                digits = (part[start:stop] - kind(low)) >> kind(shift)
                total += np.bincount(digits.astype(np.intp), minlength=1 << _FEW_DIGIT)
        digit, above = _place(total, count)
        count -= above
        first = low + (digit << shift)
        last = first + (1 << shift) - 1
        bits = [part[(part >= kind(first)) & (part <= kind(min(last, high)))] for part in bits]
        bits = [part for part in bits if len(part)]
    return np.sort(np.concatenate(bits))[-count:][:1].view(dtype)[0]


def _place(counts: Array, count: int) -> tuple[int, int]:
    """Return the digit of the number with the place ``count`` from the largest, and how many have larger digits."""
    import numpy as np

    from_top = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_top, count))
    return len(counts) - 1 - index, int(from_top[index] - counts[::-1][index])
