"""The colours of the pictures: attributes that work anywhere, and CSS rules for light and for dark pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["RAMP", "SERIES", "fill_of", "picture_style"]


class _Colour(NamedTuple):
    """A colour of a class: on a light page, and on a dark page."""

    light: str
    dark: str


RAMP: Final = tuple(f"ck-r{number}" for number in range(8))  # from a small to a large change
SERIES: Final = tuple(f"ck-s{number}" for number in range(8))  # kinds that have no order, such as dtypes

# Light to dark on a light page, and the reverse on a dark one; the lightness alone gives the order.
_RAMP: Final = (
    ("#fde3b8", "#4b1d5f"), ("#fbc78a", "#74206a"), ("#f6a566", "#9e2f64"), ("#ec8053", "#c4424f"),
    ("#d75a50", "#e0603a"), ("#b43a5b", "#f18a35"), ("#842363", "#f9b950"), ("#501a5c", "#fcec9c"),
)  # fmt: skip
# After Okabe and Ito, who chose colours that colour-blind people tell apart; made to stand on white and on black.
_SERIES: Final = (
    ("#3a7ca8", "#5aa5d6"), ("#dc8a1e", "#eba743"), ("#2c9a7a", "#3fbf98"), ("#b3628f", "#d58ab4"),
    ("#7c74c4", "#9d97e2"), ("#c2542d", "#e0774f"), ("#8a8f3a", "#b3b85c"), ("#7d858c", "#9aa3ab"),
)  # fmt: skip

_FILLS: Final[Mapping[str, _Colour]] = {
    **{name: _Colour(*pair) for name, pair in zip(RAMP, _RAMP, strict=True)},
    **{name: _Colour(*pair) for name, pair in zip(SERIES, _SERIES, strict=True)},
    "ck-good": _Colour("#3a7ca8", "#5aa5d6"),
    "ck-bad": _Colour("#dc8a1e", "#eba743"),
    "ck-same": _Colour("#c9cdd2", "#4a4f56"),
}


def fill_of(name: str) -> str:
    """Return the colour of a class where no CSS is given; it can be read on white and on black."""
    return _FILLS[name].light


def picture_style(dark: str = "") -> str:
    """Return the CSS rules of the pictures; ``dark`` begins a selector for pages that are dark without a media query.

    The rules are for one ``<style>`` of the page that shows the pictures.
    """
    rules = [
        ".ck-picture{width:100%;max-width:40rem;height:auto;display:block;color:inherit}",
        ".ck-picture text{font-family:system-ui,-apple-system,'Segoe UI',sans-serif;fill:currentColor}",
    ]
    rules += [f".{name}{{fill:{colour.light}}}" for name, colour in _FILLS.items()]
    darks = "".join(f".{name}{{fill:{colour.dark}}}" for name, colour in _FILLS.items())
    rules.append(f"@media (prefers-color-scheme:dark){{{darks}}}")
    if dark:
        rules += [f"{dark} .{name}{{fill:{colour.dark}}}" for name, colour in _FILLS.items()]
    return "".join(rules)
