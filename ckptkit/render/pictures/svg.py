"""A small SVG writer: shapes with tooltips, texts that are shortened and escaped, and hatching without ids."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from ckptkit.core.text import printable
from ckptkit.render.page.display import display_width
from ckptkit.render.page.shortening import shortened
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.style import OUTLINE, fill_of

__all__ = [
    "CROSSED",
    "DOT",
    "FONT",
    "HATCHED",
    "PLUS",
    "SMALL",
    "WIDTH",
    "Box",
    "Drawing",
    "Swatch",
    "place",
    "short",
    "text_width",
]

WIDTH: Final = 440  # of every picture, in its own units: a text of 12 can be read where only 400 px are left
FONT: Final = 12
SMALL: Final = 11
_CHAR: Final = 0.62  # the mean width of a character of system fonts, as a share of the size of the font


def text_width(text: str, size: float = SMALL) -> float:
    """Return about how wide a text is."""
    return display_width(text) * size * _CHAR


def short(names: Sequence[str], width: float, size: float = FONT) -> list[str]:
    """Return names from files as printable labels that fit into a width; different names stay different."""
    return shortened(list(map(printable, names)), max(int(width / (size * _CHAR)), 4))


@lru_cache(maxsize=4096)  # thousands of cells share their sides
def place(value: float) -> str:
    """Return a coordinate with at most one digit behind the point."""
    text = str(round(value, 1)).removesuffix(".0")
    return "0" if text == "-0" else text


class Box(NamedTuple):
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float

    @property
    def attributes(self) -> str:
        """The attributes of a ``<rect>``."""
        x, y, width, height = map(place, self)
        return f'x="{x}" y="{y}" width="{width}" height="{height}"'

    @property
    def outline(self) -> str:
        """The sides as commands of a path."""
        return f"M{place(self.x)} {place(self.y)}h{place(self.width)}v{place(self.height)}h{place(-self.width)}z"


class Swatch(NamedTuple):
    """An entry of a legend: a class of a colour, or a mark, and what it means."""

    look: str
    text: str


# Marks of what has no colour; a legend and a cell draw them in one way.
HATCHED: Final = "hatched"
CROSSED: Final = "crossed"
PLUS: Final = "plus"
DOT: Final = "dot"
RING: Final = "ring"
SOLID: Final = "solid"
MARKS: Final = (HATCHED, CROSSED, PLUS, DOT, RING)


class Drawing:
    """The elements of one picture, in their order; ``height`` grows with what is drawn."""

    def __init__(self) -> None:
        """Start an empty picture."""
        self._parts: list[str] = []
        self.height = 0.0

    def rect(self, box: Box, fill: str, tip: str = "", *, radius: float = 0) -> None:
        """Draw a rectangle in the colour of a class; ``tip`` is shown where the pointer rests."""
        self._reach(box.y + box.height)
        corner = f' rx="{place(radius)}"' if radius else ""
        self._add(f'<rect {box.attributes}{corner} class="{fill}" fill="{fill_of(fill)}"', "rect", tip)

    def cells(self, look: str, boxes: Iterable[tuple[Box, str]]) -> None:
        """Draw many rectangles with one look, which is written once; those without a tooltip are one path."""
        shapes = []
        plain: list[str] = []
        for box, tip in boxes:
            self._reach(box.y + box.height)
            outline = f"{box.outline}{_mark(look, box)}"
            if tip:
                shapes.append(f'<path d="{outline}">{_title(tip)}</path>')
            else:
                plain.append(outline)
        if plain:
            shapes.append(f'<path d="{"".join(plain)}"/>')
        if shapes:
            self._parts.append(f"<g {_look(look)}>{''.join(shapes)}</g>")

    def cell(self, look: str, box: Box, tip: str = "") -> None:
        """Draw one rectangle as ``cells`` does."""
        self.cells(look, [(box, tip)])

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", size: float = FONT, faint: bool = False,
        bold: bool = False, tip: str = "",
    ) -> None:  # fmt: skip
        """Write printable text at its baseline; ``tip`` has the whole of a shortened text."""
        self._reach(y + size / 3)
        more = f' text-anchor="{anchor}"' if anchor != "start" else ""
        more += ' fill-opacity="0.72"' if faint else ""
        more += ' font-weight="600"' if bold else ""
        begin = f'<text x="{place(x)}" y="{place(y)}" font-size="{place(size)}" fill="currentColor"{more}>'
        self._parts.append(f"{begin}{_title(tip)}{html.escape(text)}</text>")

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a thin line, such as an axis."""
        self._reach(max(y1, y2))
        self._parts.append(
            f'<path d="M{place(x1)} {place(y1)}L{place(x2)} {place(y2)}" class="ck-line" fill="none"'
            ' stroke="currentColor" stroke-opacity="0.2" stroke-width="0.8"/>'
        )

    def outline(self, path: str) -> None:
        """Draw the line of a second series over the first."""
        self._parts.append(f'<path d="{path}" {_look(OUTLINE)}/>')

    def legend(self, swatches: Iterable[Swatch], y: float) -> None:
        """Draw a swatch and a text for each entry, in as many lines as they need."""
        x = 0.0
        for swatch in swatches:
            width = 16 + text_width(swatch.text)
            if x and x + width > WIDTH:
                x, y = 0.0, y + 18
            self.cell(swatch.look, Box(x, y + 1, 11, 11))
            self.text(x + 16, y + 10.5, swatch.text, size=SMALL)
            x += width + 14

    def picture(self, kind: str, title: str, summary: str, details: str = "") -> Picture:
        """Return the picture; the details follow the summary in its description."""
        description = f"{summary} {details}".rstrip()
        # A title as the first child is the name of the picture for screen readers, which read the description too.
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" class="ck-picture ck-{kind}" width="100%"'
            f' viewBox="0 0 {WIDTH} {place(math.ceil(self.height + 2))}" font-family="system-ui,sans-serif">'
            f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>{''.join(self._parts)}</svg>"
        )
        return Picture(kind, title, summary, description, svg)

    def _add(self, start: str, element: str, tip: str) -> None:
        self._parts.append(f"{start}>{_title(tip)}</{element}>" if tip else f"{start}/>")

    def _reach(self, y: float) -> None:
        self.height = max(self.height, y)


def _title(tip: str) -> str:
    return f"<title>{html.escape(tip)}</title>" if tip else ""


def _look(look: str) -> str:
    """Return the attributes of shapes: a colour, or lines over a shape that cannot be seen but has a tooltip."""
    if look == SOLID:
        return 'class="ck-solid" fill="currentColor"'
    if look == OUTLINE:
        return f'class="{OUTLINE}" fill="none" stroke="{fill_of(OUTLINE)}" stroke-width="1.6"'
    if look not in MARKS:
        return f'class="{look}" fill="{fill_of(look)}"'
    return (
        f'class="ck-{look}" fill="currentColor" fill-opacity="0" stroke="currentColor" stroke-opacity="0.6"'
        ' stroke-width="0.8"'
    )


def _mark(look: str, box: Box) -> str:
    """Return the lines of a mark in a box, as commands of a path."""
    if look == HATCHED:
        return "".join(_diagonals(box, 4.0))
    size = min(box.width, box.height) * 0.28
    x, y = box.x + box.width / 2, box.y + box.height / 2
    if look == CROSSED:
        arms = (f"M{place(x - size)} {place(y - size * s)}L{place(x + size)} {place(y + size * s)}" for s in (1, -1))
        return "".join(arms)
    if look == PLUS:
        return f"M{place(x - size)} {place(y)}h{place(2 * size)}M{place(x)} {place(y - size)}v{place(2 * size)}"
    if look == DOT:
        return f"M{place(x - 0.5)} {place(y)}h1"
    if look == RING:
        arc = f"a{place(size)} {place(size)} 0 1 0"
        return f"M{place(x - size)} {place(y)}{arc} {place(2 * size)} 0{arc} {place(-2 * size)} 0"
    return ""


def _diagonals(box: Box, step: float) -> Iterator[str]:
    """Yield lines from the left and bottom sides of a rectangle upwards, cut at its sides."""
    offset = step
    while offset < box.width + box.height:
        left = box.x + max(0.0, offset - box.height), box.y + min(box.height, offset)
        right = box.x + min(box.width, offset), box.y + max(0.0, offset - box.width)
        yield f"M{place(left[0])} {place(left[1])}L{place(right[0])} {place(right[1])}"
        offset += step
