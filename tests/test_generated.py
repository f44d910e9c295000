"""What is generated from the code agrees with the code."""

from __future__ import annotations

import ast
import typing
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import ckptkit
from ckptkit.core.findings import Code
from tests.generated import ROOT, code_tables, files
from tests.helpers_public import public_names

PACKAGE = ROOT / "ckptkit"


@pytest.mark.parametrize(("path", "text"), files().items(), ids=[path.name for path in files()])
def test_generated_files_are_current(path: Path, text: str) -> None:
    """``python -m tests.generated`` was run after the last change of the code."""
    assert path.read_text(encoding="utf-8") == text


def test_a_code_is_declared_once() -> None:
    """Two kinds of finding never share a code."""
    codes = Counter(code.name for table in code_tables().values() for code in table)
    assert [name for name, number in codes.items() if number > 1] == []


def test_every_declared_code_is_used() -> None:
    """The list of codes has no code that the package never reports."""
    used = used_names()
    unused = {
        f"{module}.{name}"
        for module in code_tables()
        for name, value in vars(import_module(module)).items()
        if isinstance(value, Code) and name not in used
    }
    assert unused == set()


@cache
def nodes() -> dict[str, list[ast.AST]]:
    """Return the nodes of each module of the package."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    return {path.relative_to(PACKAGE).as_posix(): list(ast.walk(tree)) for path, tree in trees.items()}


def used_names() -> set[str]:
    here = [node for path, found in nodes().items() if not path.endswith("codes.py") for node in found]
    return {node.attr for node in here if isinstance(node, ast.Attribute)} | {
        node.id for node in here if isinstance(node, ast.Name)
    }


def test_findings_are_made_from_codes() -> None:
    """No finding has a code that is not in the lists: only ``Code.finding`` calls ``Finding``."""
    callers = {
        path
        for path, found in nodes().items()
        for node in found
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"
    }
    assert callers == {"core/findings/__init__.py"}


@pytest.mark.parametrize("name", sorted(public_names().keys() & {*ckptkit.__all__}))
def test_type_hints_can_be_read(name: str) -> None:
    """``typing.get_type_hints`` works on every public function and on the fields of every public class."""
    assert isinstance(typing.get_type_hints(getattr(ckptkit, name)), dict)
