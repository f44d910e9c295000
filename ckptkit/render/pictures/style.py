"""The colours of the pictures: attributes that work anywhere, and CSS rules for light and for dark pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

__all__ = ["OUTLINE", "RAMP", "SERIES", "fill_of", "picture_style"]


class _Colour(NamedTuple):
    """A colour of a class: on a light page, and on a dark page."""

    light: str
    dark: str


RAMP: Final = tuple(f"ck-r{number}" for number in range(8))  # from a small to a large change
SERIES: Final = tuple(f"ck-s{number}" for number in range(8))  # kinds without an order, such as dtypes
OUTLINE: Final = "ck-l1"  # a line, of the second of two series

# The lightness alone gives the order: what changed most is furthest from the page, light or dark.
_RAMP: Final = (
    ("#fde3b8", "#4b1d5f"), ("#fbc78a", "#74206a"), ("#f6a566", "#9e2f64"), ("#ec8053", "#c4424f"),
    ("#d75a50", "#e0603a"), ("#b43a5b", "#f18a35"), ("#842363", "#f9b950"), ("#501a5c", "#fcec9c"),
)  # fmt: skip
# After the colours of Okabe and Ito, which colour-blind people tell apart; all can be seen on white and on black.
_SERIES: Final = (
    ("#3a7ca8", "#5aa5d6"), ("#dc8a1e", "#eba743"), ("#2c9a7a", "#3fbf98"), ("#b3628f", "#d58ab4"),
    ("#7c74c4", "#9d97e2"), ("#c2542d", "#e0774f"), ("#8a8f3a", "#b3b85c"), ("#7d858c", "#9aa3ab"),
)  # fmt: skip
_COLOURS: Final[Mapping[str, _Colour]] = {
    **{name: _Colour(*pair) for name, pair in zip(RAMP, _RAMP, strict=True)},
    **{name: _Colour(*pair) for name, pair in zip(SERIES, _SERIES, strict=True)},
    "ck-same": _Colour("#d3d7db", "#454a51"),
    OUTLINE: _Colour("#c2410c", "#ff9d5c"),
}
_RULES: Final = (
    ".ck-picture{display:block;width:100%;max-width:36rem;height:auto}"
    ".ck-picture text{fill:currentColor;font-family:system-ui,-apple-system,'Segoe UI',sans-serif}"
)
# What hosts of notebooks say about their theme; a browser's wish for dark pages says nothing about it.
_LIGHT_HOSTS: Final = '[data-jp-theme-light="true"],.vscode-light,.vscode-high-contrast-light,html[theme="light"]'
_DARK_HOSTS: Final = (  # VS Code gives its light theme of high contrast the class of the dark one too
    '[data-jp-theme-light="false"],.vscode-dark,.vscode-high-contrast:not(.vscode-high-contrast-light),'
    'html[theme="dark"]'
)


def fill_of(name: str) -> str:
    """Return the colour of a class where no CSS is given; it can be seen on white and on black."""
    return _COLOURS[name].light


def picture_style(*, in_notebook: bool = False) -> str:
    """Return the CSS rules of the pictures, for the one ``<style>`` of a page.

    A page is light or dark as the reader wishes. A notebook has the theme of its host, where the host tells it.
    """
    rules = [_RULES]
    rules += [f".ck-picture .{name}{{fill:var(--{name})}}" for name in _COLOURS if name != OUTLINE]
    rules.append(f".ck-picture .{OUTLINE}{{stroke:var(--{OUTLINE})}}")
    light, dark = _variables(dark=False), _variables(dark=True)
    rules.append(f".ck-picture{{{light}}}@media screen and (prefers-color-scheme:dark){{.ck-picture{{{dark}}}}}")
    if in_notebook:
        rules.append(f":is({_LIGHT_HOSTS}) .ck-picture{{{light}}}:is({_DARK_HOSTS}) .ck-picture{{{dark}}}")
    return "".join(rules)


def _variables(*, dark: bool) -> str:
    return ";".join(f"--{name}:{colour.dark if dark else colour.light}" for name, colour in _COLOURS.items())
