"""Histograms of single tensors as numbers that the script of a report draws, for one side or for both."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ckptkit.comparison.values import ValueDiff
from ckptkit.core.text import percent, plural, printable, short_number
from ckptkit.render.stats import stats_documents
from ckptkit.statistics.columns import StatsTable
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["MOST_TENSORS", "BothSides", "HistogramRow", "Histograms", "histograms_in", "histograms_of"]

MOST_TENSORS: Final = 10_000
_MOST_BYTES: Final = 8_000_000  # of their JSON together
_FACTS: Final = ("numbers", "mean", "std", "min", "max", "zeros", "NaN", "Inf")


class HistogramRow(NamedTuple):
    """A tensor, and its statistics on each side as ``ckpt stats --json`` has them; None where a side was not measured.

    The sides are the only one, or expected and found.
    """

    key: str
    sides: tuple[Mapping[str, Any] | None, ...]


@dataclass(frozen=True, slots=True)
class Histograms:
    """The numbers of the histograms of a report.

    Attributes:
        numbers: What the script reads: the names of the sides, of the facts, and a list for each tensor.
        names: The printable names of the tensors.
        left_out: The number of tensors whose histograms would make the file too large.
    """

    numbers: Mapping[str, Any]
    names: frozenset[str]
    left_out: int

    @property
    def note(self) -> str:
        """The sentence about what was left out, or an empty string."""
        if not self.left_out:
            return ""
        return f"{plural(self.left_out, 'more histogram')} would make this file too large, and {_were(self.left_out)}"


class BothSides(NamedTuple):
    """What was measured of the tensors that differ, on both sides: each tensor, and all of a side together."""

    rows: list[HistogramRow]
    totals: tuple[tuple[str, ValueStats], ...]

    @classmethod
    def of(cls, values: ValueDiff, expected: StatsTable, found: StatsTable) -> BothSides:
        """Return the statistics of the tensors that differ, those that differ most first."""
        documents = [dict(zip(table, stats_documents(table), strict=True)) for table in (expected, found)]
        rows = [
            HistogramRow(one.key, (documents[0].get(one.key), documents[1].get(one.found.key)))
            for one in values.different
        ]
        return cls(rows, (("expected", expected.merged()), ("found", found.merged())))


def _were(count: int) -> str:
    return "is left out" if count == 1 else "are left out"


def histograms_in(document: Mapping[str, Any]) -> Histograms | None:
    """Return the histograms of the tensors or modules of a document of ``ckpt stats``; None where it has none."""
    listed = [*document.get("tensors", ()), *document.get("modules", ())] if "total" in document else []
    rows = (HistogramRow(one.get("key", one.get("module", "")), (one,)) for one in listed if "histogram" in one)
    return histograms_of(rows, ("values",))


def histograms_of(rows: Iterable[HistogramRow], sides: Sequence[str]) -> Histograms | None:
    """Return the histograms of tensors as far as a file has room for them; None if there are none."""
    rows = list(rows)
    times = Counter(printable(row.key) for row in rows)
    tensors: list[list[Any]] = []
    room, left_out = _MOST_BYTES, 0
    for row in rows:
        name = printable(row.key)
        if (
            not any(row.sides) or times[name] > 1
        ):  # long names of which the same parts are printed: nobody could tell them apart
            left_out += 1
            continue
        entry = [name, *map(_side, row.sides)]
        room -= len(json.dumps(entry))
        if room < 0 or len(tensors) == MOST_TENSORS:
            left_out += 1
            continue
        tensors.append(entry)
    if not tensors:
        return None
    numbers = {"sides": list(sides), "facts": list(_FACTS), "tensors": tensors}
    return Histograms(numbers, frozenset(entry[0] for entry in tensors), left_out)


def _side(stats: Mapping[str, Any] | None) -> list[Any] | None:
    """Return the count of numbers and of zeros, the first exponent, the counts of each, and the facts as text."""
    if stats is None:
        return None
    bins = dict(map(tuple, stats["histogram"]))
    first, last = (min(bins), max(bins)) if bins else (0, -1)
    counts = [bins.get(exponent, 0) for exponent in range(first, last + 1)]
    return [stats["numbers"], stats["zeros"], first, counts, list(_facts(stats))]


def _facts(stats: Mapping[str, Any]) -> Iterator[str]:
    yield f"{stats['numbers']:,}"
    for name in ("mean", "std", "min", "max"):
        value = stats[name]
        yield value if isinstance(value, str) else short_number(value, 4)
    yield percent(stats["zeros"] / stats["numbers"]) if stats["numbers"] else ""
    yield f"{stats['nan']:,}"
    yield f"{stats['posinf'] + stats['neginf']:,}"
