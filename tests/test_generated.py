"""What is generated from the code agrees with the code."""

from __future__ import annotations

import typing
from collections import Counter
from pathlib import Path

import pytest

import ckptkit
from tests.generated import code_tables, files


@pytest.mark.parametrize(("path", "text"), files().items(), ids=[path.name for path in files()])
def test_generated_files_are_current(path: Path, text: str) -> None:
    """``python -m tests.generated`` was run after the last change of the code."""
    assert path.read_text(encoding="utf-8") == text


def test_a_code_is_declared_once() -> None:
    """Two kinds of finding never share a code."""
    codes = Counter(code.name for table in code_tables().values() for code in table)
    assert [name for name, number in codes.items() if number > 1] == []


@pytest.mark.parametrize("name", [name for name in ckptkit.__all__ if callable(getattr(ckptkit, name))])
def test_type_hints_can_be_read(name: str) -> None:
    """``typing.get_type_hints`` works on every public function and on the fields of every public class."""
    assert isinstance(typing.get_type_hints(getattr(ckptkit, name)), dict)
