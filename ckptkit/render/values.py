"""The values that differ between two checkpoints, as a page and as a JSON document."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ckptkit.comparison.gates import Gate
from ckptkit.comparison.values import SideCounts, ValueDiff, ValueDifference
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import listed, percent, plural, printable, quoted, short_number
from ckptkit.render.page import Code, Hint, Line, Listing, Page, Table
from ckptkit.render.page.head import Fact
from ckptkit.render.page.sparkline import sparkline
from ckptkit.render.summary import describe, json_number

__all__ = [
    "lists_all", "value_page", "values_answer", "values_document", "values_facts", "values_in_diff", "values_page",
]  # fmt: skip

_SHOWN = 10
_FEW_LAYERS = 3  # with fewer, the table says it all
_MOST_STACKS = 6  # of layers that a page shows
_LINE = 80  # columns
_BESIDE_BARS = 32  # columns for spaces, and for the largest change
_LEAST_BARS = 16
_MANY_ULPS = 1_000_000  # 0.0 and 1.0 of F32 are a thousand times as far apart
_LEAST = 5e-324  # a change without a size
_LAYER = re.compile(r"(?:^|\.)([0-9]{1,6})(?=\.|$)")


def values_page(result: ValueDiff, *, expand: bool = False, depth: int | None = None, quantized: int = 0) -> Page:
    """Return the page of ``compare_values``: the answer, the ten worst tensors or all, and the change by layer.

    With ``depth``, a row for each module down to it takes the place of tensors and layers. ``quantized`` is the number
    of weights that were not compared because one side has them as codes.
    """
    if depth is not None:
        return [*_answer(result, quantized), *_remarks(result, quantized), _module_table(result, depth)]
    shown = result.different if expand else result.different[:_SHOWN]
    more = len(result.different) - len(shown)
    layers = _layer_lines(result)
    return [
        *_answer(result, quantized),
        *_remarks(result, quantized),
        _table(shown),
        *([Line((f"and {plural(more, 'more tensor')}",))] if more else []),
        *([Listing(layers, drawn_as="changes")] if layers else []),
    ]


def lists_all(result: ValueDiff) -> bool:
    """Return whether the page lists all tensors that differ without ``expand`` too."""
    return len(result.different) <= _SHOWN


def values_document(result: ValueDiff) -> dict[str, object]:
    """Return the document of ``compare_values``."""
    return {"schema": "ckptkit.values/1", **_values(result)}


def values_in_diff(values: ValueDiff, gates: Iterable[Gate]) -> dict[str, object]:
    """Return what the document of ``ckpt diff --values`` has as ``"values"``."""
    judged = [
        {
            "gate": gate.name,
            "value": gate.value if isinstance(gate.value, str) else json_number(gate.value),
            "tensors": gate.tensors,
            "left_out": gate.left_out,
            "holds": gate.broken is None,
            "hint": gate.hint or None,
        }
        for gate in gates
    ]
    return {**_values(values), "gates": judged}


def _values(values: ValueDiff) -> dict[str, object]:
    return {
        "compared": values.compared,
        "equal": values.equal,
        "different": [_difference_document(one) for one in values.different],
        "within": [_difference_document(one) for one in values.within],
        "skipped": [{"key": one.key, "reason": one.reason} for one in values.skipped],
        "as_stored": list(values.as_stored),
        "rtol": json_number(values.rtol),
        "atol": json_number(values.atol),
    }


def _difference_document(one: ValueDifference) -> dict[str, object]:
    return {
        "key": one.key,
        "found_key": one.found.key,
        "names": list(one.names),
        "max_abs": json_number(one.max_abs),
        "mean_abs": json_number(one.mean_abs),
        "rel_l2": json_number(one.rel_l2),
        "cosine": json_number(one.cosine),
        "changed": one.changed,
        "changed_elements": one.changed_elements,
        "beyond": one.beyond,
        "nonfinite": one.nonfinite,
        "max_ulp": one.max_ulp,
        "nan": _side_counts(one.nan),
        "inf": _side_counts(one.inf),
        "place": None if one.place is None else list(one.place),
        "values": None if one.place is None else list(one.values),
    }


def _side_counts(counts: SideCounts) -> dict[str, int]:
    return {"expected": counts.expected, "found": counts.found}


def values_answer(values: ValueDiff, quantized: int) -> Line:
    """Return the first line of the page: how many tensors differ."""
    return _answer(values, quantized)[0]


def values_facts(values: ValueDiff) -> list[Fact]:
    """Return how many tensors differ and the largest relative change, for the head of a report."""
    count = len(values.different)
    facts = [
        Fact(f"{count:,}", f"of {plural(values.compared, 'tensor')} with other values", "warning" if count else "")
    ]
    sizes = [one.rel_l2 for one in values.different if one.rel_l2 and one.rel_l2 != math.inf and not one.nonfinite]
    return [*facts, *([Fact(_number(sizes[0]), "largest relative L2")] if sizes else [])]


def _answer(values: ValueDiff, quantized: int) -> list[Line]:
    if not values.compared:
        return [Line(("values: no tensor could be compared",))]
    tolerances = f"rtol {short_number(values.rtol)}, atol {short_number(values.atol)}"
    if not values.different:
        left = len(values.skipped) + quantized
        others = f"; {left:,} {'was' if left == 1 else 'were'} not compared" if left else ""
        tensors = f"{'all ' * (values.compared > 1 and not left)}{plural(values.compared, 'tensor')}"
        verb, also = ("is", "agrees") if values.compared == 1 else ("are", "agree")
        if not values.within:
            return [Line((f"values: {tensors} {verb} equal{others}",))]
        return [
            Line((f"values: {tensors} {also} within {tolerances}; the bits of {len(values.within):,} differ{others}",))
        ]
    count = len(values.different)
    beyond = "" if values.rtol is None else f" beyond {tolerances}"
    differ = f"values: {count:,} of {plural(values.compared, 'tensor')} {'differs' if count == 1 else 'differ'}{beyond}"
    return [Line((differ,)), *_how_much(values.different)]


def _how_much(different: Sequence[ValueDifference]) -> list[Line]:
    """Return what stands below the answer: NaN and Inf, and the largest changes of numbers, those of zeros apart."""
    lines = []
    if nonfinite := sum(one.nonfinite > 0 for one in different):
        verb = "differs" if nonfinite == 1 else "differ"
        lines.append(Line((f"{plural(nonfinite, 'tensor')} {verb} in NaN or Inf",), indented=True))
    others = [one for one in different if one.rel_l2 and not one.nonfinite]
    sized = [one for one in others if one.rel_l2 != math.inf]
    from_zero = [one for one in others if one.rel_l2 == math.inf]
    if sized:
        largest = f"the largest relative change is {_number(sized[0].rel_l2)}, in "
        lines.append(Line((largest, Code(quoted(sized[0].key))), indented=True))
    if from_zero:
        verb = "was" if len(from_zero) == 1 else "were"
        largest = f"changed by up to {_number(from_zero[0].max_abs)}, in "
        zero = f"{plural(len(from_zero), 'tensor')} {verb} all zero: {largest}"
        lines.append(Line((zero, Code(quoted(from_zero[0].key))), indented=True))
    return lines


def _remarks(values: ValueDiff, quantized: int) -> list[Line]:
    """Return what the numbers do not cover."""
    lines = []
    if values.skipped:
        reasons = [f"{quoted(one.key)} ({one.reason})" for one in values.skipped]
        count = (
            f"{plural(len(values.skipped), 'tensor')} {'was' if len(values.skipped) == 1 else 'were'} not compared: "
        )
        lines.append(Line((count, Code(listed(reasons, 3, show=str)))))
    if quantized:
        weights = f"{plural(quantized, 'quantised weight')} {'was' if quantized == 1 else 'were'} not compared: "
        lines.append(Line((weights, Hint("--dequantize compares numbers"))))
    if values.as_stored:
        count = plural(len(values.as_stored), "tensor")
        verb = "is" if len(values.as_stored) == 1 else "are"
        lines.append(Line((f"{count} of quantised weights {verb} compared as stored, as codes and scales",)))
    return lines


_HEADERS = ("key", "rel L2", "max abs", "changed", "cosine", "max ulp", "mean abs")
_GIVES_WAY = ("mean abs", "max ulp", "cosine", "max abs")
_WHOLE = 48  # columns of a key for which others give way
_BEYOND, _NAN, _INF = "beyond", "NaN", "Inf"


def _table(differences: Sequence[ValueDifference]) -> Table:
    """Return a row for each tensor; columns of NaN, Inf and tolerances only where one of the tensors needs them."""
    has_nan, has_inf = (any(any(_pair(one, name)) for one in differences) for name in ("nan", "inf"))
    has_beyond = any(one.beyond is not None for one in differences)
    extra = [name for name, needed in ((_BEYOND, has_beyond), (_NAN, has_nan), (_INF, has_inf)) if needed]
    headers = (_HEADERS[0], *extra, *_HEADERS[1:])
    rows = tuple(_cells(one, extra) for one in differences)
    title = "Tensors with other values"
    return Table(headers, rows, frozenset(headers[1:]), _GIVES_WAY, name_width=_WHOLE, title=title)


def _cells(one: ValueDifference, extra: Sequence[str]) -> tuple[str, ...]:
    others = {
        _BEYOND: "" if one.beyond is None else f"{one.beyond:,}",
        _NAN: _from_to(one.nan),
        _INF: _from_to(one.inf),
    }
    return (
        printable(one.key) if len(one.names) == 1 else f"{printable(one.key)} (tied)",
        *(others[name] for name in extra),
        _number(one.rel_l2),
        _number(one.max_abs),
        "the bytes" if one.changed is None else percent(one.changed),
        "" if one.cosine is None else f"{one.cosine:.6f}",
        _ulps(one.max_ulp),
        _number(one.mean_abs),
    )


def _module_table(values: ValueDiff, depth: int) -> Table:
    """Return a row for each module with the largest changes of its tensors, in the order of the model."""
    from ckptkit.statistics.state_dict_stats import module_name  # which only --depth needs

    modules: dict[str, list[ValueDifference | None]] = {}
    changes = {name: one for one in (*values.within, *values.different) for name in one.names}
    for key in values.keys:
        modules.setdefault(module_name(key, depth), []).append(changes.get(key))
    headers = ("module", "tensors", "differ", "largest rel L2", "largest abs")
    rows = (
        (printable(name) or "(the model)", f"{len(ones):,}", *_largest([one for one in ones if one is not None]))
        for name, ones in modules.items()
    )
    return Table(headers, tuple(rows), frozenset(headers[1:]), ("tensors", "differ"), title="Changes by module")


def _largest(changed: Sequence[ValueDifference]) -> tuple[str, str, str]:
    """Return how many tensors of a module differ, and their largest changes; NaN and Inf have no size."""
    if any(one.nonfinite for one in changed):
        return f"{len(changed):,}", "NaN or Inf", "NaN or Inf"
    sizes = [one.rel_l2 for one in changed if one.rel_l2 is not None]
    finite = [size for size in sizes if size < math.inf]
    most = max((one.max_abs for one in changed if one.max_abs is not None), default=None)
    return f"{len(changed):,}", _number(max(finite or sizes, default=None)), _number(most)


def _ulps(count: int | None) -> str:
    """Return a number of units in the last place, which is exact below a million."""
    if count is None:
        return ""
    return f"{count:,}" if count < _MANY_ULPS else f"{count:.1e}".replace("e+0", "e").replace("e+", "e")


def _pair(one: ValueDifference, name: str) -> tuple[int, int]:
    counts: SideCounts = getattr(one, name)
    return counts.expected, counts.found


def _from_to(counts: SideCounts) -> str:
    return f"{counts.expected:,} -> {counts.found:,}" if counts.expected or counts.found else ""


def _number(value: float | None) -> str:
    return short_number(value, 3)


def _layer_lines(values: ValueDiff) -> tuple[str, ...]:
    """Return a line of bars for each stack of layers: for every layer, the largest ``rel_l2`` of its tensors."""
    sizes = {name: _size(one) for one in (*values.within, *values.different) for name in one.names}
    stacks: dict[str, dict[int, float]] = defaultdict(dict)
    for key in values.keys:
        match = _LAYER.search(key)
        if match is not None:
            layers = stacks[key[: match.start()]]
            number = int(match[1])
            layers[number] = max(layers.get(number, 0.0), sizes.get(key, 0.0))
    long = {name: layers for name, layers in stacks.items() if len(layers) >= _FEW_LAYERS and any(layers.values())}
    if not long:
        return ()
    shown = sorted(long, key=lambda name: -len(long[name]))[:_MOST_STACKS]
    names = [f"{name}.".lstrip(".") + f"{{{min(long[name])}..{max(long[name])}}}" for name in map(str, shown)]
    width = max(map(len, map(printable, names)))
    most = max(_LINE - width - _BESIDE_BARS, _LEAST_BARS)
    return (
        "change by layer: the largest relative L2 of its tensors",
        *(
            f"  {printable(name):<{width}}  {_bars(long[stack], most)}"
            for name, stack in zip(names, shown, strict=True)
        ),
    )


def _size(one: ValueDifference) -> float:
    """Return the height of a bar; that of a tensor which was all zero is the least, since its change is infinite."""
    if one.nonfinite or one.rel_l2 is None:
        return math.inf
    return _LEAST if one.rel_l2 in (0, math.inf) else one.rel_l2


def _bars(layers: Mapping[int, float], most: int) -> str:
    """Return at most ``most`` bars for the layers of a stack in order, and its largest change; layers may share one."""
    numbers = [layers[number] for number in sorted(layers)]
    each = math.ceil(len(numbers) / most)
    bars = sparkline([max(numbers[at : at + each]) for at in range(0, len(numbers), each)])
    worst = max(layers, key=lambda number: (layers[number], -number))
    largest = layers[worst]
    return f"{bars}  up to {_number(largest)} in layer {worst}" if largest > _LEAST else bars


def value_page(differences: Sequence[ValueDifference], expected: Checkpoint, found: Checkpoint) -> Page:
    """Return both sides, a row for each of the ten tensors that differ most, and how many more there are."""
    table = Table(
        ("key", "dtype and shape", "differ", "largest", "at", "expected", "found"),
        tuple(map(_row, differences[:_SHOWN])),
        right=frozenset({"differ", "largest"}),
    )
    more = len(differences) - _SHOWN
    return [
        Line(("expected  ", *describe(CheckpointSummary.of(expected), "expected"))),
        Line(("found     ", *describe(CheckpointSummary.of(found), "found"))),
        table,
        *([Line((f"and {plural(more, 'more tensor')}",))] if more > 0 else []),
    ]


def _row(difference: ValueDifference) -> tuple[str, ...]:
    wanted, got = difference.expected, difference.found
    described = str(wanted) if wanted.dtype == got.dtype else f"{wanted.dtype} and {got}"
    count = difference.changed_elements if difference.beyond is None else difference.beyond
    if count is None or difference.max_abs is None:
        return printable(wanted.key), described, "the bytes", "", "", "", ""
    largest = short_number(difference.max_abs, 3) if difference.max_abs else "only bits"
    return (
        printable(wanted.key), described, f"{count:,} of {wanted.elements:,}", largest,
        "" if difference.place is None else str(list(difference.place)), *difference.values,
    )  # fmt: skip
