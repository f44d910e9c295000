"""Param groups, the explanation of one parameter, and a lock: as pages and as JSON documents."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from ckptkit.core.config_files import toml_value
from ckptkit.core.text import option_text, plural, printable, quoted, short_number
from ckptkit.errors import GroupsError
from ckptkit.param_groups.lock import lock_document, plain_option
from ckptkit.render.page import Code, Line, Listing, Page, Table, as_code
from ckptkit.render.page.head import Fact, Head
from ckptkit.render.summary import share_cell

if TYPE_CHECKING:
    from ckptkit.param_groups.explain import Explanation
    from ckptkit.param_groups.lock import LockedParameter, ParamGroupsLock
    from ckptkit.param_groups.ownership import OptionStep
    from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedGroup, PlannedParameter
    from ckptkit.param_groups.spec import ParamGroupSpec
    from ckptkit.param_groups.spec.fields import GroupRule

__all__ = [
    "explain_document", "explain_page", "groups_document", "groups_head", "groups_page", "groups_rows", "lock_document",
    "lock_page", "spec_document", "spec_page",
]  # fmt: skip

_RIGHT = frozenset({"parameters", "elements", "share", "lr", "weight_decay"})
_ALWAYS = frozenset({"group", "rule", "parameters", "elements", "share", "lr", "weight_decay", "examples"})
_GIVES_WAY = ("examples", "layers", "share", "rule", "modifiers", "elements", "optimizer", "other options")
_EXAMPLES = 2
_LONGEST_RULE = 48  # a longer rule is cut on the page; the JSON document has all of it


def groups_page(plan: ParamGroupsPlan, *, expand: bool = False) -> Page:
    """Return the page of ``ckpt groups table``.

    It has a row per group, the rate of each layer, the number of trainable and frozen parameters, and empty groups.
    With ``expand``, it also has a row per parameter.
    """
    headers, rows = groups_rows(plan)
    rates = _rate_table(plan)
    lines = [_counts(plan)]
    for noun, what, parameters in (
        ("frozen parameter", "in no group", plan.frozen),
        ("parameter", "that the spec freezes", plan.freeze),
    ):
        if parameters:
            elements = sum(parameter.elements for parameter in parameters)
            lines.append(Line((f"{plural(len(parameters), noun)} {what}, {plural(elements, 'element')}",)))
    lines.extend(
        Line(("optional group " if rule.optional else "group ", Code(quoted(rule.name)), " owns nothing"))
        for rule in plan.idle
    )
    groups = Table(headers, tuple(rows), _RIGHT, gives_way=_GIVES_WAY, title="Groups")
    more = [_parameter_table(plan)] if expand else []
    return [groups, *([] if rates is None else [rates]), *more, *lines]


def groups_head(plan: ParamGroupsPlan) -> Head:
    """Return the head of a report: how many parameters are in groups, which are frozen, and the range of rates."""
    frozen = len(plan.frozen) + len(plan.freeze)
    rates = sorted({rate for group in plan.groups if (rate := rate_of(group.options)) is not None})
    ends = dict.fromkeys((rates[0], rates[-1])) if rates else {}
    facts = [
        Fact.of_count(sum(len(group.parameters) for group in plan.groups), "parameter", "in groups"),
        Fact.of_count(len(plan.groups), "group"),
        Fact.of_count(plan.elements, "element", "in groups"),
        Fact.of_count(frozen, "frozen parameter"),
        *([Fact(" to ".join(map(short_number, ends)), "learning rate")] if rates else []),
    ]
    idle = any(not rule.optional for rule in plan.idle)
    return Head("groups table", _counts(plan), (), tuple(facts), "warning" if idle else "good")


def _counts(plan: ParamGroupsPlan) -> Line:
    trained = sum(len(group.parameters) for group in plan.groups)
    counts = [plural(trained, "parameter"), plural(len(plan.groups), "group"), plural(plan.elements, "element")]
    return Line((f"{counts[0]} in {counts[1]}, {counts[2]}",))


def _parameter_table(plan: ParamGroupsPlan) -> Table:
    """Return a row for each parameter with its group; frozen ones have none."""
    rows = [
        (one.name, printable(group.name), one, _option_cell(group.options, "lr"))
        for group in plan.groups
        for one in group.parameters
    ]
    rows += [(one.name, "(frozen)", one, "") for one in plan.frozen]
    rows += [(one.name, "(frozen by the spec)", one, "") for one in plan.freeze]
    cells = tuple(
        (printable(name), group, "" if one.layer is None else str(one.layer), str(list(one.shape)),
         f"{one.elements:,}", rate)
        for name, group, one, rate in rows
    )  # fmt: skip
    headers = ("parameter", "group", "layer", "shape", "elements", "lr")
    return Table(headers, cells, frozenset({"layer", "elements", "lr"}), title="Parameters")


def groups_rows(plan: ParamGroupsPlan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and a row of printable cells per group; an option that the spec does not set is empty.

    Optimizer, modifiers, layers and other options have a column only if some group has them.
    """
    rows = [_group_row(group, plan.elements) for group in plan.groups]
    headers = [header for header in (rows[0] if rows else ()) if header in _ALWAYS or any(row[header] for row in rows)]
    return tuple(headers), [tuple(row[header] for header in headers) for row in rows]


def _group_row(group: PlannedGroup, elements: int) -> dict[str, str]:
    others = {key: value for key, value in group.options.items() if key not in {"lr", "weight_decay"}}
    layers = [parameter.layer for parameter in group.parameters if parameter.layer is not None]
    names = [parameter.name for parameter in group.parameters]
    more = f", ... {len(names) - _EXAMPLES:,} more" if len(names) > _EXAMPLES else ""
    return {
        "group": printable(group.name),
        "rule": _rule_cell(group.rule),
        "modifiers": ", ".join(map(printable, group.modifiers)),
        "optimizer": printable(group.optimizer or ""),
        "parameters": f"{len(group.parameters):,}",
        "elements": f"{group.elements:,}",
        "share": share_cell(group.elements, elements),
        "lr": _option_cell(group.options, "lr"),
        "weight_decay": _option_cell(group.options, "weight_decay"),
        "layers": _range(layers),
        "other options": ", ".join(f"{printable(key)}={_option_cell(others, key)}" for key in others),
        "examples": ", ".join(map(printable, names[:_EXAMPLES])) + more,
    }


def _rule_cell(rule: GroupRule) -> str:
    conditions = [printable(pattern.text) for pattern in rule.patterns]
    if rule.condition is not None:
        conditions.append(f"match {printable(toml_value(_condition(rule)))}")
    text = ", ".join(conditions)
    return "(rest)" if rule.rest else text if len(text) <= _LONGEST_RULE else f"{text[:_LONGEST_RULE]} ..."


def _condition(rule: GroupRule) -> Mapping[str, object] | None:
    from ckptkit.param_groups.conditions import condition_table

    return None if rule.condition is None else condition_table(rule.condition)


def _option_cell(options: Mapping[str, object], key: str) -> str:
    return option_text(plain_option(options[key])) if key in options else ""


def _range(layers: list[int]) -> str:
    if not layers:
        return ""
    low, high = min(layers), max(layers)
    return str(low) if low == high else f"{low}..{high}"


_BAR_WIDTH = 24
_LOG_RATIO = 100  # from this ratio of the largest to the smallest rate, bars are drawn on a log scale


def _rate_table(plan: ParamGroupsPlan) -> Table | None:
    """Return a row for each rate in each layer, from input to output; None if no modifier numbers layers."""
    counts: dict[tuple[int, float], int] = {}
    for group in plan.groups:
        rate = rate_of(group.options)
        for parameter in group.parameters:
            if parameter.layer is not None and rate is not None:
                counts[parameter.layer, rate] = counts.get((parameter.layer, rate), 0) + 1
    if not counts:
        return None
    positive = [rate for _, rate in counts if rate > 0]
    log = bool(positive) and max(positive) / min(positive) >= _LOG_RATIO
    rows = tuple(
        (str(layer), f"{count:,}", short_number(rate), _bar(rate, positive, log=log))
        for (layer, rate), count in sorted(counts.items())
    )
    headers = ("layer", "parameters", "lr", "log scale" if log else "")
    return Table(headers, rows, frozenset({"layer", "parameters", "lr"}), title="Learning rate by layer")


def rate_of(options: Mapping[str, object]) -> float | None:
    """Return the learning rate of a group with its scale; None if it is not a number that a float can hold."""
    rate = plain_option(options.get("lr"))
    scale = plain_option(options.get("lr_scale", 1.0))
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not isinstance(scale, int | float):
        return None
    try:
        return float(rate * scale)
    except OverflowError:
        return None


def _bar(rate: float, positive: list[float], *, log: bool) -> str:
    if rate <= 0:
        return ""
    low, high = min(positive), max(positive)
    share = math.log(rate / low) / math.log(high / low) if log else rate / high
    return "█" * max(1, round(share * (_BAR_WIDTH - 1)) + 1 if log else round(share * _BAR_WIDTH))


def groups_document(plan: ParamGroupsPlan) -> dict[str, object]:
    """Return the document of ``ckpt groups table --json``: NaN and Inf are strings, tensors are numbers."""
    return {
        "schema": "ckptkit.groups/1",
        "groups": [
            {
                "name": group.name,
                "params": [pattern.text for pattern in group.rule.patterns],
                "rest": group.rule.rest,
                "rule": group.rule.name,
                "match": _condition(group.rule),
                "optimizer": group.optimizer,
                "modifiers": list(group.modifiers),
                "options": plain_option(dict(group.options)),
                "elements": group.elements,
                "parameters": [_parameter_document(parameter) for parameter in group.parameters],
            }
            for group in plan.groups
        ],
        "frozen": [_parameter_document(parameter) for parameter in plan.frozen],
        "freeze": [_parameter_document(parameter) for parameter in plan.freeze],
        "idle": [rule.name for rule in plan.idle],
        "summary": {
            "groups": len(plan.groups),
            "parameters": sum(len(group.parameters) for group in plan.groups),
            "elements": plan.elements,
            "frozen_parameters": len(plan.frozen),
            "frozen_elements": sum(parameter.elements for parameter in plan.frozen),
        },
    }


def _parameter_document(parameter: PlannedParameter) -> dict[str, object]:
    return {
        "key": parameter.name,
        "shape": list(parameter.shape),
        "elements": parameter.elements,
        "aliases": list(parameter.aliases),
        "rule": parameter.rule,
        "modifiers": list(parameter.modifiers),
        "layer": parameter.layer,
    }


_OUTCOMES = {
    "frozen": "is frozen in the model (requires_grad=False) and in no group",
    "freeze": "is frozen by the spec and in no group",
    "unowned": "is trainable, and no group of the spec owns it",
}


def explain_page(explanation: Explanation) -> Page:
    """Return the page of ``ckpt groups explain``: the parameter, its rules, and a row per step to each option."""
    parameter = explanation.parameter
    roles = f", {' and '.join(sorted(parameter.roles))}" if parameter.roles else ""
    shape = "uninitialised" if parameter.shape is None else f"{parameter.dtype} {list(parameter.shape)}"
    lines = [Line((as_code(parameter.name), f"  {shape}{roles}"))]
    if parameter.aliases:
        lines.append(Line(("tied to ", _quoted_names(alias.name for alias in parameter.aliases)), indented=True))
    if explanation.outcome != "trained":
        lines.append(Line((_OUTCOMES[explanation.outcome],), indented=True))
    if explanation.rule is not None:
        lines.append(Line(("owned by group ", Code(quoted(explanation.rule))), indented=True))
    if explanation.shadowed:
        lines.append(Line(("later rules that match too: ", _quoted_names(explanation.shadowed)), indented=True))
    if explanation.modifiers:
        layer = "" if explanation.layer is None else f", layer {explanation.layer}"
        lines.append(Line(("modified by ", _quoted_names(explanation.modifiers), layer), indented=True))
    if not explanation.steps:
        return lines
    steps = Table(("option", "value", "because"), tuple(_step_rows(explanation.steps)), frozenset({"value"}))
    return [*lines, steps]


def explain_document(explanation: Explanation) -> dict[str, object]:
    """Return the document of ``ckpt groups explain --json``."""
    parameter = explanation.parameter
    return {
        "schema": "ckptkit.groups-explain/1",
        "key": parameter.name,
        "aliases": [alias.name for alias in parameter.aliases],
        "dtype": parameter.dtype,
        "shape": None if parameter.shape is None else list(parameter.shape),
        "roles": sorted(parameter.roles),
        "outcome": explanation.outcome,
        "rule": explanation.rule,
        "shadowed": list(explanation.shadowed),
        "modifiers": list(explanation.modifiers),
        "layer": explanation.layer,
        "steps": [
            {"who": step.source, "option": step.key, "value": plain_option(step.value), "factor": step.factor}
            for step in explanation.steps
        ],
        "options": None if explanation.options is None else plain_option(dict(explanation.options)),
    }


def _step_rows(steps: tuple[OptionStep, ...]) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys(step.key for step in steps):
        for number, step in enumerate(step for step in steps if step.key == key):
            factor = "" if step.factor is None else f", times {short_number(step.factor)}"
            value = option_text(plain_option(step.value))
            yield ("" if number else printable(key), value, f"{printable(step.source)}{factor}")


def _quoted_names(names: Iterable[str]) -> Code:
    return Code(", ".join(map(quoted, names)))


def lock_page(lock: ParamGroupsLock) -> Page:
    """Return the page of a lock: a row per parameter, then the number of parameters and the fingerprint."""
    rows = [_locked_row(parameter, group.name) for group in lock.groups for parameter in group.parameters]
    rows += [_locked_row(parameter, "") for parameter in lock.outside]
    trained = sum(len(group.parameters) for group in lock.groups)
    count = f"{plural(trained, 'parameter')} in {plural(len(lock.groups), 'group')}, {len(lock.outside)} in none"
    return [
        Table(
            ("index", "parameter", "dtype", "shape", "group"), tuple(rows), frozenset({"index"}), gives_way=("dtype",)
        ),
        Line((count,)),
        Line((f"fingerprint sha256:{lock.fingerprint}",)),
    ]


def _locked_row(parameter: LockedParameter, group: str) -> tuple[str, ...]:
    index = "" if parameter.index is None else str(parameter.index)
    return index, printable(parameter.name), parameter.dtype, str(list(parameter.shape)), printable(group)


def spec_page(spec: ParamGroupSpec, *, language: str = "toml", text: str | None = None) -> Page:
    """Return ``text``, which is the spec in ``language``; without it, the spec as TOML.

    A spec with an option that TOML cannot express, such as null or a tensor, is shown as JSON.
    """
    text = _spec_text(spec, language) if text is None else text
    return [Listing(tuple(text.split("\n")))]


def spec_document(spec: ParamGroupSpec, *, language: str = "toml", text: str | None = None) -> dict[str, object]:
    """Return the document of ``ckpt groups emit --json``."""
    return {
        "schema": "ckptkit.groups-emit/1",
        "as": language,
        "spec": plain_option(spec.to_dict()),
        "text": _spec_text(spec, language) if text is None else text,
    }


def _spec_text(spec: ParamGroupSpec, language: str) -> str:
    from ckptkit.param_groups.spec.writing import dump_spec

    try:
        return dump_spec(spec, language)
    except GroupsError:
        return json.dumps(plain_option(spec.to_dict()), indent=2)
