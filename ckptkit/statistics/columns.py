"""Statistics of many tensors in columns: one array for each number, which takes a tenth of the memory of objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptkit.statistics.value_stats import ValueStats
from ckptkit.values.extremes import ExtremeColumns
from ckptkit.values.moments import MomentColumns, Moments, merge_moments

if TYPE_CHECKING:
    import numpy.typing as npt

    _Array = npt.NDArray[Any]

__all__ = ["Columns", "StatsTable"]


class Columns(NamedTuple):
    """The fields of many ``ValueStats``: arrays with a number for each of them.

    The extremes are float64; ``whole`` has those of rows with an exact integer among them, by row. The bins of a row
    are the entries of ``exponents`` and ``times`` from its ``bounds`` to the next.
    """

    extremes: ExtremeColumns
    moments: MomentColumns
    bounds: _Array
    exponents: _Array
    times: _Array
    whole: Mapping[int, tuple[float, float]]

    @classmethod
    def of(cls, rows: Sequence[ValueStats]) -> Columns:
        """Return the columns of these statistics."""
        import numpy as np

        sums = np.array([one.moments[1:] for one in rows], np.float64).reshape(-1, 3).T.copy()
        ends = ((row, one.min, one.max) for row, one in enumerate(rows))
        return cls(
            ExtremeColumns.of(rows),
            MomentColumns(np.array([one.moments.finite for one in rows], np.int64), *sums),
            np.cumsum([0, *(len(one.histogram) for one in rows)]),
            np.array([exponent for one in rows for exponent in one.histogram], np.int16),
            np.array([times for one in rows for times in one.histogram.values()], np.int64),
            {
                row: (low, high)
                for row, low, high in ends
                if low is not None and high is not None and int in map(type, (low, high))
            },
        )

    @classmethod
    def joined(cls, parts: Sequence[Columns]) -> Columns:
        """Return the rows of all parts, one after the other."""
        import numpy as np

        begins = np.cumsum([0, *(len(part.bounds) - 1 for part in parts)]).tolist()
        starts = np.cumsum([0, *(len(part.times) for part in parts)])
        bounds = [part.bounds[:-1] + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            ExtremeColumns._make(map(np.concatenate, zip(*(part.extremes for part in parts), strict=True))),
            MomentColumns._make(map(np.concatenate, zip(*(part.moments for part in parts), strict=True))),
            np.concatenate([*bounds, starts[-1:]]),
            np.concatenate([part.exponents for part in parts]),
            np.concatenate([part.times for part in parts]),
            {row + begin: ends for part, begin in zip(parts, begins, strict=False) for row, ends in part.whole.items()},
        )

    def take(self, rows: _Array) -> Columns:
        """Return the columns of these rows, in their order."""
        import numpy as np

        bounds = np.concatenate(([0], np.cumsum(np.diff(self.bounds)[rows])))
        bins = np.repeat(self.bounds[rows] - bounds[:-1], np.diff(bounds)) + np.arange(bounds[-1])
        whole = {}
        if self.whole:
            whole = {new: self.whole[old] for new, old in enumerate(rows.tolist()) if old in self.whole}
        return Columns(
            ExtremeColumns._make(column[rows] for column in self.extremes),
            MomentColumns._make(column[rows] for column in self.moments),
            bounds,
            self.exponents[bins],
            self.times[bins],
            whole,
        )

    def row(self, row: int) -> ValueStats:
        """Return the statistics in a row."""
        numbers, nan, posinf, neginf, zeros, subnormal = (int(column[row]) for column in self.extremes[:6])
        finite, *sums = (column[row].item() for column in self.moments)
        low, high = self.whole.get(row) or (float(self.extremes.low[row]), float(self.extremes.high[row]))
        bins = slice(int(self.bounds[row]), int(self.bounds[row + 1]))
        return ValueStats(
            numbers,
            nan,
            posinf,
            neginf,
            zeros,
            subnormal,
            low if finite else None,
            high if finite else None,
            Moments(finite, *sums),
            dict(zip(self.exponents[bins].tolist(), self.times[bins].tolist(), strict=True)),
        )

    def rows(self) -> list[ValueStats]:
        """Return the statistics of every row."""
        return list(map(self.row, range(len(self.bounds) - 1)))


class StatsTable(Mapping[str, ValueStats]):
    """The statistics of tensors or modules by name. Each is made when it is asked for; the columns are always there.

    ``columns`` has a row for each name of ``names``, in order.
    """

    __slots__ = ("_rows", "columns", "names")

    def __init__(self, names: Sequence[str], columns: Columns) -> None:
        """Give each row of the columns its name."""
        self.names = names
        self.columns = columns
        self._rows: dict[str, int] | None = None

    @classmethod
    def of(cls, named: Mapping[str, ValueStats]) -> StatsTable:
        """Return the statistics in columns."""
        return cls(list(named), Columns.of(list(named.values())))

    def __getitem__(self, name: str) -> ValueStats:
        """Return the statistics with this name."""
        return self.columns.row(self._positions()[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in order."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        """Return whether there are statistics with this name."""
        return name in self._positions()

    def _positions(self) -> dict[str, int]:
        if self._rows is None:
            self._rows = {name: row for row, name in enumerate(self.names)}
        return self._rows

    def take(self, rows: _Array) -> StatsTable:
        """Return the table of these rows, in their order."""
        return StatsTable([self.names[row] for row in rows.tolist()], self.columns.take(rows))

    def rows_of(self, names: Iterable[str]) -> _Array:
        """Return the positions of rows."""
        import numpy as np

        positions = self._positions()
        return np.array([positions[name] for name in names], np.int64)

    @property
    def std(self) -> _Array:
        """The standard deviation of each row, as ``ValueStats`` has it; NaN without finite numbers."""
        import numpy as np

        finite, _, squares, _ = self.columns.moments
        with np.errstate(all="ignore"):
            return np.sqrt(squares / finite)

    @property
    def l2(self) -> _Array:
        """The Euclidean norm of each row, as ``ValueStats`` has it; 0 without finite numbers."""
        import numpy as np

        finite, mean, squares, _ = self.columns.moments
        with np.errstate(all="ignore"):
            found: _Array = np.sqrt(squares + finite * mean * mean)
        return found

    @property
    def abs_max(self) -> _Array:
        """The largest magnitude of each row, exact for integers; NaN without finite numbers."""
        import numpy as np

        extremes, whole = self.columns.extremes, self.columns.whole
        found: _Array = np.maximum(np.abs(extremes.low), np.abs(extremes.high))
        if whole:
            found = found.astype(object)
            for row, (low, high) in whole.items():
                found[row] = max(abs(low), abs(high))
        return found

    @property
    def zero_share(self) -> _Array:
        """The share of zeros of each row."""
        import numpy as np

        found: _Array = self.columns.extremes.zeros / np.maximum(self.columns.extremes.numbers, 1)
        return found

    def merged(self) -> ValueStats:
        """Return the statistics of all rows together, as if they were one tensor."""
        import numpy as np

        columns = self.columns
        moments = merge_moments(list(map(Moments, *(column.tolist() for column in columns.moments))))
        bins: dict[int, int] = {}
        if len(columns.times):
            lowest = int(columns.exponents.min())
            totals = np.zeros(int(columns.exponents.max()) - lowest + 1, np.int64)
            np.add.at(totals, columns.exponents - lowest, columns.times)
            found = totals.nonzero()[0]
            bins = dict(zip((found + lowest).tolist(), totals[found].tolist(), strict=True))
        numbers, nan, posinf, neginf, zeros, subnormal = (int(column.sum()) for column in columns.extremes[:6])
        low, high = self._ends()
        return ValueStats(numbers, nan, posinf, neginf, zeros, subnormal, low, high, moments, bins)

    def _ends(self) -> tuple[float | None, float | None]:
        """Return the smallest and the largest number of all rows."""
        _, _, _, _, _, _, low, high = self.columns.extremes
        rows = self.columns.moments.finite.nonzero()[0]
        if not len(rows):
            return None, None
        if not self.columns.whole:
            return float(low[rows].min()), float(high[rows].max())
        pairs = zip(rows.tolist(), zip(low[rows].tolist(), high[rows].tolist(), strict=True), strict=True)
        lows, highs = zip(*(self.columns.whole.get(row, ends) for row, ends in pairs), strict=True)
        return min(lows), max(highs)
