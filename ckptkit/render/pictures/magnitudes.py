"""How large the values are: the share of the values in each power of two, for one side or for two over each other."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from ckptkit.core.text import percent, plural, short_number
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.style import OUTLINE, SERIES
from ckptkit.render.pictures.svg import SMALL, WIDTH, Box, Drawing, Swatch, place, text_width
from ckptkit.statistics.value_stats import ValueStats

__all__ = ["magnitudes_picture"]

_LEFT: Final = 44
_HEIGHT: Final = 150
_TAIL: Final = 1e-4  # the share of the values at each end that may be left out
_ZERO_BINS: Final = 2  # the room of the bar of zeros, in bins
_FEWEST: Final = 12  # bins, so that few are not drawn as walls
_TICK: Final = 44  # room for a number below the axis
_LOOKS: Final = (SERIES[0], OUTLINE)
_DECADE: Final = math.log2(10)


class _Side(NamedTuple):
    """The values of a side: the share in each bin, and of its zeros."""

    name: str
    found: ValueStats
    shares: dict[int, float]
    zeros: float

    @classmethod
    def of(cls, name: str, found: ValueStats) -> _Side:
        shares = {power: count / found.count for power, count in sorted(found.histogram.items())}
        return cls(name, found, shares, found.zeros / found.count)


class _Frame(NamedTuple):
    """The bins that are drawn, from ``low`` to ``high``, and where; zeros have a bar of their own on the left."""

    low: int
    high: int
    has_zeros: bool
    top: float
    most: float

    @property
    def first(self) -> int:
        return self.low - _ZERO_BINS * self.has_zeros

    @property
    def width(self) -> float:
        return (WIDTH - _LEFT) / (self.high + 1 - self.first)

    def x(self, power: float) -> float:
        """Return where a power of two stands."""
        return _LEFT + (power - self.first) * self.width

    def height(self, share: float) -> float:
        return share / self.most * _HEIGHT

    def bars(self, side: _Side) -> list[tuple[int, float]]:
        """Return the bins of a side with their shares; zeros are in the first."""
        return [(power, side.shares.get(power, 0.0)) for power in range(self.low, self.high + 1)]


def magnitudes_picture(
    sides: Sequence[tuple[str, ValueStats]], title: str = "Magnitudes of the values"
) -> Picture | None:
    """Return the histogram of magnitudes of one side, or of two: the first filled, the second as a line.

    None without numbers other than zero.
    """
    shown = [_Side.of(name, found) for name, found in sides if found.count and found.histogram]
    if not shown:
        return None
    ends = [end for side in shown for end in _without_tails(side.shares)]
    low, high = min(ends), max(ends)
    if high - low < _FEWEST:
        low, high = low - (_FEWEST - high + low) // 2, high + (_FEWEST - high + low) // 2
    drawing = Drawing()
    if len(shown) > 1:
        drawing.legend([Swatch(look, side.name) for look, side in zip(_LOOKS, shown, strict=True)], 0)
    most = max(share for side in shown for share in (*side.shares.values(), side.zeros))
    frame = _Frame(low, high, any(side.zeros for side in shown), drawing.height + 12, most)
    _draw_axes(drawing, frame)
    _draw_bars(drawing, frame, shown)
    if len(shown) > 1:
        _draw_steps(drawing, frame, shown[1])
    return drawing.picture("magnitudes", title, " ".join(map(_sentence, shown)))


def _without_tails(shares: Mapping[int, float]) -> tuple[int, int]:
    """Return the first and the last bin of all but few of the values."""
    powers = sorted(shares)
    for ends in (0, -1):
        left_out = 0.0
        while len(powers) > 1 and (left_out := left_out + shares[powers[ends]]) < _TAIL:
            del powers[ends]
    return powers[0], powers[-1]


def _draw_axes(drawing: Drawing, frame: _Frame) -> None:
    bottom = frame.top + _HEIGHT
    for share in (frame.most, frame.most / 2):
        y = bottom - frame.height(share)
        drawing.line(_LEFT, y, WIDTH, y)
        drawing.text(_LEFT - 6, y + 4, percent(share), anchor="end", size=SMALL, faint=True)
    drawing.line(_LEFT, bottom, WIDTH, bottom)
    if frame.has_zeros:
        drawing.text(frame.x(frame.first + 0.5), bottom + 14, "0", anchor="middle", size=SMALL, faint=True)
    decades = range(
        max(math.ceil(frame.low / _DECADE), sys.float_info.min_10_exp),
        min(math.floor((frame.high + 1) / _DECADE), sys.float_info.max_10_exp) + 1,
    )
    step = max(1, math.ceil(len(decades) * _TICK / (WIDTH - _LEFT)))
    free = frame.x(frame.first + 0.5) + _TICK / 2 if frame.has_zeros else 0  # right of the number of the zeros
    for exponent in decades:
        x = frame.x(exponent * _DECADE)
        if exponent % step == 0 and x >= free:
            drawing.line(x, bottom, x, bottom + 4)
            text = short_number(float(f"1e{exponent}"))
            inside = min(x, WIDTH - text_width(text) / 2)
            drawing.text(inside, bottom + 15, text, anchor="middle", size=SMALL, faint=True)
    drawing.text((_LEFT + WIDTH) / 2, bottom + 31, "magnitude", anchor="middle", size=SMALL, faint=True)


def _draw_bars(drawing: Drawing, frame: _Frame, sides: Sequence[_Side]) -> None:
    """Draw the first side as bars; each column of the picture, filled or not, has the numbers of all sides."""
    bars = frame.bars(sides[0])
    if frame.has_zeros:
        bars.insert(0, (frame.first, sides[0].zeros))
    bottom = frame.top + _HEIGHT
    for power, share in bars:
        height = frame.height(share)
        box = Box(frame.x(power) + 0.4, bottom - height, max(frame.width - 0.8, 0.5), height)
        if height:
            drawing.rect(box, SERIES[0], _tip(power if power >= frame.low else None, sides))


def _draw_steps(drawing: Drawing, frame: _Frame, side: _Side) -> None:
    bottom = frame.top + _HEIGHT
    runs = [frame.bars(side)]
    if frame.has_zeros:
        runs.insert(0, [(frame.first, side.zeros)])
    for run in runs:
        tops = "".join(f"V{place(bottom - frame.height(share))}H{place(frame.x(power + 1))}" for power, share in run)
        drawing.outline(f"M{place(frame.x(run[0][0]))} {place(bottom)}{tops}V{place(bottom)}")


def _tip(power: int | None, sides: Sequence[_Side]) -> str:
    if power is None:
        what, shares = "zeros", [side.zeros for side in sides]
    else:
        what = f"magnitudes from {_power_text(power)} to {_power_text(power + 1)}"
        shares = [side.shares.get(power, 0.0) for side in sides]
    texts = [f"{side.name} {percent(share)}".strip() for side, share in zip(sides, shares, strict=True)]
    return f"{what}: {', '.join(texts)}"


def _power_text(power: int) -> str:
    return short_number(2.0**power, 3) if power <= sys.float_info.max_exp - 1 else short_number(sys.float_info.max, 3)


def _sentence(side: _Side) -> str:
    found, name = side.found, f"{side.name}: " if side.name else ""
    low, high = _without_tails(side.shares)
    nonfinite = found.nan + found.posinf + found.neginf
    zeros = f", {percent(side.zeros)} zeros" if side.zeros else ""
    others = f", {nonfinite:,} NaN or Inf" if nonfinite else ""
    rest = "all others" if zeros or others else "all"
    return (
        f"{name}{plural(found.count, 'value')}{zeros}{others}; nearly {rest} have magnitudes from {_power_text(low)} "
        f"to {_power_text(high + 1)}, most often {_power_text(max(side.shares, key=side.shares.__getitem__))}."
    )
