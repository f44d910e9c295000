"""Statistics of a checkpoint as a page, with a histogram per line, and as a JSON document."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import percent, plural, short_number
from ckptkit.render.page import Block, Line, Listing, Page, Table, Tone, table_rows
from ckptkit.render.page.head import Fact, Head, Subject
from ckptkit.render.page.sparkline import sparkline
from ckptkit.render.summary import (
    dequantized_document,
    dequantized_lines,
    describe,
    json_number,
    quantized_document,
    quantized_lines,
    totals_document,
)
from ckptkit.statistics.columns import Columns, StatsTable
from ckptkit.statistics.state_dict_stats import StateDictStats, module_name
from ckptkit.statistics.value_stats import ValueStats
from ckptkit.values.extremes import ExtremeColumns

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

__all__ = ["SORT_KEYS", "StatsView", "stats_document", "stats_documents", "stats_head", "stats_page"]

_HEIGHT = 8  # of the highest bar of a row
_BINS = 16
_ROOT = "(root)"  # printed for the model itself, whose name is empty
_COVERED = 0.99  # share of the numbers that the bars must cover; bars become wider until they do


def _magnitude(table: StatsTable, values: Array) -> Array:
    import numpy as np

    return np.where(table.columns.moments.finite > 0, np.abs(values), -1.0)


SORT_KEYS: Final[Mapping[str, Callable[[StatsTable], Array]]] = MappingProxyType(
    {
        "numbers": lambda table: table.columns.extremes.numbers,
        "mean": lambda table: _magnitude(table, table.columns.moments.mean),
        "std": lambda table: _magnitude(table, table.std),
        "l1": lambda table: _magnitude(table, table.columns.moments.l1),
        "l2": lambda table: _magnitude(table, table.l2),
        "abs-max": lambda table: _magnitude(table, table.abs_max),
        "zeros": lambda table: table.zero_share,
        "nan": lambda table: table.columns.extremes.nan,
        "inf": lambda table: table.columns.extremes.posinf + table.columns.extremes.neginf,
    }
)


class StatsView(NamedTuple):
    """What a page lists: tensors, or modules down to ``depth``; the first ``top`` of them, sorted by ``sort``."""

    depth: int | None = None
    sort: str | None = None
    top: int | None = None

    def chosen(self, named: StatsTable) -> StatsTable:
        """Return the statistics to list, in their order; equal ones keep the order of the file."""
        import numpy as np

        if self.sort is None and (self.top is None or self.top >= len(named)):
            return named
        rows = np.arange(len(named)) if self.sort is None else np.argsort(-SORT_KEYS[self.sort](named), kind="stable")
        return named.take(rows[: self.top])


_WHOLE = StatsView()


@pause_gc()
def stats_page(result: StateDictStats, *, view: StatsView = _WHOLE, expand: bool = False) -> Page:
    """Return the page of ``ckpt stats``: a row per tensor or module, then unmeasured tensors, then the total."""
    tensors = result.tensors
    measured = tensors.measured()
    total = result.total
    named = measured if view.depth is None else StatsTable.of(result.modules(view.depth))
    listed = view.chosen(named)
    page: list[Block] = [
        Line(describe(result.checkpoint)),
        *dequantized_lines(result.dequantized),
        *quantized_lines(result.quantized, _keys(result)),
    ]
    if listed:
        axis = _Axis.of(total)
        page += [_table(result, listed, view, axis, expand=expand), *([Line((str(axis),))] if axis else [])]
    if len(listed) < len(named):
        noun = "tensor" if view.depth is None else "module"
        page.append(Line((f"{len(listed):,} of {plural(len(named), noun)} listed",)))
    unmeasured = [(key, (info.dtype, str(list(info.shape)), why)) for key, info, why in _unmeasured(result)]
    if unmeasured:
        rows = tuple(table_rows(unmeasured, expand=expand))
        page.append(Table(("not measured", "dtype", "shape", "because"), rows, title="Not measured"))
    if tensors.same_as:
        page.append(Line((f"{plural(len(tensors.same_as), 'key')} of tied tensors, counted once in the total",)))
    return [*page, *([Line((_summary(total),))] if measured else [Listing(("no numbers",))])]


def stats_head(result: StateDictStats) -> Head:
    """Return the head of a report: the checkpoint, whether all numbers are finite, and the numbers of all tensors."""
    total = result.total
    subjects = (Subject("", Line(describe(result.checkpoint))),)
    if not total.count:
        return Head("stats", Line(("no numbers",)), subjects, tone="warning")
    not_finite = total.nan + total.posinf + total.neginf
    measured = plural(len(result.tensors.measured()), "tensor")
    verdict = f"{measured}, {_not_finite(total)}"
    facts = (
        Fact.of_count(total.count, "number"),
        Fact(_number(total.mean), "mean"),
        Fact(_number(total.std), "standard deviation"),
        Fact(_number(total.min), "smallest"),
        Fact(_number(total.max), "largest"),
        Fact(percent(total.zero_share), "zeros"),
        Fact(f"{not_finite:,}", "NaN and Inf", "error" if not_finite else ""),
    )
    tone: Tone = "error" if not_finite else "good"
    return Head("stats", Line((verdict,)), subjects, facts, tone, same_as=Line((_summary(total),)))


def _keys(result: StateDictStats) -> set[str]:
    return {info.key for info in result.tensors.infos.values()} if result.quantized else set()


def _unmeasured(result: StateDictStats) -> list[tuple[str, TensorInfo, str]]:
    """Return the name and the description of each tensor without numbers, and the reason."""
    tensors = result.tensors
    if not tensors.why:
        return []
    return [(key, tensor.info, tensor.why) for key, tensor in tensors.items() if tensor.numbers is None]


_GIVES_WAY: Final = ("l1", "subnormal", "l2", "numbers", "tensors", "dtype", "magnitudes", "zeros", "mean", "std")
_MEASURES: Final = ("mean", "std", "min", "max", "l1", "l2")
_FORMAT: Final = "%.4g\n" * len(_MEASURES)  # one string for many rows: each call that formats takes its time
_AT_ONCE: Final = 1 << 12  # rows


class _Column(NamedTuple):
    """A column that is shown if it has text in some row, for a count that is a column of the statistics."""

    header: str
    field: str
    is_share: bool = False

    def cells(self, extremes: ExtremeColumns) -> list[str]:
        """Return the text of each row."""
        counts: list[int] = getattr(extremes, self.field).tolist()
        if self.is_share:
            return [_share(part, whole) for part, whole in zip(counts, extremes.numbers.tolist(), strict=True)]
        return [f"{count:,}" if count else "" for count in counts]


_COLUMNS: Final = (
    _Column("zeros", "zeros", is_share=True),
    _Column("subnormal", "subnormal", is_share=True),
    _Column("NaN", "nan"),
    _Column("Inf", "posinf"),
    _Column("-Inf", "neginf"),
)


def _measures(listed: StatsTable) -> list[list[str]]:
    """Return the cells of mean, deviation, extremes and norms: a list for each of them."""
    import numpy as np

    extremes, moments = listed.columns[:2]
    numbers = np.stack([moments.mean, listed.std, extremes.low, extremes.high, moments.l1, listed.l2], axis=1)
    cells: list[str] = []
    for start in range(0, len(numbers), _AT_ONCE):
        values = numbers[start : start + _AT_ONCE].ravel().tolist()
        texts = (_FORMAT * (len(values) // len(_MEASURES)) % tuple(values)).split("\n")[:-1]
        cells += [  # as short_number writes them, but for numbers with an exponent
            short_number(value, 4) if "e" in text or "0.000" in text else text
            for text, value in zip(texts, values, strict=True)
        ]
    for row in (moments.finite == 0).nonzero()[0].tolist():
        cells[row * len(_MEASURES) : (row + 1) * len(_MEASURES)] = [""] * len(_MEASURES)
    return [cells[at :: len(_MEASURES)] for at in range(len(_MEASURES))]


def _table(result: StateDictStats, listed: StatsTable, view: StatsView, axis: _Axis | None, *, expand: bool) -> Table:
    extremes = listed.columns.extremes
    columns = [column for column in _COLUMNS if getattr(extremes, column.field).any()]
    if view.depth is None:
        infos = result.tensors.infos
        first = [infos[name].dtype for name in listed]
    else:
        members = Counter(module_name(key, view.depth) for key in result.tensors)
        first = [f"{members[name]:,}" for name in listed]
    counts = extremes.numbers.tolist()
    texts = {count: f"{count:,}" for count in set(counts)}
    cells = zip(
        first,
        [texts[count] for count in counts],
        *_measures(listed),
        *[column.cells(extremes) for column in columns],
        axis.bars(listed.columns) if axis else [""] * len(listed),
        strict=True,
    )
    rows = zip([name or _ROOT for name in listed], cells, strict=True)
    first_headers = ("key", "dtype") if view.depth is None else ("module", "tensors")
    headers = (*first_headers, "numbers", *_MEASURES, *(column.header for column in columns), "magnitudes")
    right = frozenset(headers[2:-1]) | {"tensors"}
    title = "Tensors" if view.depth is None else "Modules"
    return Table(headers, tuple(table_rows(rows, expand=expand)), right, gives_way=_GIVES_WAY, title=title)


class _Axis(NamedTuple):
    """The axis of all histograms on a page.

    The last bar ends below ``2**top``. Each bar is ``width`` powers of two wide. The first has all smaller numbers.
    """

    top: int
    width: int

    @classmethod
    def of(cls, total: ValueStats) -> _Axis | None:
        """Return the axis with the narrowest bars that cover nearly all numbers; None if all numbers are zero."""
        if not total.histogram:
            return None
        top = max(total.histogram) + 1
        wanted = _COVERED * sum(total.histogram.values())
        width = 1
        while sum(times for e, times in total.histogram.items() if e >= top - width * (_BINS - 1)) < wanted:
            width *= 2
        return cls(top, width)

    def bars(self, columns: Columns) -> list[str]:
        """Return the histogram of each row; the highest bar of each row is full."""
        import numpy as np

        bars: list[str] = []
        for start in range(0, len(columns.bounds) - 1, _AT_ONCE):
            bounds = columns.bounds[start : start + _AT_ONCE + 1]
            bins = slice(int(bounds[0]), int(bounds[-1]))
            row_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
            bar_of = np.maximum(_BINS - 1 - (self.top - 1 - columns.exponents[bins]) // self.width, 0)
            heights = np.zeros((len(bounds) - 1, _BINS), np.int64)
            np.add.at(heights, (row_of, bar_of), columns.times[bins])
            highest = np.maximum(heights.max(axis=1, keepdims=True), 1)
            steps = np.ceil(heights * _HEIGHT / highest).astype(np.uint8).tobytes()
            bars += [_bars(steps[at : at + _BINS]) for at in range(0, len(steps), _BINS)]
        return bars

    def __str__(self) -> str:
        """Return the legend of the histograms."""
        each = "a power of two" if self.width == 1 else f"{self.width} powers of two"
        lowest = self.top - self.width * (_BINS - 1)
        return (
            f"magnitudes: {_BINS} bars; the first has all below 2^{lowest}, the others {each} each, up to 2^{self.top}"
        )


@lru_cache(maxsize=1 << 14)  # the histograms of many small tensors are alike
def _bars(steps: bytes) -> str:
    return sparkline(steps)


def _number(value: float | None) -> str:
    return short_number(value, 4)


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if part else ""


def _summary(total: ValueStats) -> str:
    parts = [plural(total.count, "number")]
    if total.mean is not None:
        parts += [f"mean {_number(total.mean)}", f"std {_number(total.std)}"]
        parts += [f"from {_number(total.min)} to {_number(total.max)}"]
    parts += [f"{_share(total.zeros, total.count)} zeros"] if total.zeros else []
    return ", ".join([*parts, _not_finite(total)])


def _not_finite(total: ValueStats) -> str:
    counts = {"NaN": total.nan, "Inf": total.posinf, "-Inf": total.neginf}
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "no NaN, no Inf"


@pause_gc()
def stats_document(result: StateDictStats, *, view: StatsView = _WHOLE) -> dict[str, object]:
    """Return the document of ``ckpt stats --json``: NaN and Inf are strings, a histogram is a list of pairs."""
    tensors = result.tensors
    infos, same_as = tensors.infos, tensors.same_as
    measured = tensors.measured()
    listed = view.chosen(measured) if view.depth is None else measured
    modules = StatsTable([], Columns.of([]))
    if view.depth is not None:
        modules = view.chosen(StatsTable.of(result.modules(view.depth)))
    return {
        "schema": "ckptkit.stats/1",
        "path": result.checkpoint.path,
        "format": result.checkpoint.format,
        "tensors": [
            {
                "key": key,
                "dtype": infos[key].dtype,
                "shape": list(infos[key].shape),
                "same_as": same_as.get(key),
                **numbers,
            }
            for key, numbers in zip(listed, stats_documents(listed), strict=True)
        ],
        "modules": [
            {"module": module, **numbers} for module, numbers in zip(modules, stats_documents(modules), strict=True)
        ],
        "not_judged": [
            {"key": key, "dtype": info.dtype, "shape": list(info.shape), "reason": why}
            for key, info, why in _unmeasured(result)
        ],
        "quantized": quantized_document(result.quantized, _keys(result)),
        "dequantized": [dequantized_document(weight) for weight in result.dequantized],
        "total": next(stats_documents(StatsTable.of({"": result.total}))),
        "summary": totals_document(result.checkpoint),
    }


_COUNTS: Final = ("numbers", "nan", "posinf", "neginf", "zeros", "zero_share", "subnormal")
_FINITE: Final = ("min", "max", "mean", "std", "l1", "l2", "abs_max", "constant")


def stats_documents(table: StatsTable) -> Iterator[dict[str, object]]:
    """Yield the numbers of each row as a document."""
    columns = table.columns
    extremes, moments = columns[:2]
    counts = (*extremes[:5], table.zero_share, extremes.subnormal)
    measures = (extremes.low, extremes.high, moments.mean, table.std, moments.l1, table.l2)
    bins = list(map(list, zip(columns.exponents.tolist(), columns.times.tolist(), strict=True)))
    bounds = columns.bounds.tolist()
    rows = zip(
        zip(*(column.tolist() for column in counts), strict=True),
        zip(*(column.tolist() for column in measures), strict=True),
        moments.finite.tolist(),
        pairwise(bounds),
        strict=True,
    )
    for row, (numbers, found, finite, (first, last)) in enumerate(rows):
        values: Sequence[float | str | None] = [None] * len(_FINITE)
        if finite:
            low, high = columns.whole.get(row) or found[:2]
            is_constant = low == high and finite == numbers[0]
            measured = [low, high, *found[2:], max(abs(low), abs(high)), low if is_constant else None]
            values = measured if math.isfinite(sum(found)) else list(map(json_number, measured))
        document: dict[str, object] = dict(zip(_COUNTS, numbers, strict=True))
        document.update(zip(_FINITE, values, strict=True))
        document["histogram"] = bins[first:last]
        yield document
