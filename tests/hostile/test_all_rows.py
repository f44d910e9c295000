"""Every row of the corpus is tested: its number begins the name of a case in one of the tables beside this file."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROWS = {
    "A": 14,
    "B": 30,
    "C": 21,
    "D": 14,
    "E": 12,
    "F": 8,
    "G": 19,
    "H": 17,
    "I": 20,
}
NOT_APPLICABLE: dict[str, str] = {}  # row -> the reason why it cannot be tested

TABLES = [path.stem for path in sorted(Path(__file__).parent.glob("test_*.py")) if path.stem != "test_all_rows"]


def names() -> list[str]:
    """Return the names of all cases: those of the tables, and those with a test function of their own."""
    modules = [import_module(f"tests.hostile.{table}") for table in TABLES]
    return [name for module in modules for name in (*module.REFUSED, *module.ACCEPTED, *module.OTHER)]


@pytest.mark.parametrize("letter", ROWS)
def test_every_row_has_a_case_or_a_reason(letter: str) -> None:
    rows = {f"{letter}{number}" for number in range(1, ROWS[letter] + 1)}
    covered = {name.split()[0] for name in names()}
    assert rows - covered - NOT_APPLICABLE.keys() == set()
    assert rows & covered & NOT_APPLICABLE.keys() == set()


def test_every_case_names_its_row_and_says_more() -> None:
    for name in names():
        row = re.match(r"([A-Z])(\d+) \S", name)
        assert row, name
        assert 1 <= int(row[2]) <= ROWS[row[1]], name
