"""How the values of two tensors differ: bytes are compared first, and numbers only where bytes differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ckptkit.core.checkpoint.payload import Payload
from ckptkit.core.torch_bridge import same_memory
from ckptkit.values.casting import cast_bytes
from ckptkit.values.difference.numbers import BLOCK, has_numbers, measure, measure_equal, measure_runs
from ckptkit.values.difference.part import UNCHANGED, Part, Tolerance, together
from ckptkit.values.difference.reading import Pair, Piece, expected_pieces, read_block, read_together, tasks
from ckptkit.values.difference.text import text_of
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BytesDiffer", "Pair", "Part", "Tolerance", "differences", "has_numbers", "text_of"]


class BytesDiffer:
    """The bytes of two tensors differ, of a dtype whose numbers are not known."""

    def __reduce__(self) -> str:
        """Stay the same object when another process sends it: results of tied tensors are compared."""
        return "_BYTES_DIFFER"


_BYTES_DIFFER: Final = BytesDiffer()


@dataclass(slots=True)
class _Progress:
    """What is known of a pair: its parts, and the pieces whose bytes are equal."""

    left: int
    parts: list[tuple[int, Part]] = field(default_factory=list)
    equal: list[int] = field(default_factory=list)
    bytes_differ: bool = False

    def add(self, piece: Piece, part: Part | BytesDiffer | None) -> None:
        self.left -= piece.stop - piece.start
        if part is None:
            self.equal.append(piece.start)
        elif isinstance(part, BytesDiffer):
            self.bytes_differ = True
        else:
            self.parts.append((piece.start, part))


def differences(
    pairs: Iterable[Pair], workers: Workers, tolerance: Tolerance | None = None
) -> Iterator[tuple[Pair, Part | BytesDiffer | None, int]]:
    """Yield pairs of which bytes were read, the number of the bytes, and the differences of the pair.

    The differences are None if its elements are equal, or if some are not compared yet: a pair comes several times.
    Both are cast to the dtype of the pair first. The results are the same with any number of threads. Raises what
    reading raises.
    """
    half_known: list[tuple[Pair, _Progress]] = []
    progress: dict[int, _Progress] = {}

    def work(task: Piece | list[Pair]) -> tuple[Piece | list[Pair], list[Part | BytesDiffer | None]]:
        if isinstance(task, list):
            return task, _compare_many(task, workers, tolerance)
        return task, [_compare_piece(task, workers, tolerance)]

    for task, found in workers.each(work, tasks(pairs)):
        if isinstance(task, list):
            for pair, part in zip(task, found, strict=True):
                yield pair, part, pair.expected.nbytes + pair.found.nbytes
            continue
        pair, nbytes = task.pair, sum(task.nbytes)
        known = progress.setdefault(pair.number, _Progress(pair.elements))
        known.add(task, found[0])
        if known.left:
            yield pair, None, nbytes
            continue
        del progress[pair.number]
        if known.bytes_differ or not known.parts or not known.equal:
            whole = together(known.parts) if known.parts else None
            yield pair, _BYTES_DIFFER if known.bytes_differ else whole, nbytes
        else:
            yield pair, None, nbytes
            half_known.append((pair, known))
    for pair, known in half_known:
        for item in workers.each(lambda piece: _measure_expected(piece, workers), expected_pieces(pair, known.equal)):
            known.parts.append(item)
        yield pair, together(known.parts), 0


def _compare_piece(piece: Piece, workers: Workers, tolerance: Tolerance | None) -> Part | BytesDiffer | None:
    """Compare a piece of a long pair, block by block: what was read is still in the cache for the arithmetic."""
    code, is_cast = piece.pair.code, piece.pair.is_cast
    parts: list[tuple[int, Part]] = []
    equal: list[tuple[int, int]] = []
    best = UNCHANGED
    for start, stop in pieces(piece.stop - piece.start, BLOCK):
        expected = _expected_block(piece, start, stop, workers)
        found = read_block(piece, 1, start, stop, workers)
        if code != piece.pair.found_code:
            found = cast_bytes(found, piece.pair.found_code, code, workers, "found as expected")
        if _are_equal(expected, found):
            equal.append((start, stop))
            continue
        if not has_numbers(code):
            return _BYTES_DIFFER
        part = measure((expected, found), code, workers, tolerance, best, is_cast=is_cast)
        best = max(best, part.largest)
        parts.append((start, part))
    if not any(part.changed for _, part in parts):
        return None
    parts += [(start, _measure_equal(piece, start, stop, workers)) for start, stop in equal]
    return together(parts)


def _compare_many(pairs: list[Pair], workers: Workers, tolerance: Tolerance | None) -> list[Part | BytesDiffer | None]:
    """Compare short pairs: those of one dtype together, since a call of numpy for each would cost more."""
    import numpy as np

    result: list[Part | BytesDiffer | None] = [None] * len(pairs)
    expected_bytes = _read("expected bytes", [pair.expected for pair in pairs], workers)
    sides = expected_bytes, _read("found bytes", [pair.found for pair in pairs], workers)
    if not any(pair.is_cast for pair in pairs) and _are_equal(*sides):
        return result
    groups: dict[tuple[str, str, str], list[tuple[int, memoryview, memoryview]]] = {}
    first = second = 0
    for number, pair in enumerate(pairs):
        end, other_end = first + pair.expected.nbytes, second + pair.found.nbytes
        codes = pair.code, pair.expected_code, pair.found_code
        expected, found = sides[0][first:end], sides[1][second:other_end]
        if pair.is_cast or bytes(expected) != bytes(found):
            if has_numbers(codes[0]):
                groups.setdefault(codes, []).append((number, expected, found))
            else:
                result[number] = _BYTES_DIFFER
        first, second = end, other_end
    for (code, expected_code, found_code), items in groups.items():
        joined = [memoryview(b"".join(sides)) for sides in ([item[1] for item in items], [item[2] for item in items])]
        counts = [pairs[number].elements for number, _, _ in items]
        starts = np.cumsum([0, *counts[:-1]])
        is_cast = not code == expected_code == found_code
        if code != expected_code:
            joined[0] = cast_bytes(joined[0], expected_code, code, workers, "expected as numbers")
        if code != found_code:
            joined[1] = cast_bytes(joined[1], found_code, code, workers, "found as expected")
        parts = measure_runs((joined[0], joined[1]), code, workers, starts, tolerance, is_cast=is_cast)
        for (number, _, _), part in zip(items, parts, strict=True):
            result[number] = part if part.changed else None
    return result


def _are_equal(expected: memoryview, found: memoryview) -> bool:
    import numpy as np

    one, other = (np.frombuffer(side, np.uint8).ctypes.data for side in (expected, found))
    return len(expected) == len(found) and same_memory(one, other, len(expected))


def _measure_expected(piece: Piece, workers: Workers) -> tuple[int, Part]:
    """Return the numbers of a piece whose bytes are equal, for the norm of its tensor."""
    blocks = pieces(piece.stop - piece.start, BLOCK)
    return piece.start, together([(start, _measure_equal(piece, start, stop, workers)) for start, stop in blocks])


def _measure_equal(piece: Piece, start: int, stop: int, workers: Workers) -> Part:
    return measure_equal(_expected_block(piece, start, stop, workers), piece.pair.code, workers)


def _expected_block(piece: Piece, start: int, stop: int, workers: Workers) -> memoryview:
    """Return some elements of the expected side in the dtype in which they are compared."""
    code, expected_code = piece.pair.code, piece.pair.expected_code
    block = read_block(piece, 0, start, stop, workers)
    return block if code == expected_code else cast_bytes(block, expected_code, code, workers, "expected as numbers")


def _read(name: str, payloads: list[Payload], workers: Workers) -> memoryview:
    """Return the bytes of all payloads, in a buffer of this thread."""
    nbytes = sum([payload.nbytes for payload in payloads])
    buffer: npt.NDArray[np.uint8] = workers.buffer(name, "u1", nbytes)
    read_together(payloads, buffer.data)
    return buffer.data
