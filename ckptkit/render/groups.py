"""A param-groups plan as a page, and as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptkit.core.config_files import toml_value
from ckptkit.core.text import plural, printable, quoted
from ckptkit.param_groups import GroupRule, ParamGroupsPlan, PlannedGroup, PlannedParameter
from ckptkit.param_groups.conditions import condition_table
from ckptkit.param_groups.plain import plain_option
from ckptkit.render.page import Code, Line, Page, Table
from ckptkit.render.rates import rate_table, shown_number

__all__ = ["groups_document", "groups_page", "groups_rows"]

SCHEMA = "ckptkit.groups/1"
_NUMBERS = frozenset({"parameters", "elements", "share", "lr", "weight_decay"})
_ALWAYS = frozenset({"group", "rule", "parameters", "elements", "share", "lr", "weight_decay", "examples"})
_EXAMPLES = 2
_LONGEST = 48  # of what a rule asks; in JSON it is whole


def groups_rows(plan: ParamGroupsPlan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and one row of finished cells for each group; a default of the optimizer is left empty.

    Optimizer, modifiers, layers and other options have a column where some group has any.
    """
    rows = [_row(group, plan.elements) for group in plan.groups]
    headers = [header for header in (rows[0] if rows else ()) if header in _ALWAYS or any(row[header] for row in rows)]
    return tuple(headers), [tuple(row[header] for header in headers) for row in rows]


def groups_page(plan: ParamGroupsPlan) -> Page:
    """Return the table, below it the rate of each layer, what trains, what is frozen, and which groups own nothing."""
    headers, rows = groups_rows(plan)
    rates = rate_table(plan)
    trained = sum(len(group.parameters) for group in plan.groups)
    counts = [plural(trained, "parameter"), plural(len(plan.groups), "group"), plural(plan.elements, "element")]
    lines = [Line((f"{counts[0]} in {counts[1]}, {counts[2]}",))]
    for what, still in (("in no group", plan.frozen), ("that the spec freezes", plan.freeze)):
        if still:
            elements = sum(parameter.elements for parameter in still)
            kind = "frozen parameter" if still is plan.frozen else "parameter"
            lines.append(Line((f"{plural(len(still), kind)} {what}, {plural(elements, 'element')}",)))
    lines.extend(Line(("optional group ", Code(quoted(rule.name)), " owns nothing")) for rule in plan.idle)
    return [Table(headers, tuple(rows), _NUMBERS), *([] if rates is None else [rates]), *lines]


def _row(group: PlannedGroup, elements: int) -> dict[str, str]:
    others = {key: value for key, value in group.options.items() if key not in {"lr", "weight_decay"}}
    layers = [parameter.layer for parameter in group.parameters if parameter.layer is not None]
    names = [parameter.name for parameter in group.parameters]
    more = f", ... {len(names) - _EXAMPLES:,} more" if len(names) > _EXAMPLES else ""
    return {
        "group": printable(group.name),
        "rule": _rule(group.rule),
        "modifiers": ", ".join(map(printable, group.modifiers)),
        "optimizer": printable(group.optimizer or ""),
        "parameters": f"{len(group.parameters):,}",
        "elements": f"{group.elements:,}",
        "share": _share(group.elements, elements),
        "lr": _cell(group.options, "lr"),
        "weight_decay": _cell(group.options, "weight_decay"),
        "layers": _range(layers),
        "other options": ", ".join(f"{printable(key)}={_cell(others, key)}" for key in others),
        "examples": ", ".join(map(printable, names[:_EXAMPLES])) + more,
    }


def _range(layers: list[int]) -> str:
    low, high = min(layers, default=-1), max(layers, default=-1)
    return "" if not layers else str(low) if low == high else f"{low}..{high}"


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
                "rule": group.rule.name,
                "match": None if group.rule.condition is None else condition_table(group.rule.condition),
                "optimizer": group.optimizer,
                "modifiers": list(group.modifiers),
                "options": plain_option(dict(group.options)),
                "elements": group.elements,
                "parameters": [_parameter(parameter) for parameter in group.parameters],
            }
            for group in plan.groups
        ],
        "frozen": frozen,
        "freeze": [_parameter(parameter) for parameter in plan.freeze],
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
        "rule": parameter.rule,
        "modifiers": list(parameter.modifiers),
        "layer": parameter.layer,
    }


def _rule(rule: GroupRule) -> str:
    asked = [printable(pattern.text) for pattern in rule.patterns]
    if rule.condition is not None:
        asked.append(f"match {printable(toml_value(condition_table(rule.condition)))}")
    text = ", ".join(asked)
    return "(rest)" if rule.rest else text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _cell(options: Mapping[str, Any], key: str) -> str:
    return printable(shown_number(plain_option(options[key]))) if key in options else ""
