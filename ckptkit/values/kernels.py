"""What is computed of the bytes of tensors: a kernel takes pieces, and puts the parts of a tensor together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from ckptkit.core.checkpoint.info import TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.files.payloads import Extent, announce, place_of
from ckptkit.values.arrays import array_of, real_code
from ckptkit.values.byte_codes import BYTE_CODES, extremes_of_codes, pairs_of_codes
from ckptkit.values.exponents import count_bytes, present
from ckptkit.values.extremes import INTEGERS, ExtremeColumns, Extremes, extremes_of, merge_extremes
from ckptkit.values.float_formats import FLOAT_FORMATS
from ckptkit.values.reading import Read, Source, Span, neighbours, read_bytes, reads
from ckptkit.values.workers import Workers

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "SHORT",
    "Columns",
    "ColumnsKernel",
    "ExtremesKernel",
    "Kernel",
    "MagnitudesKernel",
    "Tally",
    "computed",
    "computed_together",
    "is_short",
    "parts_of",
    "why_unsupported",
]

SHORT: Final = 1 << 12  # numbers; tensors of so many are computed together
_WIDTHS: Final = {code: dtype.part_bytes for code, dtype in DTYPES.items()}
_SUPPORTED: Final = FLOAT_FORMATS.keys() | INTEGERS | BYTE_CODES

_Part = TypeVar("_Part")
_Result_co = TypeVar("_Result_co", covariant=True)
_Row_co = TypeVar("_Row_co", covariant=True)
_Columns_co = TypeVar("_Columns_co", covariant=True)


class Kernel(Protocol[_Part, _Result_co]):
    """Arithmetic over the numbers of tensors."""

    def parts(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> list[_Part]:
        """Return what was computed of each run of numbers of dtype ``code``; a run begins at each of ``starts``."""
        ...

    def together(self, parts: list[_Part], code: str) -> _Result_co:
        """Return the result of a tensor, given its parts in order."""
        ...


class Columns(Protocol[_Row_co]):
    """The results of many tensors, in arrays."""

    def rows(self) -> Sequence[_Row_co]:
        """Return the result of each tensor."""
        ...


class ColumnsKernel(Protocol[_Columns_co]):
    """Arithmetic over the numbers of many tensors of at most ``SHORT`` numbers, with one result for all of them."""

    def columns(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> _Columns_co:
        """Return what was computed of each whole tensor; a tensor begins at each of ``starts``."""
        ...


class ExtremesKernel:
    """Counts and extremes, which need no conversion of numbers."""

    def parts(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> list[Extremes]:
        """Return the counts and extremes of each run."""
        if code in FLOAT_FORMATS or code in INTEGERS:
            return extremes_of(data, code, workers, starts).rows()
        import numpy as np

        numbers: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8)
        ends = [*starts[1:], len(numbers)]
        pairs = [
            pairs_of_codes(present(count_bytes(numbers[start:end], workers)), code)
            for start, end in zip(starts, ends, strict=True)
        ]
        return [extremes_of_codes(one, code) for one in pairs]

    def columns(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> ExtremeColumns:
        """Return the counts and extremes of each tensor."""
        if code in FLOAT_FORMATS or code in INTEGERS:
            return extremes_of(data, code, workers, starts)
        return ExtremeColumns.of(self.parts(data, code, workers, starts))

    def together(self, parts: list[Extremes], code: str) -> Extremes:  # noqa: ARG002 - other kernels need the dtype
        """Return the counts and extremes of a tensor."""
        return parts[0] if len(parts) == 1 else merge_extremes(parts)


class MagnitudesKernel:
    """The magnitudes of the finite floats that are not zero: none, one, or the smallest and the largest of several."""

    def parts(self, data: memoryview, code: str, workers: Workers, starts: Sequence[int]) -> list[set[float]]:
        """Return the magnitudes of each run."""
        import numpy as np

        if code in BYTE_CODES:
            numbers: npt.NDArray[Any] = np.frombuffer(data, np.uint8)
        else:
            numbers = np.abs(array_of(data, code).astype("f8"))
        ends = [*starts[1:], len(numbers)]
        return [_magnitudes(numbers[start:end], code, workers) for start, end in zip(starts, ends, strict=True)]

    def together(self, parts: list[set[float]], code: str) -> set[float]:  # noqa: ARG002
        """Return the magnitudes of a tensor."""
        return set().union(*parts)


def _magnitudes(numbers: npt.NDArray[Any], code: str, workers: Workers) -> set[float]:
    import numpy as np

    if code in BYTE_CODES:
        return {
            abs(value)
            for value, _ in pairs_of_codes(present(count_bytes(numbers, workers)), code)
            if value and math.isfinite(value)
        }
    magnitudes = numbers[np.isfinite(numbers) & (numbers > 0)]
    return {float(magnitudes.min()), float(magnitudes.max())} if len(magnitudes) else set()


class Tally(Generic[_Part]):
    """The parts of a tensor that are computed already."""

    __slots__ = ("bytes_left", "code", "keys", "parts", "width")

    def __init__(self, info: TensorInfo) -> None:
        """Wait for all bytes of a tensor that ``why_unsupported`` has nothing against."""
        self.keys = [info.key]
        self.code = real_code(info.dtype)
        self.width = _WIDTHS[self.code]  # the bytes of one number
        self.bytes_left = info.nbytes
        self.parts: list[_Part] = []

    def add(self, part: _Part, nbytes: int) -> bool:
        """Add the part that was computed of the next ``nbytes`` bytes, and return whether it is the last."""
        self.parts.append(part)
        self.bytes_left -= nbytes
        return self.bytes_left == 0


def why_unsupported(info: TensorInfo) -> str:
    """Return why nothing can be computed of the values of a tensor; an empty string if it can."""
    dtype = info.dtype
    if info.kind != "dense":
        return f"{info.kind} tensor"
    if dtype in FLOAT_FORMATS:  # of a million tensors, nearly all
        return ""
    if dtype == "F4" and info.elements % 2:
        return "an odd number of F4 elements, which are stored two to a byte"
    return "" if real_code(dtype) in _SUPPORTED else f"ckptkit has no arithmetic for {dtype}"


def is_short(nbytes: int, code: str) -> bool:
    """Return whether a tensor has numbers, but at most ``SHORT``; ``code`` is their dtype."""
    return 0 < nbytes <= SHORT * _WIDTHS[code]


def parts_of(
    read: Read[Tally[_Part]], data: memoryview, kernel: Kernel[_Part, object], workers: Workers
) -> list[_Part]:
    """Return what the kernel computes of each span of a read; the spans of one dtype are computed together."""
    spans = read.spans
    if len(spans) == 1:
        return kernel.parts(data[spans[0].start : spans[0].stop], spans[0].item.code, workers, (0,))
    by_code: dict[str, list[int]] = {}
    for index, span in enumerate(spans):
        by_code.setdefault(span.item.code, []).append(index)
    found: dict[int, _Part] = {}
    for code, indices in by_code.items():
        starts, at, ranges = [], 0, []
        for index in indices:
            _, start, stop, width = spans[index]
            starts.append(at // width)
            at += stop - start
            ranges.append((start, stop))
        found |= zip(indices, kernel.parts(_joined(data, ranges), code, workers, starts), strict=True)
    return [found[index] for index in range(len(spans))]


def _joined(data: memoryview, ranges: Sequence[tuple[int, int]]) -> memoryview:
    """Return the bytes of all ranges, without a copy if each begins where the one before it ends."""
    first, last = ranges[0], ranges[-1]
    if all(left[1] == right[0] for left, right in pairwise(ranges)):
        return data[first[0] : last[1]]
    return memoryview(b"".join([data[start:stop] for start, stop in ranges]))


def computed(
    sources: Iterable[Source[Tally[_Part]]], kernel: Kernel[_Part, _Result_co], workers: Workers
) -> Iterator[tuple[Tally[_Part], _Result_co | None, int]]:
    """Yield the tensor of each span that was read, the number of its bytes, and its result with its last span.

    The threads do the work; the results are the same with any number of them. Raises what reading raises.
    """

    def work(read: Read[Tally[_Part]]) -> tuple[tuple[Span[Tally[_Part]], ...], list[_Part]]:
        return read.spans, parts_of(read, read_bytes(read, workers), kernel, workers)

    for spans, parts in workers.each(work, reads(sources)):
        for (tally, start, stop, _), part in zip(spans, parts, strict=True):
            is_last = tally.add(part, stop - start)
            yield tally, kernel.together(tally.parts, tally.code) if is_last else None, stop - start


def computed_together(
    extents: Sequence[Extent], codes: Sequence[str], kernel: ColumnsKernel[_Columns_co], workers: Workers
) -> Iterator[tuple[list[int], _Columns_co, int]]:
    """Yield the results of short tensors: their positions, a result with a row for each, and the number of their bytes.

    ``codes`` are the dtypes of the numbers in ``extents``; none is empty. Neighbours in a file are read together, and
    those of one dtype are computed together. Raises what reading raises.
    """
    order = sorted(range(len(extents)), key=lambda at: place_of(extents[at]))
    ordered = [extents[at] for at in order]
    announce(ordered)

    def work(bounds: tuple[int, int]) -> list[tuple[list[int], _Columns_co, int]]:
        first, last = ordered[bounds[0]], ordered[bounds[1] - 1]
        data = workers.read("bytes", Extent(first.file, first.offset, last.offset + last.nbytes - first.offset))
        by_code: dict[str, list[int]] = {}
        for at in range(*bounds):
            by_code.setdefault(codes[order[at]], []).append(at)
        found = []
        for code, places in by_code.items():
            begins = [ordered[at].offset - first.offset for at in places]
            ranges = [(begin, begin + ordered[at].nbytes) for begin, at in zip(begins, places, strict=True)]
            ends = list(accumulate(end - begin for begin, end in ranges))
            starts = [0, *(end // _WIDTHS[code] for end in ends[:-1])]
            result = kernel.columns(_joined(data, ranges), code, workers, starts)
            found.append(([order[at] for at in places], result, ends[-1]))
        return found

    for found in workers.each(work, neighbours(ordered)):
        yield from found
