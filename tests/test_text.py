"""Printed names are printable, on one line and exact: Python reads the printed form back."""

from __future__ import annotations

import ast
import math
import re
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.core.text import human_bytes, option_texts, percent, plural, printable, quoted, shell_word, short_number
from ckptkit.errors import one_line
from tests.helpers_cli import ROOT
from tests.helpers_pages import PAGES

ANY = st.text(st.characters(exclude_categories=()))  # all of Unicode, lone surrogates and unassigned code points too


@pytest.mark.parametrize(
    "name", ["0012", "1e5", "nan", "1_000", "a.b", "weiß", "層.0", "", "a b", '=cmd|"/c"!A0', "<b>"]
)
def test_harmless_names_are_printed_exactly(name: str) -> None:
    assert printable(name) == name
    assert quoted(name) == shell_word(name) == f"'{name}'"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("a\x1b[2Jb", "a\\x1b[2Jb", id="escape sequence"),
        pytest.param("a\x1b]0;t\x07", "a\\x1b]0;t\\x07", id="window title"),
        pytest.param("a\x9b2J", "a\\x9b2J", id="C1"),
        pytest.param("a\r\nb\tc\x00\x7f", "a\\x0d\\x0ab\\x09c\\x00\\x7f", id="C0 and DEL"),
        pytest.param("a\u202eb\u2066c\u061cd\u200fe", "a\\u202eb\\u2066c\\u061cd\\u200fe", id="bidi"),
        pytest.param(
            "a\u200bb\u200dc\ufeff\u2028\u2029", "a\\u200bb\\u200dc\\ufeff\\u2028\\u2029", id="zero width, lines"
        ),
        pytest.param("a\ud800", "a\\ud800", id="lone surrogate"),
        pytest.param("a\U000e0041\U0010ffff", "a\\U000e0041\\U0010ffff", id="tags and the last code point"),
        pytest.param("a\ufe0f\u3164\u034f\u2800", "a\\ufe0f\\u3164\\u034f\\u2800", id="selectors, fillers, a blank"),
        pytest.param("a\u00a0b\u3000", "a\\xa0b\\u3000", id="other spaces"),
        pytest.param(" a  b   ", "\\x20a \\x20b\\x20\\x20\\x20", id="spaces that a table would hide"),
        pytest.param("a\\x1b", "a\\\\x1b", id="a backslash becomes two"),
    ],
)
def test_control_and_invisible_characters_are_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown


@given(ANY)
def test_python_reads_a_printed_name_back(name: str) -> None:
    """A printed name is one line without runs of spaces, and a Python literal; so no two names print the same."""
    shown = quoted(name)
    assert shown.isprintable()
    assert one_line(shown) == shown
    assert "  " not in shown
    assert printable(name) == printable(name).strip()
    assert ast.literal_eval(shown) == name


@given(ANY)
def test_an_error_is_one_printable_line(sentence: str) -> None:
    assert one_line(sentence).isprintable()


def test_a_very_long_name_is_cut_in_the_middle() -> None:
    shown = printable("a" * 500_000 + "\n" * 500_000)
    assert shown == "a" * 200 + "...<999600 more characters>..." + "\\x0a" * 200


@pytest.mark.parametrize("count", [400, 1_000_000])
def test_names_of_spaces_take_linear_time(count: int) -> None:
    assert printable(" " * count).startswith("\\x20" * 200)
    assert len(printable("a" + " " * (count - 2) + "b")) < 2000


@given(st.text(max_size=50).filter(lambda text: "\0" not in text) | st.text("'\"$`\\;&|\n !a", max_size=30))
def test_a_shell_word_runs_nothing(text: str) -> None:
    """A hint can be pasted: it is one line, and the shell runs nothing in it."""
    word = shell_word(text)
    assert one_line(word) == word
    if not word.startswith("$"):
        assert shlex.split(word) == [text]


@pytest.mark.parametrize(
    "text", ["'; touch pwned; '", "$(touch pwned)", "a\x1b[2Jb\x9b", "\u202ea\U000e0041", "a  b\\'c\n", "`touch pwned`"]
)
def test_the_shell_reads_a_word_back(text: str) -> None:
    command = ["bash", "-c", f"printf %s {shell_word(text)}"]
    done = subprocess.run(command, capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert done.stdout.decode() == text


def test_a_very_long_shell_word_is_cut() -> None:
    assert "more characters" in shell_word("a" * 1000)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (248_000, "248.0 kB"), (999_950, "1.0 MB"), (10**9, "1.0 GB"),
     (10**24, "1000.0 ZB")],
)  # fmt: skip
def test_sizes_are_decimal(count: int, shown: str) -> None:
    assert human_bytes(count) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(3e-4, "3e-4"), (0.00030000000000000003, "3e-4"), (1e-05, "1e-5"), (0.1, "0.1"), (0.1 + 0.2, "0.3"), (1.0, "1"),
     (1e-3, "0.001"), (0.0009999999999999998, "0.001"), (0.01, "0.01"), (1.5e-4, "1.5e-4"), (-2e-7, "-2e-7"),
     (0.0, "0"), (-0.0, "0"), (65504.0, "65504"), (1_234_567, "1234567"), (1e9, "1e9"),
     (3.4028234663852886e38, "3.40282e38"),
     (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), (5e-324, "4.94066e-324"), (None, "")],
)  # fmt: skip
def test_numbers_are_short(number: float | None, shown: str) -> None:
    assert short_number(number) == shown


def test_numbers_are_written_in_one_way() -> None:
    """No other function formats a float for people; the page of values rounds a count, which is whole."""
    for path in (ROOT / "ckptkit").rglob("*.py"):
        found = (
            []
            if path.name in ("text.py", "values.py")
            else re.findall(r":\.?\d*[ge]\}", path.read_text(encoding="utf-8"))
        )
        assert not found, path


def test_options_that_differ_look_different() -> None:
    """Two options in one message are short, but never the same text."""
    assert option_texts(0.00030000000000000003, 1e-5) == ("3e-4", "1e-5")
    assert option_texts([0.9, 0.999], "x") == ("[0.9, 0.999]", "'x'")
    assert option_texts(0.1 + 0.2, 0.3) == ("0.30000000000000004", "0.3")
    assert option_texts({"decay": 1e-05, "steps": 3}, None) == ("{decay: 1e-5, steps: 3}", "None")


def test_counts_agree_with_their_noun() -> None:
    assert [plural(count, "tensor") for count in (0, 1, 1234)] == ["0 tensors", "1 tensor", "1,234 tensors"]
    assert plural(2, "entry", "entries") == "2 entries"


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0.0 %"), (1, "100 %"), (1.0, "100 %"), (0.9996, "99.9 %"), (1 - 1e-15, "99.9 %"), (0.99447, "99.4 %"),
     (0.5, "50.0 %"), (0.001, "0.1 %"), (0.0004, "< 0.1 %"), (1e-300, "< 0.1 %")],
)  # fmt: skip
def test_a_share_is_0_or_100_only_where_it_is(share: float, shown: str) -> None:
    """Rounding makes nothing of a part, and no part the whole."""
    assert percent(share) == shown


def test_shares_are_written_in_one_way() -> None:
    """No other function makes a percentage of a number, and every page shows a space before the sign."""
    for path in (ROOT / "ckptkit").rglob("*.py"):
        found = (
            [] if path.name == "text.py" else re.findall(r"\}\s?%(?![({sd])|\.\d%\}", path.read_text(encoding="utf-8"))
        )
        assert not found, path
    for name, page in PAGES.items():
        assert not re.findall(r"\d%(?!\d)", page), name
