"""A small SVG writer: shapes with tooltips, texts that are shortened and escaped, and hatching without ids."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from ckptkit.core.text import printable
from ckptkit.render.page.shortening import shortened
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.style import fill_of

__all__ = ["FONT", "SMALL", "WIDTH", "Box", "Drawing", "columns_in", "short"]

WIDTH: Final = 480  # of every picture, in its own units: text of 12 can be read where 400 px are left
FONT: Final = 12
SMALL: Final = 11
_CHAR: Final = 0.58  # the mean width of a character, as a share of the size of the font


def columns_in(width: float, size: float = FONT) -> int:
    """Return how many characters of a font fit into a width."""
    return int(width / (size * _CHAR))


def short(names: list[str], width: float, size: float = FONT) -> list[str]:
    """Return names from files as printable labels that fit into a width; different names stay different."""
    return shortened([printable(name) for name in names], max(columns_in(width, size), 4))


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

    def hatch(self, box: Box, tip: str = "", *, step: float = 5) -> None:
        """Draw a rectangle with diagonal lines: what is missing."""
        self._reach(box.y + box.height)
        # The frame is filled with nothing that can be seen, so that the whole rectangle has the tooltip.
        self._add(
            f'<path d="{box.outline}{"".join(_diagonals(box, step))}" class="ck-line" fill="currentColor"'
            ' fill-opacity="0" stroke="currentColor" stroke-opacity="0.55" stroke-width="0.8"',
            "path",
            tip,
        )

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a thin line, such as an axis."""
        self._reach(max(y1, y2))
        self._parts.append(
            f'<path d="M{place(x1)} {place(y1)}L{place(x2)} {place(y2)}" class="ck-line" fill="none"'
            f' stroke="currentColor" stroke-opacity="0.25"/>'
        )

    def picture(self, kind: str, title: str, description: str) -> Picture:
        """Return the picture."""
        # A title as the first child is the name of the picture for screen readers, which read the description too.
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" class="ck-picture ck-{kind}" width="100%"'
            f' viewBox="0 0 {WIDTH} {place(math.ceil(self.height + 4))}" font-family="system-ui,sans-serif">'
            f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>{''.join(self._parts)}</svg>"
        )
        return Picture(kind, title, description, svg)

    def _add(self, start: str, element: str, tip: str) -> None:
        self._parts.append(f"{start}>{_title(tip)}</{element}>" if tip else f"{start}/>")

    def _reach(self, y: float) -> None:
        self.height = max(self.height, y)


def _title(tip: str) -> str:
    return f"<title>{html.escape(tip)}</title>" if tip else ""


def _diagonals(box: Box, step: float) -> Iterator[str]:
    """Yield lines from the left and bottom sides of a rectangle upwards, cut at its sides."""
    offset = step
    while offset < box.width + box.height:
        left = box.x + max(0.0, offset - box.height), box.y + min(box.height, offset)
        right = box.x + min(box.width, offset), box.y + max(0.0, offset - box.width)
        yield f"M{place(left[0])} {place(left[1])}L{place(right[0])} {place(right[1])}"
        offset += step
