"""Bars show numbers in proportion, in ASCII where the terminal has no Unicode."""

from __future__ import annotations

import math

import pytest

from ckptkit.render.page.sparkline import for_encoding, sparkline


@pytest.mark.parametrize(
    ("numbers", "bars"),
    [
        ([0, 1, 2, 8], "·▁▂█"),
        ([0.0, 1e-30], "·█"),
        ([5.0, math.inf, 10.0], "▄██"),
        ([math.inf, 0.0], "█·"),
        ([0, 0], "··"),
        ([], ""),
    ],
)
def test_the_highest_number_is_a_full_bar_and_only_zero_is_a_dot(numbers: list[float], bars: str) -> None:
    """A number that is not zero always has a bar; infinity does not make the others small."""
    assert sparkline(numbers) == bars


def test_bars_are_ascii_only_where_the_encoding_has_no_bars() -> None:
    """The dot is in Latin-1, but the bars are not: there all of them become ASCII."""
    assert for_encoding("x ·▁█", "utf-8") == "x ·▁█"
    assert {for_encoding("x ·▁█", encoding) for encoding in ("ascii", "latin-1", "no such encoding")} == {"x .18"}
