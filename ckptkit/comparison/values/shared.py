"""Compare the values of two checkpoints in the workers of an executor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.comparison.values import Comparison, compare_pairs
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.progress import Progress
from ckptkit.quantized.view import DequantizedView, dequantized
from ckptkit.rules.model import KeyMap
from ckptkit.tasks.inputs import SentInput, opened_again
from ckptkit.tasks.sharing import Part as SharedPart
from ckptkit.tasks.sharing import Sharing, name_of_part

if TYPE_CHECKING:
    from ckptkit.values.difference import BytesDiffer, Pair, Part, Tolerance

__all__ = ["SharedSides", "compare_shared"]


@dataclass(frozen=True, slots=True)
class SharedSides:
    """What shares the comparison, and the dtype of each dequantised weight of the expected and of the found side."""

    sharing: Sharing
    numbers: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})

    @classmethod
    def of(cls, sharing: Sharing, views: Sequence[DequantizedView]) -> SharedSides:
        """Return what shares the comparison of two views of its inputs."""
        expected, found = ({key: view.checkpoint[key].dtype for key in view.weights} for view in views)
        return cls(sharing, (expected, found))


class _Comparing(NamedTuple):
    names: Mapping[str, str]
    key_map: KeyMap
    dtypes: Mapping[str, str]
    tolerance: Tolerance | None
    numbers: tuple[Mapping[str, str], Mapping[str, str]]


def compare_shared(
    sides: SharedSides,
    comparison: Comparison,
    pairs: Sequence[Pair],
    tolerance: Tolerance | None,
    progress: Progress,
) -> dict[int, Part | BytesDiffer]:
    """Return what ``compare_pairs`` returns; the workers read the bytes. Raises what ``Sharing.run`` raises."""
    if not sides.sharing.pays(sum(map(_nbytes, pairs))):
        return compare_pairs(comparison, pairs, tolerance, progress)
    groups = sides.sharing.parts_of(pairs, _nbytes)
    numbers = [[pair.number for pair in group] for group in groups]
    parts = [_part(group, comparison, tolerance, sides) for group in groups]
    found: dict[int, Part | BytesDiffer] = {}
    for known, results in zip(numbers, sides.sharing.run(_compare, parts, progress), strict=True):
        found |= {known[at]: result for at, result in results.items()}
    return found


def _nbytes(pair: Pair) -> int:
    return pair.expected.nbytes + pair.found.nbytes


def _part(
    pairs: Sequence[Pair], comparison: Comparison, tolerance: Tolerance | None, sides: SharedSides
) -> SharedPart[_Comparing]:
    names, key_map, dtypes = comparison.for_worker([pair.number for pair in pairs])
    sources = {source for one in key_map.outputs().values() for source in one.sources}
    expected, found = sides.numbers
    work = _Comparing(
        names,
        key_map,
        dtypes,
        tolerance,
        (
            {key: expected[key] for key in names if key in expected},
            {key: found[key] for key in sources if key in found},
        ),
    )
    return SharedPart(sides.sharing.inputs, work, name_of_part(list(names)), sum(map(_nbytes, pairs)))


def _compare(part: SharedPart[_Comparing]) -> dict[int, Part | BytesDiffer]:
    """Return the differences by the position of the name; the pairs have the order of the names."""
    work = part.work
    with (
        _opened(part.inputs[0], work.numbers[0]) as expected,
        _opened(part.inputs[1], work.numbers[1]) as found,
        pause_gc(),
    ):
        comparison = Comparison(expected, found, work.key_map, work.names, work.dtypes)
        result = compare_pairs(comparison, comparison.pairs(), work.tolerance, lambda _: None)
        for side in (expected, found):
            side.check_unchanged()
        return result


@contextlib.contextmanager
def _opened(sent: SentInput, dtypes: Mapping[str, str]) -> Iterator[Checkpoint]:
    with opened_again(sent) as stored:
        if dtypes:
            yield dequantized(stored, "F32", wanted=lambda weight: dtypes.get(weight.key, False)).checkpoint
        else:
            yield stored
