"""One limit for the magnitudes of many task vectors: the smallest of the largest elements of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckptkit.values.merging.payload import MergedPayload
from ckptkit.values.merging.selection import Stage, count_digits, limit_of
from ckptkit.values.workers import Workers

__all__ = ["Counted", "find_limits", "narrow_limits"]


class Counted(NamedTuple):
    """A tensor whose task vectors count: its merge, and the group of each source, or None for one that does not count.

    The first source is the base of all of them.
    """

    payload: MergedPayload
    groups: Sequence[object]


def find_limits(
    tensors: Callable[[], Iterable[Counted]], counts: Mapping[Any, int], workers: Workers
) -> dict[Any, float]:
    """Return for each group the smallest of the ``counts[group]`` largest magnitudes of all its task vectors.

    ``tensors`` is called for each pass: two over numbers of float32, and four where any tensor is computed in float64.
    A pass counts how often each value of 16 bits occurs, so the limits are exact, and the same for any order. The
    limit of a group without elements is missing. Raises ``PlanError`` for a NaN or an infinity, as the merges do.
    """
    is_wide = any(one.payload.working == "F64" for one in tensors())
    searches: dict[Any, Stage] = {group: count_digits(count) for group, count in counts.items()}
    limits: dict[Any, float] = {}

    def work(task: tuple[Counted, Any]) -> list[tuple[object, Any]]:
        import numpy as np

        one, block = task
        base, *vectors = one.payload.checked(block, workers)
        found = []
        for position, vector in zip(one.payload.merging.reads[1:], vectors, strict=True):
            stage = searches.get(one.groups[position])
            if stage is None:
                continue
            with np.errstate(all="ignore"):
                np.abs(np.subtract(vector, base, out=vector), out=vector)
            numbers = vector
            if is_wide and vector.itemsize == 4:
                numbers = workers.buffer("merge wide", np.float64, len(vector))
                np.copyto(numbers, vector)
            found.append((one.groups[position], stage.measure(numbers, workers)))
        return found

    while searches:
        seen = set()
        for parts in workers.each(work, _pieces(tensors())):
            for group, part in parts:
                searches[group].add(0, part)
                seen.add(group)
        for group, stage in list(searches.items()):
            after = stage.result() if group in seen else stage
            limit = limit_of(after)
            if limit is not None:
                limits[group] = limit
            if limit is None and isinstance(after, Stage) and group in seen:
                searches[group] = after
            else:
                del searches[group]
    return limits


def narrow_limits(limits: tuple[float, ...]) -> tuple[float, ...]:
    """Return the limits as numbers of float32 that let the same numbers of float32 pass: none is rounded down."""
    if not limits:
        return ()
    import numpy as np

    narrow = np.array(limits, np.float32)
    return tuple(np.where(narrow < np.array(limits), np.nextafter(narrow, np.float32(np.inf)), narrow).tolist())


def _pieces(tensors: Iterable[Counted]) -> Iterator[tuple[Counted, Any]]:
    for one in tensors:
        for block in one.payload.blocks():
            yield one, block
