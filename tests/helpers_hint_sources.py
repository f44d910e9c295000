"""Read the texts of the package that tests of hints are about."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ckptkit.core.gc_pause import pause_gc
from tests.helpers_cli import ROOT

__all__ = ["PLACES", "SOURCES", "Source", "covers", "read_source"]

SOURCES = sorted((ROOT / "ckptkit").rglob("*.py"))
PLACES = {path: path.relative_to(ROOT / "ckptkit") for path in SOURCES}


class Source(NamedTuple):
    """The texts of a source, with ``XX`` for what is filled in, and without docstrings.

    ``hints`` are those of errors and findings, ``hints_without_call`` those of errors that have no words for Python.
    """

    texts: tuple[str, ...]
    hints: tuple[str, ...]
    hints_without_call: tuple[str, ...]


@cache
def read_source(path: Path) -> Source:
    texts: list[str] = []
    hints: list[str] = []
    alone: list[str] = []
    with pause_gc():  # the nodes of a tree are many, and none of them is garbage yet
        waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.JoinedStr | ast.Constant):
            texts += [_text(node)] if isinstance(node, ast.JoinedStr) or isinstance(node.value, str) else []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.JoinedStr):  # the texts around its values are read already
            waiting += [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            continue
        if isinstance(node, ast.Call):
            words = {word.arg: word.value for word in node.keywords}
            hints += [_text(words[name]) for name in ("hint", "call") if name in words]
            alone += [_text(words["hint"])] if "hint" in words and "call" not in words else []
            is_finding = isinstance(node.func, ast.Attribute) and node.func.attr == "finding"
            hints += [_text(node.args[2])] if is_finding and len(node.args) > 2 else []
        waiting += [] if isinstance(node, ast.Name) else ast.iter_child_nodes(node)
    return Source(tuple(texts), tuple(hints), tuple(alone))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return _text(node.value) if isinstance(node.value, ast.Call) else "XX"
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} {_text(node.orelse)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "drop_options":
        return "--drop XX"
    return "XX"


def covers(part: str, text: str) -> bool:
    """Return whether a text after its file and a colon has the words of a part, which is written so too."""
    file, _, words = part.partition(": ")
    return text.startswith(f"{file}: ") and words in text
