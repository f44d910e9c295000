"""The learning rate of each layer on a log axis, with weight decay and the names of the groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from ckptkit.core.text import listed, option_text, plural, printable, short_number
from ckptkit.param_groups.lock import plain_option
from ckptkit.render.groups import rate_of
from ckptkit.render.pictures.grid import in_common_order, layers_of
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.sections import numbered, range_name, sections_of
from ckptkit.render.pictures.style import SERIES
from ckptkit.render.pictures.svg import HATCHED, SMALL, WIDTH, Box, Drawing, Swatch, short

__all__ = ["GroupOfNames", "rates_picture"]

_NAMES: Final = 130
_GROUPS: Final = 104
_LEFT: Final = _NAMES + 8
_RIGHT: Final = WIDTH - _GROUPS - 18
_ROW: Final = 18
_LOW_ROW: Final = 9
_MANY_ROWS: Final = 40
_MOST_ROWS: Final = 200
_RADIUS: Final = 4
_WEIGHT_DECAY: Final = "weight_decay"
_Place = tuple[str, int]  # a stack of layers and a number, or a section and -1


class GroupOfNames(NamedTuple):
    """A param group: the names of its parameters in the order of the model, and its options; None if it is frozen.

    A group that is frozen may have the names of modules too.
    """

    name: str
    parameters: Sequence[str]
    options: Mapping[str, Any] | None


class _Mark(NamedTuple):
    """The learning rate and the weight decay of some parameters; both None where they are frozen."""

    rate: float | None
    decay: str


@dataclass(slots=True)
class _Row:
    """Layers with the same marks that follow each other, or a section."""

    places: list[_Place]
    marks: dict[_Mark, int] = field(default_factory=Counter)  # the number of parameters
    groups: dict[str, None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        (stack, first), (_, last) = self.places[0], self.places[-1]
        return stack if first < 0 else range_name(stack, first, last)


def rates_picture(groups: Iterable[GroupOfNames], order: Sequence[str] = ()) -> Picture | None:
    """Return the learning rates by layer; None where no group has a learning rate.

    ``order`` has names of parameters or modules in the order of the model, as far as it is known.
    """
    groups = list(groups)
    rates = [None if group.options is None else _drawn(rate_of(group.options)) for group in groups]
    known = [
        (group, rate) for group, rate in zip(groups, rates, strict=True) if group.options is None or rate is not None
    ]
    numbers = [rate for rate in rates if rate is not None]
    if not numbers:
        return None
    rows = _rows([group for group, _ in known], [_mark(group, rate) for group, rate in known], order)
    decays = list(dict.fromkeys(mark.decay for row in rows for mark in row.marks if mark.rate is not None))
    look = {decay: SERIES[min(at, len(SERIES) - 1)] for at, decay in enumerate(decays)}
    drawing = Drawing()
    swatches = [Swatch(look[decay], f"{_WEIGHT_DECAY} {decay}" if decay else f"no {_WEIGHT_DECAY}") for decay in decays]
    has_frozen = any(mark.rate is None for row in rows for mark in row.marks)
    drawing.legend([*swatches, *([Swatch(HATCHED, "frozen")] if has_frozen else [])], 0)
    _draw(drawing, rows, _Axis.of(numbers), look)
    low, high = short_number(min(numbers)), short_number(max(numbers))
    spread = f"The learning rate is {low}" if low == high else f"Learning rates are from {low} to {high}"
    texts = " ".join(f"{printable(row.name)}: {_words(row)}." for row in rows[:_MANY_ROWS])
    return drawing.picture("rates", "Learning rate by layer", f"{spread}.", texts)


def _drawn(rate: float | None) -> float | None:
    """Return a learning rate that has a place on the axis, or None."""
    return rate if rate is not None and rate >= 0 and math.isfinite(rate) else None


def _mark(group: GroupOfNames, rate: float | None) -> _Mark:
    if group.options is None:
        return _Mark(None, "")
    decay = group.options.get(_WEIGHT_DECAY)
    return _Mark(rate, "" if decay is None else option_text(plain_option(decay)))


def _rows(groups: Sequence[GroupOfNames], marks: Sequence[_Mark], order: Sequence[str]) -> list[_Row]:
    """Return a row for each layer and section in the order of the model; equal layers in a row are one."""
    places = _places([*(name for group in groups for name in group.parameters), *order])
    by_place: dict[_Place, _Row] = {}
    for group, mark in zip(groups, marks, strict=True):
        for name in group.parameters:
            row = by_place.setdefault(places[name], _Row([places[name]]))
            row.marks[mark] = row.marks.get(mark, 0) + 1
            row.groups[group.name] = None
    units = [dict.fromkeys(places[name][0] for name in names) for names in (order, *(one.parameters for one in groups))]
    in_order = {unit: at for at, unit in enumerate(in_common_order(list(map(list, units))))}
    # Each group may hold one layer only, so the layers of a stack are in the order of their numbers.
    rows = [by_place[place] for place in sorted(by_place, key=lambda place: (in_order[place[0]], place[1]))]
    joined: list[_Row] = []
    for row in rows:
        (stack, number), before = row.places[0], joined[-1] if joined else None
        if before is not None and before.places[-1] == (stack, number - 1) and before.marks.keys() == row.marks.keys():
            before.places.append(row.places[0])
            before.marks = Counter(before.marks) + Counter(row.marks)
            before.groups |= row.groups
        else:
            joined.append(row)
    return joined


def _places(names: Sequence[str]) -> dict[str, _Place]:
    """Return the layer or the section of each name of a parameter or a module."""
    places: dict[str, _Place] = dict(layers_of(names))
    stacks = {stack for stack, _ in places.values()}
    for name in names:
        layer = numbered(name)
        if name not in places and layer is not None and layer[0] in stacks:
            places[name] = layer
    outside = {name: 1.0 for name in names if name not in places}
    return places | {key: (section, -1) for section, keys in sections_of(outside, _MANY_ROWS) for key in keys}


class _Axis(NamedTuple):
    """A log axis of learning rates; 0 stands at its left end."""

    ticks: tuple[float, ...]
    low: float
    high: float

    @classmethod
    def of(cls, rates: Sequence[float]) -> _Axis:
        positive = [rate for rate in rates if rate > 0] or [1.0]
        first, last = math.floor(math.log10(min(positive))), math.floor(math.log10(max(positive)))
        steps = (1, 2, 5) if last - first < 2 else (1,)
        edges = [float(f"{step}e{exponent}") for exponent in range(first, last + 2) for step in steps]
        low = max((edge for edge in edges if edge <= min(positive)), default=edges[0])
        high = min((edge for edge in edges if edge >= max(positive)), default=edges[-1])
        ticks = [edge for edge in edges if low <= edge <= high]
        if low == high:
            low, high = low / 2, high * 2
        while len(ticks) > 6:
            ticks = ticks[::2]
        return cls(tuple(ticks), math.log(low), math.log(high))

    def place(self, rate: float) -> float:
        if rate <= 0:
            return _LEFT
        inner = _LEFT + 10
        return inner + (math.log(rate) - self.low) / (self.high - self.low) * (_RIGHT - inner)


def _draw(drawing: Drawing, rows: Sequence[_Row], axis: _Axis, look: Mapping[str, str]) -> None:
    top = drawing.height + 26
    height = _ROW if len(rows) <= _MANY_ROWS else _LOW_ROW
    shown = rows[:_MOST_ROWS]
    bottom = top + len(shown) * height
    drawing.text(_NAMES - 14, top - 8, "lr", anchor="end", size=SMALL, faint=True)
    for tick in axis.ticks:
        x = axis.place(tick)
        drawing.text(x, top - 8, short_number(tick), anchor="middle", size=SMALL, faint=True)
        drawing.line(x, top - 3, x, bottom)
    labels = short([row.name for row in shown], _NAMES - 6, SMALL)
    groups = short([", ".join(row.groups) for row in shown], _GROUPS, SMALL)
    for at, (row, label, names) in enumerate(zip(shown, labels, groups, strict=True)):
        y = top + at * height
        if height == _ROW or at % 2 == 0:
            drawing.text(_NAMES - 4, y + height / 2 + 4, label, anchor="end", size=SMALL, tip=printable(row.name))
            all_groups = ", ".join(map(printable, row.groups))
            drawing.text(_RIGHT + 18, y + height / 2 + 4, names, size=SMALL, faint=True, tip=all_groups)
        _draw_marks(drawing, row, axis, look, Box(_LEFT, y, _RIGHT - _LEFT, height))
    if len(rows) > len(shown):
        drawing.text(_NAMES, bottom + 12, f"and {plural(len(rows) - len(shown), 'more row')}", size=SMALL, faint=True)


def _draw_marks(drawing: Drawing, row: _Row, axis: _Axis, look: Mapping[str, str], box: Box) -> None:
    middle, name = box.y + box.height / 2, printable(row.name)
    frozen = sum(count for mark, count in row.marks.items() if mark.rate is None)
    if frozen:
        is_all = frozen == sum(row.marks.values())
        tip = f"{name}: {plural(frozen, 'parameter')} frozen"
        size = min(box.height - 6, 11)
        width = box.width + 4 if is_all else size
        drawing.cell(HATCHED, Box(box.x - size / 2 - 2, middle - size / 2, width, size), tip)
    radius = min(_RADIUS, box.height / 2 - 1)
    for mark, count in row.marks.items():
        if mark.rate is not None:
            same = [other for other in row.marks if other.rate == mark.rate]
            x = axis.place(mark.rate) + (same.index(mark) - (len(same) - 1) / 2) * (2 * radius + 1)
            tip = f"{name}: {plural(count, 'parameter')} with {_mark_words(mark)}"
            dot = Box(x - radius, middle - radius, 2 * radius, 2 * radius)
            drawing.rect(dot, look[mark.decay], tip, radius=radius)


def _words(row: _Row) -> str:
    return ", ".join(_mark_words(mark) for mark in row.marks) + f" (group {listed(row.groups, 3)})"


def _mark_words(mark: _Mark) -> str:
    if mark.rate is None:
        return "frozen"
    return f"lr {short_number(mark.rate)}" + (f" and {_WEIGHT_DECAY} {mark.decay}" if mark.decay else "")
