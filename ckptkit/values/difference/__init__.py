"""How the values of two tensors differ: bytes are compared first, and numbers only where bytes differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ckptkit.core.torch_bridge import same_memory
from ckptkit.values.casting import cast_bytes
from ckptkit.values.difference.numbers import BLOCK, has_numbers, measure, measure_equal, measure_runs
from ckptkit.values.difference.part import UNCHANGED, Part, Tolerance, together
from ckptkit.values.difference.reading import Pair, Piece, Task, expected_pieces, read_block, read_side, tasks
from ckptkit.values.difference.text import text_of
from ckptkit.values.workers import Workers, pieces

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["BytesDiffer", "Pair", "Part", "Tolerance", "differences", "has_numbers", "text_of"]


class BytesDiffer:
    """The bytes of two tensors differ, of a dtype whose numbers are not known."""


_BYTES_DIFFER: Final = BytesDiffer()


@dataclass(slots=True)
class _Progress:
    """What is known of a pair: its parts, and the pieces whose bytes are equal."""

    left: int
    parts: list[tuple[int, Part]] = field(default_factory=list)
    equal: list[int] = field(default_factory=list)
    bytes_differ: bool = False


def differences(
    pairs: Iterable[Pair], workers: Workers, tolerance: Tolerance | None = None
) -> Iterator[tuple[Pair, Part | BytesDiffer | None, int]]:
    """Yield each pair with its differences, or None if its elements are equal, and the number of bytes read since.

    Found is cast to expected's dtype first. The results are the same with any number of threads. Raises what reading
    raises.
    """
    half_known: list[tuple[Pair, _Progress]] = []
    progress: dict[int, _Progress] = {}

    def work(task: Task) -> tuple[Task, list[Part | BytesDiffer | None]]:
        return task, _compare(task, workers, tolerance)

    for task, found in workers.each(work, tasks(pairs)):
        nbytes = task.nbytes
        for piece, part in zip(task.pieces, found, strict=True):
            pair = piece.pair
            if piece.stop - piece.start == pair.elements:
                yield pair, part if isinstance(part, BytesDiffer) or part is None else together([(0, part)]), nbytes
            else:
                known = progress.setdefault(pair.number, _Progress(pair.elements))
                known.left -= piece.stop - piece.start
                if part is None:
                    known.equal.append(piece.start)
                elif isinstance(part, BytesDiffer):
                    known.bytes_differ = True
                else:
                    known.parts.append((piece.start, part))
                if not known.left:
                    del progress[pair.number]
                    if known.parts and known.equal:
                        half_known.append((pair, known))
                        continue
                    whole = together(known.parts) if known.parts else None
                    yield pair, _BYTES_DIFFER if known.bytes_differ else whole, nbytes
            nbytes = 0
    for pair, known in half_known:
        for item in workers.each(lambda piece: _measure_expected(piece, workers), expected_pieces(pair, known.equal)):
            known.parts.append(item)
        yield pair, together(known.parts), 0


def _compare(task: Task, workers: Workers, tolerance: Tolerance | None) -> list[Part | BytesDiffer | None]:
    """Return the differences of each piece."""
    if task.is_long:
        return [_compare_piece(piece, workers, tolerance) for piece in task.pieces]
    sides = _read(task.pieces, 0, workers), _read(task.pieces, 1, workers)
    return _compare_many(task.pieces, sides, workers, tolerance)


def _compare_piece(piece: Piece, workers: Workers, tolerance: Tolerance | None) -> Part | BytesDiffer | None:
    """Compare a piece of a long pair, block by block: what was read is still in the cache for the arithmetic."""
    code, found_code = piece.pair.code, piece.pair.found_code
    parts: list[tuple[int, Part]] = []
    equal: list[tuple[int, int]] = []
    best = UNCHANGED
    for start, stop in pieces(piece.stop - piece.start, BLOCK):
        expected, found = (read_block(piece, side, start, stop, workers) for side in (0, 1))
        if code != found_code:
            found = cast_bytes(found, found_code, code, workers, "found as expected")
        if _are_equal(expected, found):
            equal.append((start, stop))
            continue
        if not has_numbers(code):
            return _BYTES_DIFFER
        part = measure((expected, found), code, workers, tolerance, best, is_cast=code != found_code)
        best = max(best, part.largest)
        parts.append((start, part))
    if not any(part.changed for _, part in parts):
        return None
    parts += [(start, _measure_equal(piece, start, stop, workers)) for start, stop in equal]
    return together(parts)


def _compare_many(
    short: list[Piece], sides: tuple[memoryview, memoryview], workers: Workers, tolerance: Tolerance | None
) -> list[Part | BytesDiffer | None]:
    """Compare short pairs: those of one dtype together, since a call of numpy for each would cost more."""
    import numpy as np

    result: list[Part | BytesDiffer | None] = [None] * len(short)
    if all(piece.pair.code == piece.pair.found_code for piece in short) and _are_equal(*sides):
        return result
    groups: dict[tuple[str, str], list[tuple[int, memoryview, memoryview]]] = {}
    first = second = 0
    for number, piece in enumerate(short):
        end, other_end = first + piece.nbytes[0], second + piece.nbytes[1]
        codes = piece.pair.code, piece.pair.found_code
        expected, found = sides[0][first:end], sides[1][second:other_end]
        if codes[0] != codes[1] or bytes(expected) != bytes(found):
            if has_numbers(codes[0]):
                groups.setdefault(codes, []).append((number, expected, found))
            else:
                result[number] = _BYTES_DIFFER
        first, second = end, other_end
    for (code, found_code), items in groups.items():
        joined = [memoryview(b"".join(sides)) for sides in ([item[1] for item in items], [item[2] for item in items])]
        counts = [short[number].pair.elements for number, _, _ in items]
        starts = np.cumsum([0, *counts[:-1]])
        is_cast = code != found_code
        if is_cast:
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
    return measure_equal(read_block(piece, 0, start, stop, workers), piece.pair.code, workers)


def _read(short: list[Piece], side: int, workers: Workers) -> memoryview:
    """Return the bytes of one side of all pieces, in a buffer of this thread."""
    name = ("expected bytes", "found bytes")[side]
    buffer: npt.NDArray[np.uint8] = workers.buffer(name, "u1", sum(piece.nbytes[side] for piece in short))
    read_side(short, side, buffer.data)
    return buffer.data
