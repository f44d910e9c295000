"""A param-groups plan as a page, and as one JSON document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ckptkit.core.config_files import toml_value
from ckptkit.core.text import plural, printable, quoted
from ckptkit.param_groups.conditions import condition_table
from ckptkit.param_groups.explain import Explanation
from ckptkit.param_groups.lock import LockedParameter, ParamGroupsLock, plain_option
from ckptkit.param_groups.ownership import OptionStep
from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedGroup, PlannedParameter
from ckptkit.param_groups.spec import GroupRule
from ckptkit.render.page import Code, Line, Page, Table, code

__all__ = [
    "explain_document",
    "explain_page",
    "groups_document",
    "groups_page",
    "groups_rows",
    "lock_page",
    "rate_table",
    "shown_number",
]


_WIDTH = 24
_SPREAD = 100  # from where on bars of their true length would be too short to tell apart
_SHORT = 10


def rate_table(plan: ParamGroupsPlan) -> Table | None:
    """Return one row for each layer and rate in it, from input to output; None where the plan knows no layers."""
    counts: dict[tuple[int, float], int] = {}
    for group in plan.groups:
        rate = _rate(group)
        for parameter in group.parameters:
            if parameter.layer is not None and rate is not None:
                counts[parameter.layer, rate] = counts.get((parameter.layer, rate), 0) + 1
    if not counts:
        return None
    rates = [rate for _, rate in counts]
    above = [rate for rate in rates if rate > 0]
    log = bool(above) and max(above) / min(above) >= _SPREAD
    rows = tuple(
        (str(layer), f"{count:,}", shown_number(rate), _bar(rate, above, log=log))
        for (layer, rate), count in sorted(counts.items())
    )
    return Table(
        ("layer", "parameters", "lr", "log scale" if log else ""), rows, frozenset({"layer", "parameters", "lr"})
    )


def shown_number(value: Any) -> str:
    """Return a number short enough for a column: as it is, or to six digits."""
    text = str(value)
    return text if not isinstance(value, float) or len(text) <= _SHORT else f"{value:.6g}"


def _rate(group: PlannedGroup) -> float | None:
    rate, scale = (plain_option(group.options.get(key, missing)) for key, missing in (("lr", None), ("lr_scale", 1.0)))
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not isinstance(scale, int | float):
        return None
    return float(rate * scale)


def _bar(rate: float, above: list[float], *, log: bool) -> str:
    if rate <= 0:
        return ""
    low, high = min(above), max(above)
    share = math.log(rate / low) / math.log(high / low) if log else rate / high
    return "█" * max(1, round(share * (_WIDTH - 1)) + 1 if log else round(share * _WIDTH))


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


_OUTCOMES = {
    "frozen": "is frozen in the model (requires_grad=False) and in no group",
    "freeze": "is frozen by the spec and in no group",
    "unowned": "is trainable, and no group of the spec owns it",
}


def explain_page(told: Explanation) -> Page:
    """Return what the parameter is, who speaks for it, and a row for each step to each of its options."""
    parameter = told.parameter
    roles = f", {' and '.join(sorted(parameter.roles))}" if parameter.roles else ""
    shape = "uninitialised" if parameter.shape is None else f"{parameter.dtype} {list(parameter.shape)}"
    lines = [Line((code(parameter.name), f"  {shape}{roles}"))]
    if parameter.aliases:
        lines.append(Line(("tied to ", _names(alias.name for alias in parameter.aliases)), under=True))
    if told.outcome != "trained":
        lines.append(Line((_OUTCOMES[told.outcome],), under=True))
    if told.rule is not None:
        lines.append(Line(("owned by group ", Code(quoted(told.rule))), under=True))
    if told.shadowed:
        lines.append(Line(("fits too, below: ", _names(told.shadowed)), under=True))
    if told.modifiers:
        layer = "" if told.layer is None else f", layer {told.layer}"
        lines.append(Line(("modified by ", _names(told.modifiers), layer), under=True))
    if not told.steps:
        return lines
    return [*lines, Table(("option", "value", "because"), tuple(_rows(told.steps)), frozenset({"value"}))]


def explain_document(told: Explanation) -> dict[str, Any]:
    """Return the document of ``ckpt groups explain --json``."""
    parameter = told.parameter
    return {
        "schema": "ckptkit.groups-explain/1",
        "key": parameter.name,
        "aliases": [alias.name for alias in parameter.aliases],
        "dtype": parameter.dtype,
        "shape": None if parameter.shape is None else list(parameter.shape),
        "roles": sorted(parameter.roles),
        "outcome": told.outcome,
        "rule": told.rule,
        "shadowed": list(told.shadowed),
        "modifiers": list(told.modifiers),
        "layer": told.layer,
        "steps": [
            {"who": said.source, "option": said.key, "value": plain_option(said.value), "factor": said.factor}
            for said in told.steps
        ],
        "options": None if told.options is None else plain_option(dict(told.options)),
    }


def _rows(steps: tuple[OptionStep, ...]) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys(said.key for said in steps):
        for place, said in enumerate(one for one in steps if one.key == key):
            factor = "" if said.factor is None else f", times {said.factor:g}"
            value = printable(str(plain_option(said.value)))
            yield ("" if place else printable(key), value, f"{printable(said.source)}{factor}")


def _names(names: Any) -> Code:
    return Code(", ".join(map(quoted, names)))


def lock_page(lock: ParamGroupsLock) -> Page:
    """Return the place, name, shape and group of each parameter, then the count and the fingerprint."""
    rows = [_row_lock(one, group.name) for group in lock.groups for one in group.parameters]
    rows += [_row_lock(one, "") for one in lock.outside]
    trained = sum(len(group.parameters) for group in lock.groups)
    count = f"{plural(trained, 'parameter')} in {plural(len(lock.groups), 'group')}, {len(lock.outside)} in none"
    return [
        Table(("index", "parameter", "dtype", "shape", "group"), tuple(rows), frozenset({"index"})),
        Line((count,)),
        Line((f"fingerprint sha256:{lock.fingerprint}",)),
    ]


def _row_lock(one: LockedParameter, group: str) -> tuple[str, ...]:
    index = "" if one.index is None else str(one.index)
    return index, printable(one.name), one.dtype, str(list(one.shape)), printable(group)
