"""The state of an optimizer, and what became of it, as a page and as a JSON document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.core.findings import Report
from ckptkit.core.text import human_bytes, plural, printable
from ckptkit.optimizer_state.model import (
    Change,
    LazyTensor,
    OpaqueValue,
    OptimizerState,
    number_of,
    parameter_shape,
    tensors_in,
)
from ckptkit.plans.execute import Written
from ckptkit.render.findings import findings_document, findings_page
from ckptkit.render.page import Code, Line, Page, Row, Table, code, spelled

__all__ = ["changes_page", "state_document", "state_page", "written_line"]

_OPTIONS = ("lr", "weight_decay")


def state_page(title: Sequence[str | Code], state: OptimizerState, report: Report, *, expand: bool) -> Page:
    """Return the table of parameters, that of groups, the totals, where names come from, and the findings."""
    group = {name: number for number, group in enumerate(state.groups) for name in group.names}
    names = dict.fromkeys([*state.names, *state.state])
    rows = [Row(name, _cells(state.state.get(name, {}), group.get(name))) for name in names]
    parameters = Table(("parameter", "shape", "slots", "step", "group"), tuple(spelled(rows, expand=expand)))
    return [
        Line(tuple(title)),
        parameters,
        _groups(state),
        Line((_totals(state),)),
        *_said(state),
        *(findings_page(report) if report.findings else ()),
    ]


def _cells(slots: Mapping[str, Any], group: int | None) -> tuple[str, ...]:
    shape, step = parameter_shape(slots), number_of(slots.get("step"))
    return (
        "" if shape is None else str(list(shape)),
        ", ".join(printable(slot) for slot in slots if slot != "step"),
        "" if step is None else f"{step:g}",
        "" if group is None else str(group),
    )


def _groups(state: OptimizerState) -> Table:
    rows = []
    for number, group in enumerate(state.groups):
        others = {
            key: value for key, value in group.options.items() if key not in _OPTIONS and value not in (None, False)
        }
        rows.append(
            (
                str(number),
                f"{len(group.names):,}",
                *(_told(group.options[key]) if key in group.options else "" for key in _OPTIONS),
                ", ".join(f"{printable(key)}={_told(value)}" for key, value in others.items()),
            )
        )
    return Table(("group", "parameters", *_OPTIONS, "other options"), tuple(rows), frozenset({"parameters", *_OPTIONS}))


def _totals(state: OptimizerState) -> str:
    counts = plural(len(state.names), "parameter"), plural(len(state.groups), "group")
    tensors = sum(1 for slots in state.state.values() for _ in tensors_in(slots))
    return f"{counts[0]} in {counts[1]}; {plural(tensors, 'tensor')} of state, {human_bytes(state.nbytes)}"


def _said(state: OptimizerState) -> list[Line]:
    lines = [Line(("names: ", Code(state.evidence)))] if state.evidence else []
    return [*lines, *(Line((Code(remark),)) for remark in state.remarks)]


def changes_page(state: OptimizerState, *, expand: bool) -> Page:
    """Return the table of what became of each parameter, then what is to be said of the whole."""
    group = {name: str(number) for number, group in enumerate(state.groups) for name in group.names}
    rows = [Row(change.name, (*_origin(change), change.reason, group.get(change.name, ""))) for change in state.changes]
    table = Table(("parameter", "from", "what", "because", "group"), tuple(spelled(rows, expand=expand)))
    return [table, Line((_totals(state),)), *_said(state)]


def _origin(change: Change) -> tuple[str, str]:
    first, more = (change.sources or ("",))[0], len(change.sources) - 1
    return ("" if first == change.name else printable(first)) + (
        f" and {more} more" if more > 0 else ""
    ), change.operation


def written_line(state: OptimizerState, written: Written | None) -> Line:
    """Return what to say at the end: what was written where, or that nothing was."""
    if written is None:
        return Line((f"{_totals(state)}; nothing was written",))
    at = (" at ", Code(f"::{printable(written.envelope)}")) if written.envelope else ()
    return Line(("wrote ", code(written.path), *at, f": {_totals(state)}"))


def state_document(
    path: str, at: str, state: OptimizerState, *, report: Report | None = None, written: Written | None = None
) -> dict[str, Any]:
    """Return the document of ``ckpt optim`` with ``--json``; ``report`` are the findings of ``show``."""
    group = {name: number for number, group in enumerate(state.groups) for name in group.names}
    return {
        "schema": "ckptkit.optim/1",
        "path": path,
        "at": at,
        "form": state.form,
        "evidence": state.evidence or None,
        "remarks": list(state.remarks),
        "parameters": [
            {"key": name, "group": group.get(name), **_slots(state.state.get(name, {}))}
            for name in dict.fromkeys([*state.names, *state.state])
        ],
        "groups": [
            {"parameters": len(group.names), "options": {key: _plain(value) for key, value in group.options.items()}}
            for group in state.groups
        ],
        "changes": [
            {
                "key": change.name,
                "sources": list(change.sources),
                "operation": change.operation,
                "reason": change.reason or None,
            }
            for change in state.changes
        ],
        "findings": None if report is None else findings_document(report)["findings"],
        "summary": {
            "parameters": len(state.names),
            "groups": len(state.groups),
            "with_state": len(state.state),
            "tensors": sum(1 for slots in state.state.values() for _ in tensors_in(slots)),
            "bytes": state.nbytes,
            **({} if report is None else report.summary),
        },
        "output": None if written is None else {"path": written.path, "at": written.envelope, "bytes": written.nbytes},
    }


def _slots(slots: Mapping[str, Any]) -> dict[str, Any]:
    shape = parameter_shape(slots)
    return {
        "shape": None if shape is None else list(shape),
        "step": _plain(number_of(slots.get("step"))),
        "slots": [
            {"name": name, "dtype": value.dtype, "shape": list(value.shape), "bytes": value.nbytes}
            if isinstance(value, LazyTensor)
            else {"name": name, "value": _plain(value)}
            for name, value in slots.items()
        ],
    }


def _told(value: Any) -> str:
    plain = _plain(value)
    return f"{plain:g}" if isinstance(plain, float) else printable(str(plain))


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a value: of a tensor of one element the number."""
    if isinstance(value, LazyTensor):
        number = number_of(value)
        return str(value.info) if number is None else _plain(number)
    if isinstance(value, OpaqueValue):
        return value.type
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)
