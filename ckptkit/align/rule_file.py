"""Suggested rules as the text of a rule file: evidence in comments, and in comments what is not decided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from ckptkit.align.to_rules import Suggestion
from ckptkit.core.config_files import toml_value
from ckptkit.core.text import plural, printable
from ckptkit.tensor_ops import Operation

__all__ = ["rule_table", "rule_text"]

_Item = TypeVar("_Item")


def rule_table(suggestions: Iterable[Suggestion]) -> dict[str, Any]:
    """Return the rules in the form of a parsed rule file."""
    return {"rule": [_table(one) for one in suggestions]}


def _table(one: Suggestion) -> dict[str, Any]:
    made: dict[str, Any] = {"from": _one_or_all(one.sources), "to": _one_or_all(one.targets)}
    if one.operations:
        made["op"] = _one_or_all(tuple(map(_operation, one.operations)))
    return made


def _operation(operation: Operation) -> str | dict[str, Any]:
    return {operation.name: operation.params()} if operation.params() else operation.name


def _one_or_all(items: tuple[_Item, ...]) -> _Item | list[_Item]:
    return items[0] if len(items) == 1 else list(items)


def rule_text(
    title: Iterable[str], suggestions: Iterable[Suggestion], doubts: Iterable[tuple[str, list[Suggestion]]]
) -> str:
    """Return a TOML file with a title, the rules, and those that could be, as comments."""
    lines = [f"# {printable(line)}" for line in title]
    for one in suggestions:
        lines += ["", *_comment(one), *_lines(one)]
    for why, candidates in doubts:
        lines += ["", f"# ambiguous: {printable(why)}"]
        for one in candidates:
            lines += [f"# {line}" for line in _lines(one)]
    return "\n".join(lines) + "\n"


def _comment(one: Suggestion) -> list[str]:
    return [f"# {plural(len(one.keys), 'tensor')}, confidence {one.confidence:.2f}: {printable(one.why)}"]


def _lines(one: Suggestion) -> list[str]:
    table = _table(one)
    lines = ["[[rule]]", f"from = {toml_value(table['from'])}", f"to = {toml_value(table['to'])}"]
    if "op" in table:
        lines.append(f"op = {toml_value(table['op'])}")
    return lines
