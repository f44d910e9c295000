"""The colours of a heatmap: bins of a log scale, with edges that people know."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ckptkit.core.text import short_number
from ckptkit.render.pictures.style import RAMP
from ckptkit.render.pictures.svg import SMALL, Box, Drawing, text_width

__all__ = ["LogScale"]

_MOST_BINS: Final = len(RAMP)
_ENDS: Final = {1: (4, 4), 2: (3, 5), 3: (2, 6)}  # the colours of the first and of the last of few bins
_BIN: Final = 38  # width in a legend
_MOST_DIGITS: Final = 5
_STEPS: Final = ((2, (1, 2, 5)), (3, (1, 3)), (math.inf, (1,)))  # of each decade, by the number of decades


@dataclass(frozen=True, slots=True)
class LogScale:
    """Bins from the smallest to the largest number; ``edges`` are where they begin, and all may be in one bin."""

    edges: tuple[float, ...]
    is_open: bool = False  # the first bin also has all smaller numbers

    @classmethod
    def of(cls, numbers: Iterable[float]) -> LogScale:
        """Return the scale for positive, finite numbers; it has no bins without a number."""
        numbers = list(numbers)
        if not numbers:
            return cls(())
        low, high = min(numbers), max(numbers)
        first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
        steps = next(steps for most, steps in _STEPS if last - first < most)
        edges = [float(f"{step}e{exponent}") for exponent in range(first, last + 1) for step in steps]
        edges = [
            edge for edge, after in zip(edges, [*edges[1:], math.inf], strict=True) if after > low and edge <= high
        ]
        return cls(tuple(edges[-_MOST_BINS:]), len(edges) > _MOST_BINS)

    def look(self, number: float) -> str:
        """Return the class of the colour of a number."""
        return self._look_of(max(bisect_right(self.edges, number) - 1, 0))

    def _look_of(self, place: int) -> str:
        # Few bins are near each other in size, and so in colour.
        first, last = _ENDS.get(len(self.edges), (0, len(RAMP) - 1))
        return RAMP[first + round(place * (last - first) / max(len(self.edges) - 1, 1))]

    def draw(self, drawing: Drawing, name: str, y: float) -> None:
        """Draw the legend: the bins beside each other, with their edges below."""
        if not self.edges:
            return
        drawing.text(0, y + 10, name, size=SMALL)
        x = text_width(name) + 10
        for place, edge in enumerate(self.edges):
            drawing.rect(Box(x, y, _BIN - 1, 11), self._look_of(place))
            text = _edge_text(edge)
            drawing.text(x, y + 23, "less" if self.is_open and not place else text, size=SMALL, faint=True)
            x += _BIN


def _edge_text(edge: float) -> str:
    """Return an edge in at most five characters, as long as its exponent has two digits."""
    text = short_number(edge)
    if len(text) <= _MOST_DIGITS:
        return text
    exponent = math.floor(math.log10(edge))
    return f"{round(edge / 10**exponent)}e{exponent}"
