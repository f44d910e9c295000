"""Write suggested rules as the table or the text of a rule file, with what has no rule in comments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from ckptkit.align.writing.to_rules import Suggestion
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.config_files import toml_value
from ckptkit.core.text import plural, printable
from ckptkit.rules.model import Rule, Rules, Stage
from ckptkit.tensor_ops.operation import Operation

__all__ = ["rule_file", "rule_table"]

_MOST_LISTED = 40  # keys in one comment
_Item = TypeVar("_Item")
Undecided = tuple[str, Sequence[Suggestion], Sequence[TensorInfo], Sequence[TensorInfo]]


def rule_table(suggestions: Iterable[Suggestion]) -> dict[str, object]:
    """Return the rules in the form of a parsed rule file."""
    return {"rule": [_table(suggestion) for suggestion in suggestions]}


def _table(suggestion: Suggestion) -> dict[str, object]:
    if not suggestion.targets:
        return {"from": _one_or_all(suggestion.sources), "drop": True}
    table: dict[str, object] = {"from": _one_or_all(suggestion.sources), "to": _one_or_all(suggestion.targets)}
    if suggestion.operations:
        table["op"] = _one_or_all(tuple(map(_operation, suggestion.operations)))
    return table


def _operation(operation: Operation) -> object:
    return {operation.name: operation.params()} if operation.params() else operation.name


def _one_or_all(items: tuple[_Item, ...]) -> _Item | list[_Item]:
    return items[0] if len(items) == 1 else list(items)


def rule_file(
    title: Iterable[str],
    given: Rules,
    suggestions: Iterable[Suggestion],
    undecided: Iterable[Undecided],
    left_out: Iterable[tuple[str, Sequence[TensorInfo]]],
) -> str:
    """Return the text of a TOML file: the given rules, the suggestions, and in comments what has no rule.

    ``undecided`` has the reason, the candidates, and the expected and found tensors of each ambiguity. ``left_out`` has
    lists of tensors, each with a heading.
    """
    lines = [f"# {printable(line)}" for line in title]
    for number, stage in enumerate(given.stages):
        lines += ["", *_stage_lines(stage, is_first=number == 0, may_be_unused=given.allow_unused)]
    name = "stage.rule" if given.stages else "rule"
    suggestions = list(suggestions)
    if given.stages and suggestions:
        lines += ["", "[[stage]]  # the rules below see the names that the rules above give"]
    for suggestion in suggestions:
        count = f"{plural(len(suggestion.keys), 'tensor')}, confidence {suggestion.confidence:.2f}: "
        evidence = f"# {count if suggestion.targets else ''}{printable(suggestion.why)}"
        lines += ["", evidence, *_rule_lines(_table(suggestion), name)]
    for why, candidates, expected, found in undecided:
        lines += ["", f"# ambiguous: {plural(len(expected), 'tensor')}: {printable(why)}"]
        lines += [f"# {line}" for candidate in candidates for line in _rule_lines(_table(candidate), name)]
        if not candidates:
            lines += [*_listed("expected:", expected), *_listed("could be:", found)]
    for heading, infos in left_out:
        if infos:
            lines += ["", *_listed(heading, infos)]
    return "\n".join(lines) + "\n"


def _listed(heading: str, infos: Sequence[TensorInfo]) -> Iterator[str]:
    yield f"# {heading}"
    for info in infos[:_MOST_LISTED]:
        yield f"#   {printable(info.key)}  {info}"
    if len(infos) > _MOST_LISTED:
        yield f"#   and {len(infos) - _MOST_LISTED:,} more"


def _rule_lines(table: Mapping[str, object], name: str) -> list[str]:
    return [f"[[{name}]]", *(f"{field} = {toml_value(value)}" for field, value in table.items())]


def _stage_lines(stage: Stage, *, is_first: bool, may_be_unused: bool) -> Iterator[str]:
    """Yield the lines of one pass of given rules; the first pass is at the top of the file."""
    if not is_first:
        yield "[[stage]]"
    if stage.keep:
        yield f"keep = {toml_value([pattern.text for pattern in stage.keep])}"
    if stage.strip:
        yield f"strip = {toml_value(list(stage.strip))}"
    for rule in stage.rules:
        table = _given_table(rule)
        if rule.optional or may_be_unused:
            table["optional"] = True
        yield from _rule_lines(table, "rule" if is_first else "stage.rule")


def _given_table(rule: Rule) -> dict[str, object]:
    table: dict[str, object] = {"from": _one_or_all(tuple(pattern.text for pattern in rule.sources))}
    if rule.drops:
        return table | {"drop": True}
    table["to"] = _one_or_all(tuple(template.text for template in rule.templates[0]))
    if rule.operations:
        table["op"] = _one_or_all(tuple(map(_operation, rule.operations)))
    if rule.on_collision != "error":
        table["on_collision"] = rule.on_collision
    return table
