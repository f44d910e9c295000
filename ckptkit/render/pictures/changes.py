"""How much each tensor changed: a heatmap of relative L2, by layer and module."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from ckptkit.comparison.values import ValueDiff, ValueDifference
from ckptkit.core.text import plural, printable, short_number
from ckptkit.render.pictures.grid import Grid, grids_of
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.scale import LogScale
from ckptkit.render.pictures.svg import (
    CROSSED,
    DOT,
    HATCHED,
    MARKS,
    PLUS,
    RING,
    SMALL,
    SOLID,
    WIDTH,
    Box,
    Drawing,
    Swatch,
    short,
    text_width,
)

__all__ = ["MISSING", "OTHER_SHAPE", "UNEXPECTED", "State", "cast_state", "changes_picture", "states_of_values"]

_NAMES: Final = 146
_ROW: Final = 14
_MODULE_ROW: Final = 17
_NAMED_ROWS: Final = 48
_THIN_ROW: Final = 5  # without a name
_WIDEST: Final = 22  # of a cell
_BESIDE_CELL: Final = 18  # where the number of a cell begins
_BETWEEN: Final = 8  # bands
_MOST_TIPS: Final = 3000  # more cells make a page slow
_SAME: Final = "ck-same"
_BYTES: Final = "ck-s0"


class State(NamedTuple):
    """What is known of the values of a tensor: its look, words for it, and its relative L2 where that is a number."""

    look: str
    text: str
    size: float | None = None


MISSING: Final = State(HATCHED, "missing")
UNEXPECTED: Final = State(PLUS, "unexpected")
OTHER_SHAPE: Final = State(CROSSED, "another shape")
_IDENTICAL: Final = State(_SAME, "identical")
_LEGEND: Final[Mapping[str, str]] = {
    _SAME: "identical", SOLID: "NaN or Inf", RING: "was all zero", _BYTES: "other bytes", HATCHED: "missing",
    PLUS: "unexpected", CROSSED: "another shape", DOT: "not compared",
}  # fmt: skip


def states_of_values(values: ValueDiff) -> dict[str, State]:
    """Return the state of each key that both sides have."""
    states = dict.fromkeys(values.keys, _IDENTICAL)
    states |= {name: _state(one) for one in (*values.within, *values.different) for name in one.names}
    return states | {one.key: State(DOT, f"not compared: {one.reason}") for one in values.skipped}


def cast_state(state: State) -> State:
    """Return the state of a tensor that has another dtype on the other side: its bytes are not identical."""
    return State(_BYTES, "equal numbers of another dtype") if state == _IDENTICAL else state


def _state(one: ValueDifference) -> State:
    if one.nonfinite:
        return State(SOLID, f"{plural(one.nonfinite, 'element')} with NaN or Inf on one side")
    if one.rel_l2 is None:
        return State(_BYTES, "other bytes")
    if one.rel_l2 == math.inf:
        return State(RING, f"was all zero; the largest difference is {short_number(one.max_abs, 3)}")
    if not one.rel_l2:
        return State(_BYTES, "equal numbers with other bits")
    return State("", f"relative L2 {short_number(one.rel_l2, 3)}", one.rel_l2)


def changes_picture(states: Mapping[str, State]) -> Picture | None:
    """Return how much each tensor changed, for the keys of ``states`` in their order; None without keys."""
    if not states:
        return None
    grids = grids_of(states)
    scale = LogScale.of(state.size for state in states.values() if state.size is not None)
    drawing = Drawing()
    scale.draw(drawing, "relative L2", 0)
    used = {state.look for state in states.values()}
    drawing.legend([Swatch(look, text) for look, text in _LEGEND.items() if look in used], drawing.height + 6)
    with_tips = sum(len(grid.cells) for grid in grids) <= _MOST_TIPS
    for grid in grids:
        cells = _Cells(drawing, states, scale, with_tips=with_tips)
        _draw_grid(cells, grid, drawing.height + 8)
        cells.draw()
    title = "Change by layer and module" if grids[0].has_layers else "Change of each tensor"
    return drawing.picture("changes", title, _description(states))


def _description(states: Mapping[str, State]) -> str:
    listed = _counted(states.values())
    sizes = {key: state.size for key, state in states.items() if state.size is not None}
    if not sizes:
        return f"{plural(len(states), 'tensor')}: {listed}."
    low, high = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    least, most = short_number(sizes[low], 3), short_number(sizes[high], 3)
    if low == high:
        return f"{plural(len(states), 'tensor')}: {listed}. The relative L2 of {printable(low)} is {least}."
    return (
        f"{plural(len(states), 'tensor')}: {listed}. The relative L2 of what changed is from {least} "
        f"({printable(low)}) to {most} ({printable(high)})."
    )


@dataclass(slots=True)
class _Cells:
    """The cells of a grid by their looks, so that each look is written once."""

    drawing: Drawing
    states: Mapping[str, State]
    scale: LogScale
    with_tips: bool
    boxes: dict[str, list[tuple[Box, str]]] = field(default_factory=dict)

    def add(self, box: Box, keys: Sequence[str]) -> None:
        """Add the cell of one tensor, or of several: in the colour of the largest change, below what else there is."""
        if len(keys) == 1:  # nearly all of many thousands
            state = self.states[keys[0]]
            look = state.look if state.size is None else self.scale.look(state.size)
            tip = _tip(keys, [state]) if self.with_tips else ""
            self.boxes.setdefault(look, []).append((box, tip))
            return
        states = [self.states[key] for key in keys]
        largest = max((state.size for state in states if state.size is not None), default=None)
        looks = {state.look for state in states}
        fills = [look for look in (SOLID, _BYTES, _SAME) if look in looks]
        base = self.scale.look(largest) if largest is not None and SOLID not in looks else next(iter(fills), "")
        shown = [*([base] if base else []), *(look for look in MARKS if look in looks)]
        for look in shown:
            tip = _tip(keys, states) if self.with_tips and look is shown[-1] else ""
            self.boxes.setdefault(look, []).append((box, tip))

    def draw(self) -> None:
        """Draw the colours, and then the marks above them."""
        for look in sorted(self.boxes, key=lambda look: look in MARKS):
            self.drawing.cells(look, self.boxes[look])


def _counted(states: Iterable[State]) -> str:
    """Return how many tensors are in each state, with the words of the legend for several tensors."""
    counts = Counter(_LEGEND.get(state.look, "changed") for state in states)
    return ", ".join(
        f"{count:,} {text.replace('was ', 'were ', 1) if count > 1 else text}" for text, count in counts.most_common()
    )


def _tip(keys: Sequence[str], states: Sequence[State]) -> str:
    if len(keys) == 1:
        return f"{printable(keys[0])}: {states[0].text}"
    sizes = [state.size or 0 for state in states]
    worst = sizes.index(max(sizes))
    listed = _counted(states)
    largest = f"; the largest change is {states[worst].text} of {printable(keys[worst])}" if sizes[worst] else ""
    return (
        f"{plural(len(keys), 'tensor')}, {listed}{largest}" if largest else f"{printable(keys[0])} and others: {listed}"
    )


def _draw_grid(cells: _Cells, grid: Grid, top: float) -> None:
    if not grid.rows:
        _draw_one_by_one(cells, grid, top)
    elif grid.has_layers:
        _draw_layers(cells, grid, top)
    else:
        _draw_modules(cells, grid, top)


def _draw_layers(cells: _Cells, grid: Grid, top: float) -> None:
    drawing = cells.drawing
    count = sum(len(band.columns) for band in grid.bands)
    width = min((WIDTH - _NAMES - _BETWEEN * (len(grid.bands) - 1)) / count, _WIDEST)
    starts = [_NAMES, *accumulate((len(band.columns) * width + _BETWEEN for band in grid.bands), initial=_NAMES)][1:]
    lefts: list[float] = []
    narrowest = min(len(band.columns) for band in grid.bands)
    names = short([band.name for band in grid.bands], narrowest * width + _BETWEEN - 8, SMALL)
    for band, start, name in zip(grid.bands, starts, names, strict=False):
        drawing.text(start, top + 11, name, size=SMALL, bold=True, tip=printable(band.name))
        _number_columns(drawing, band.columns, start, width, top + 24)
        lefts += [start + at * width for at in range(len(band.columns))]
    is_named = len(grid.rows) <= _NAMED_ROWS
    height = _ROW if is_named else _THIN_ROW
    top += 28
    if is_named:
        _name_rows(drawing, grid.rows, top)
    gap = 1 if width >= 4 else 0.2
    for (row, column), keys in grid.cells.items():
        cells.add(Box(lefts[column], top + row * height, width - gap, height - 1), keys)
    drawing.height = max(drawing.height, top + len(grid.rows) * height)


def _name_rows(drawing: Drawing, rows: Sequence[str], top: float) -> None:
    """Write the names of modules; of their further tensors only the last part."""
    parted = [row.rpartition(".") for row in rows]
    is_further = [
        bool(module) and module == before for (module, _, _), (before, _, _) in pairwise([("", "", ""), *parted])
    ]
    names = [
        f".{leaf}" if further else module if module and leaf == "weight" else row
        for row, (module, _, leaf), further in zip(rows, parted, is_further, strict=True)
    ]
    labels = short(names, _NAMES - 8, SMALL)
    for at, (row, label, further) in enumerate(zip(rows, labels, is_further, strict=True)):
        y = top + at * _ROW + 10
        drawing.text(_NAMES - 8, y, label, anchor="end", size=SMALL, faint=further, tip=printable(row))


def _number_columns(drawing: Drawing, labels: Sequence[str], start: float, width: float, y: float) -> None:
    """Write as many numbers of layers as fit, at equal distances from the first."""
    needed = max(map(text_width, labels)) + 5
    step = next((step for step in (1, 2, 4, 5, 10, 20, 50, 100) if step * width >= needed), 100)
    for at in range(0, len(labels), step):
        drawing.text(start + (at + 0.5) * width, y, labels[at], anchor="middle", size=SMALL, faint=True)


def _draw_modules(cells: _Cells, grid: Grid, top: float) -> None:
    drawing = cells.drawing
    columns = grid.bands[0].columns
    width = (WIDTH - _NAMES) / max(len(columns), 3)
    for at, label in enumerate(short(columns, width - 12, SMALL)):
        drawing.text(_NAMES + at * width, top + 11, label, size=SMALL, bold=True, tip=printable(columns[at]))
    top += 17
    for at, (name, label) in enumerate(zip(grid.rows, short(grid.rows, _NAMES - 8, SMALL), strict=True)):
        drawing.text(_NAMES - 8, top + at * _MODULE_ROW + 10.5, label, anchor="end", size=SMALL, tip=printable(name))
    sizes = {place: size for place, keys in grid.cells.items() if (size := cells.states[keys[0]].size) is not None}
    numbers = _fitting_numbers(sizes, width - _BESIDE_CELL - 3)
    for (row, column), keys in grid.cells.items():
        x, y = _NAMES + column * width, top + row * _MODULE_ROW
        cells.add(Box(x, y, 13, 13), keys)
        if number := numbers.get((row, column)):
            drawing.text(x + _BESIDE_CELL, y + 10.5, number, size=SMALL, faint=True)


def _fitting_numbers(sizes: Mapping[tuple[int, int], float], width: float) -> Mapping[tuple[int, int], str]:
    """Return the number beside each cell, with as many of two digits as all have room for; none without room."""
    for digits in (2, 1):
        numbers = {place: short_number(size, digits) for place, size in sizes.items()}
        if all(text_width(number, SMALL) <= width for number in numbers.values()):
            return numbers
    return {}


def _draw_one_by_one(cells: _Cells, grid: Grid, top: float) -> None:
    columns = max(column for _, column in grid.cells) + 1
    size = WIDTH / columns
    cells.drawing.text(0, top + 11, f"{plural(len(grid.cells), 'tensor')} in their order", size=SMALL, bold=True)
    for (row, column), keys in grid.cells.items():
        cells.add(Box(column * size, top + 17 + row * size, size - 0.8, size - 0.8), keys)
