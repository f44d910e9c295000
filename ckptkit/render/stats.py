"""Statistics of a checkpoint as a page, with a histogram per line, and as a JSON document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from types import MappingProxyType
from typing import Final, NamedTuple

from ckptkit.core.text import percent, plural, short_number
from ckptkit.render.page import Block, Line, Listing, Page, Table, table_rows
from ckptkit.render.page.sparkline import sparkline
from ckptkit.render.summary import describe, json_number, quantized_document, quantized_lines, totals_document
from ckptkit.statistics.state_dict_stats import StateDictStats, module_name
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["SORT_KEYS", "StatsView", "stats_document", "stats_page"]

_BINS = 16
_ROOT = "(root)"  # printed for the model itself, whose name is empty
_COVERED = 0.99  # share of the numbers that the bars must cover; bars become wider until they do


def _magnitude(value: float | None) -> float:
    return -1.0 if value is None else abs(value)


SORT_KEYS: Final[Mapping[str, Callable[[ValueStats], float]]] = MappingProxyType(
    {
        "numbers": lambda numbers: numbers.count,
        "mean": lambda numbers: _magnitude(numbers.mean),
        "std": lambda numbers: _magnitude(numbers.std),
        "l1": lambda numbers: _magnitude(numbers.l1),
        "l2": lambda numbers: _magnitude(numbers.l2),
        "abs-max": lambda numbers: _magnitude(numbers.abs_max),
        "zeros": lambda numbers: numbers.zero_share,
        "nan": lambda numbers: numbers.nan,
        "inf": lambda numbers: numbers.posinf + numbers.neginf,
    }
)


class StatsView(NamedTuple):
    """What a page lists: tensors, or modules down to ``depth``; the first ``top`` of them, sorted by ``sort``."""

    depth: int | None = None
    sort: str | None = None
    top: int | None = None

    def chosen(self, named: Mapping[str, ValueStats]) -> dict[str, ValueStats]:
        """Return the statistics to list, in their order; equal ones keep the order of the file."""
        items = list(named.items())
        if self.sort is not None:
            size = SORT_KEYS[self.sort]
            items.sort(key=lambda item: -size(item[1]))
        return dict(items[: self.top])


_WHOLE = StatsView()


def stats_page(result: StateDictStats, *, view: StatsView = _WHOLE, expand: bool = False) -> Page:
    """Return the page of ``ckpt stats``: a row per tensor or module, then unmeasured tensors, then the total."""
    measured = {key: tensor.numbers for key, tensor in result.tensors.items() if tensor.numbers is not None}
    total = result.total
    named = measured if view.depth is None else result.modules(view.depth)
    listed = view.chosen(named)
    keys = {tensor.info.key for tensor in result.tensors.values()}
    page: list[Block] = [Line(describe(result.checkpoint)), *quantized_lines(result.quantized, keys)]
    if listed:
        axis = _Axis.of(total)
        page += [_table(result, listed, view, axis, expand=expand), *([Line((str(axis),))] if axis else [])]
    if len(listed) < len(named):
        noun = "tensor" if view.depth is None else "module"
        page.append(Line((f"{len(listed):,} of {plural(len(named), noun)} listed",)))
    unmeasured = [
        (key, (tensor.info.dtype, str(list(tensor.info.shape)), tensor.why))
        for key, tensor in result.tensors.items()
        if tensor.numbers is None
    ]
    if unmeasured:
        page.append(Table(("not measured", "dtype", "shape", "because"), tuple(table_rows(unmeasured, expand=expand))))
    tied = sum(bool(tensor.same_as) for tensor in result.tensors.values())
    if tied:
        page.append(Line((f"{plural(tied, 'key')} of tied tensors, counted once in the total",)))
    return [*page, *([Line((_summary(total),))] if measured else [Listing(("no numbers",))])]


_GIVES_WAY: Final = ("l1", "subnormal", "l2", "numbers", "tensors", "dtype", "magnitudes", "zeros", "mean", "std")
_MEASURES: Final = ("mean", "std", "min", "max", "l1", "l2")
_FORMAT: Final = "\n".join(["%.4g"] * len(_MEASURES))  # one string, since each call to format a number takes its time


class _Column(NamedTuple):
    """A column that is shown if it has text in some row, for a count that is a field of the statistics."""

    header: str
    field: str
    is_share: bool = False

    def cell(self, numbers: ValueStats) -> str:
        """Return the text of one row."""
        count: int = getattr(numbers, self.field)
        if self.is_share:
            return _share(count, numbers.count)
        return f"{count:,}" if count else ""


_COLUMNS: Final = (
    _Column("zeros", "zeros", is_share=True),
    _Column("subnormal", "subnormal", is_share=True),
    _Column("NaN", "nan"),
    _Column("Inf", "posinf"),
    _Column("-Inf", "neginf"),
)


def _measures(numbers: ValueStats) -> Sequence[str]:
    """Return the cells of mean, deviation, extremes and norms."""
    if not numbers.finite:
        return [""] * len(_MEASURES)
    values = (numbers.mean, numbers.std, numbers.min, numbers.max, numbers.l1, numbers.l2)
    texts = (_FORMAT % values).split("\n")  # as short_number writes them, if there is no exponent
    return [
        short_number(value, 4) if "e" in text or "0.000" in text else text
        for text, value in zip(texts, values, strict=True)
    ]


def _table(
    result: StateDictStats, listed: Mapping[str, ValueStats], view: StatsView, axis: _Axis | None, *, expand: bool
) -> Table:
    columns = [column for column in _COLUMNS if any(map(attrgetter(column.field), listed.values()))]
    members: dict[str, int] = {}
    if view.depth is not None:
        for key in result.tensors:
            module = module_name(key, view.depth)
            members[module] = members.get(module, 0) + 1
    rows = []
    for name, numbers in listed.items():
        first = result.tensors[name].info.dtype if view.depth is None else f"{members[name]:,}"
        cells = (first, f"{numbers.count:,}", *_measures(numbers), *[column.cell(numbers) for column in columns])
        rows.append((name or _ROOT, (*cells, axis.bars(numbers) if axis else "")))
    first_headers = ("key", "dtype") if view.depth is None else ("module", "tensors")
    headers = (*first_headers, "numbers", *_MEASURES, *(column.header for column in columns), "magnitudes")
    right = frozenset(headers[2:-1]) | {"tensors"}
    return Table(headers, tuple(table_rows(rows, expand=expand)), right, gives_way=_GIVES_WAY)


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

    def bars(self, numbers: ValueStats) -> str:
        """Return the histogram of one row; the highest bar of each row is full."""
        return _bars(self.top, self.width, tuple(numbers.histogram.items()))

    def __str__(self) -> str:
        """Return the legend of the histograms."""
        each = "a power of two" if self.width == 1 else f"{self.width} powers of two"
        lowest = self.top - self.width * (_BINS - 1)
        return (
            f"magnitudes: {_BINS} bars; the first has all below 2^{lowest}, the others {each} each, up to 2^{self.top}"
        )


@lru_cache(maxsize=1 << 14)  # the histograms of many small tensors are equal
def _bars(top: int, width: int, histogram: tuple[tuple[int, int], ...]) -> str:
    heights = [0] * _BINS
    for exponent, times in histogram:
        heights[max(_BINS - 1 - (top - 1 - exponent) // width, 0)] += times
    return sparkline(heights)


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
    not_finite = {"NaN": total.nan, "Inf": total.posinf, "-Inf": total.neginf}
    parts += [f"{count:,} {name}" for name, count in not_finite.items() if count] or ["no NaN, no Inf"]
    return ", ".join(parts)


def stats_document(result: StateDictStats, *, view: StatsView = _WHOLE) -> dict[str, object]:
    """Return the document of ``ckpt stats --json``: NaN and Inf are strings, a histogram is a list of pairs."""
    measured = {key: tensor.numbers for key, tensor in result.tensors.items() if tensor.numbers is not None}
    keys = view.chosen(measured) if view.depth is None else measured
    modules = {} if view.depth is None else view.chosen(result.modules(view.depth))
    return {
        "schema": "ckptkit.stats/1",
        "path": result.checkpoint.path,
        "format": result.checkpoint.format,
        "tensors": [
            {
                "key": key,
                "dtype": result.tensors[key].info.dtype,
                "shape": list(result.tensors[key].info.shape),
                "same_as": result.tensors[key].same_as or None,
                **_numbers_document(numbers),
            }
            for key, numbers in keys.items()
        ],
        "modules": [{"module": module, **_numbers_document(numbers)} for module, numbers in modules.items()],
        "not_judged": [
            {"key": key, "dtype": tensor.info.dtype, "shape": list(tensor.info.shape), "reason": tensor.why}
            for key, tensor in result.tensors.items()
            if tensor.numbers is None
        ],
        "quantized": quantized_document(result.quantized, {tensor.info.key for tensor in result.tensors.values()}),
        "total": _numbers_document(result.total),
        "summary": totals_document(result.checkpoint),
    }


def _numbers_document(numbers: ValueStats) -> dict[str, object]:
    return {
        "numbers": numbers.count,
        "nan": numbers.nan,
        "posinf": numbers.posinf,
        "neginf": numbers.neginf,
        "zeros": numbers.zeros,
        "zero_share": numbers.zero_share,
        "subnormal": numbers.subnormal,
        **{
            name: json_number(getattr(numbers, name))
            for name in ("min", "max", "mean", "std", "l1", "l2", "abs_max", "constant")
        },
        "histogram": [list(pair) for pair in numbers.histogram.items()],
    }
