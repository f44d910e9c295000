"""Why a parameter trains with what, as a page and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptkit.core.text import printable, quoted
from ckptkit.param_groups.explain import Explanation
from ckptkit.param_groups.plain import plain_option
from ckptkit.param_groups.resolve import Said
from ckptkit.render.page import Code, Line, Page, Table, code

__all__ = ["explain_document", "explain_page"]

_OUTCOMES = {
    "frozen": "is frozen in the model (requires_grad=False) and in no group",
    "freeze": "is frozen by the spec and in no group",
    "unowned": "is trainable, and no group of the spec owns it",
}


def explain_page(told: Explanation) -> Page:
    """Return what the parameter is, who speaks for it, and a row for each step to each of its options."""
    facts = told.facts
    roles = f", {' and '.join(sorted(facts.roles))}" if facts.roles else ""
    shape = "uninitialised" if facts.shape is None else f"{facts.dtype} {list(facts.shape)}"
    lines = [Line((code(facts.name), f"  {shape}{roles}"))]
    if facts.aliases:
        lines.append(Line(("tied to ", _names(alias.name for alias in facts.aliases)), under=True))
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
    facts = told.facts
    return {
        "schema": "ckptkit.groups-explain/1",
        "key": facts.name,
        "aliases": [alias.name for alias in facts.aliases],
        "dtype": facts.dtype,
        "shape": None if facts.shape is None else list(facts.shape),
        "roles": sorted(facts.roles),
        "outcome": told.outcome,
        "rule": told.rule,
        "shadowed": list(told.shadowed),
        "modifiers": list(told.modifiers),
        "layer": told.layer,
        "steps": [
            {"who": said.who, "option": said.key, "value": plain_option(said.value), "factor": said.factor}
            for said in told.steps
        ],
        "options": None if told.options is None else plain_option(dict(told.options)),
    }


def _rows(steps: tuple[Said, ...]) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys(said.key for said in steps):
        for place, said in enumerate(one for one in steps if one.key == key):
            factor = "" if said.factor is None else f", times {said.factor:g}"
            value = printable(str(plain_option(said.value)))
            yield ("" if place else printable(key), value, f"{printable(said.who)}{factor}")


def _names(names: Any) -> Code:
    return Code(", ".join(map(quoted, names)))
