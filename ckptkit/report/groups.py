"""A param-groups plan as a page, and as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit.param_groups import GroupRule, ParamGroupsPlan, PlannedParameter
from ckptkit.param_groups.plain import plain_option
from ckptkit.report.page import Code, Line, Page, Table
from ckptkit.text import plural, printable, quoted

__all__ = ["groups_document", "groups_page", "groups_rows"]

SCHEMA = "ckptkit.groups/1"
_COLUMNS = ("group", "rule", "parameters", "elements", "share", "lr", "weight_decay", "other options")
_NUMBERS = frozenset({"parameters", "elements", "share", "lr", "weight_decay"})


def groups_rows(plan: ParamGroupsPlan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and one row of finished cells for each group; a default of the optimizer is left empty."""
    rows: list[tuple[str, ...]] = []
    for group in plan.groups:
        others = {key: value for key, value in group.options.items() if key not in {"lr", "weight_decay"}}
        rows.append(
            (
                printable(group.name),
                _rule(group.rule),
                f"{len(group.parameters):,}",
                f"{group.elements:,}",
                _share(group.elements, plan.elements),
                _cell(group.options, "lr"),
                _cell(group.options, "weight_decay"),
                ", ".join(f"{printable(key)}={_cell(others, key)}" for key in others),
            )
        )
    return _COLUMNS, rows


def groups_page(plan: ParamGroupsPlan) -> Page:
    """Return the table, and below it what trains, what is frozen, and which optional groups own nothing."""
    headers, rows = groups_rows(plan)
    trained = sum(len(group.parameters) for group in plan.groups)
    counts = [plural(trained, "parameter"), plural(len(plan.groups), "group"), plural(plan.elements, "element")]
    lines = [Line((f"{counts[0]} in {counts[1]}, {counts[2]}",))]
    if plan.frozen:
        frozen = sum(parameter.elements for parameter in plan.frozen)
        text = f"{plural(len(plan.frozen), 'frozen parameter')} in no group, {plural(frozen, 'element')}"
        lines.append(Line((text,)))
    lines.extend(Line(("optional group ", Code(quoted(rule.name)), " owns nothing")) for rule in plan.idle)
    return [Table(headers, tuple(rows), _NUMBERS), *lines]


def groups_document(plan: ParamGroupsPlan) -> dict[str, Any]:
    """Return the plan as the document of ``ckpt groups table --json``; NaN and Inf are strings, tensors are numbers."""
    frozen = [_parameter(parameter) for parameter in plan.frozen]
    return {
        "schema": SCHEMA,
        "groups": [
            {
                "name": group.name,
                "params": [pattern.text for pattern in group.rule.patterns],
                "rest": group.rule.rest,
                "options": plain_option(dict(group.options)),
                "elements": group.elements,
                "parameters": [_parameter(parameter) for parameter in group.parameters],
            }
            for group in plan.groups
        ],
        "frozen": frozen,
        "idle": [rule.name for rule in plan.idle],
        "summary": {
            "groups": len(plan.groups),
            "parameters": sum(len(group.parameters) for group in plan.groups),
            "elements": plan.elements,
            "frozen_parameters": len(frozen),
            "frozen_elements": sum(parameter.elements for parameter in plan.frozen),
        },
    }


def _parameter(parameter: PlannedParameter) -> dict[str, Any]:
    return {
        "key": parameter.name,
        "shape": list(parameter.shape),
        "elements": parameter.elements,
        "aliases": list(parameter.aliases),
    }


def _rule(rule: GroupRule) -> str:
    return "(rest)" if rule.rest else ", ".join(printable(pattern.text) for pattern in rule.patterns)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _cell(options: Mapping[str, Any], key: str) -> str:
    return printable(str(plain_option(options[key]))) if key in options else ""
