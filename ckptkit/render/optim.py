"""The state of an optimizer, and the changes to one, as a page and as a JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptkit.core.findings import Report
from ckptkit.core.text import human_bytes, listed, plural, printable, short_number
from ckptkit.errors import CkptkitError
from ckptkit.optimizer_state.compare import state_report
from ckptkit.optimizer_state.model import (
    Change,
    LazyTensor,
    OpaqueValue,
    OptimizerState,
    SlotValue,
    number_of,
    parameter_shape,
    tensors_in,
)
from ckptkit.render.findings import findings_document, findings_page
from ckptkit.render.page import Block, Code, Line, Page, Table, as_code, name_beside, table_rows
from ckptkit.render.summary import json_number

if TYPE_CHECKING:
    from ckptkit.optimizer_state.write import WrittenState

__all__ = ["state_document", "state_page", "written_state_document", "written_state_page"]

_OPTIONS = ("lr", "weight_decay")
_SHOWN = 4


def state_page(state: OptimizerState, *, changes: bool = False, expand: bool = False) -> Page:
    """Return a row per parameter, a row per group, the totals, the origin of the names, and the findings.

    With ``changes``, return the page of a dry run instead: a row per changed parameter.
    """
    if changes:
        return [*_changes(state, expand=expand), Line((f"{_totals(state)}; nothing was written",))]
    report, unread = _report(state)
    group = {name: number for number, group in enumerate(state.groups) for name in group.names}
    names = dict.fromkeys([*state.names, *state.state])
    rows = [(name, _cells(state.state.get(name, {}), group.get(name), is_open=not unread)) for name in names]
    headers = ("parameter", "shape", "slots", "step", "group")
    parameters = Table(headers, tuple(table_rows(rows, expand=expand)), gives_way=("slots", "step"))
    page: list[Block] = [_title(state), parameters, _groups_table(state), Line((_totals(state),)), *_remarks(state)]
    page += [Line((line,)) for line in unread]
    return [*page, *findings_page(report)] if report.findings else page


def _report(state: OptimizerState) -> tuple[Report, list[str]]:
    """Return the findings, and a sentence where the numbers of the state cannot be read, mostly of a closed file."""
    try:
        return state_report(state), []
    except CkptkitError as error:
        return Report(state.findings), [
            f"the file is closed or cannot be read, so step counts are unknown: {error.reason}"
        ]


def _title(state: OptimizerState) -> Line:
    where = state.checkpoint
    path = (as_code(where.path), *_inside(where.envelope), ": ") if where.path else ()
    return Line((*path, f"optimizer state, {state.form}"))


def _cells(slots: Mapping[str, SlotValue], group: int | None, *, is_open: bool) -> tuple[str, ...]:
    shape, step = parameter_shape(slots), number_of(slots.get("step")) if is_open else None
    return (
        "" if shape is None else str(list(shape)),
        ", ".join(printable(str(slot)) for slot in slots if slot != "step"),
        short_number(step),
        "" if group is None else str(group),
    )


def _groups_table(state: OptimizerState) -> Table:
    rows = []
    for number, group in enumerate(state.groups):
        others = {
            key: value for key, value in group.options.items() if key not in _OPTIONS and value not in (None, False)
        }
        rows.append(
            (
                str(number),
                f"{len(group.names):,}",
                *(_value_text(group.options[key]) if key in group.options else "" for key in _OPTIONS),
                ", ".join(f"{printable(key)}={_value_text(value)}" for key, value in others.items()),
            )
        )
    headers = ("group", "parameters", *_OPTIONS, "other options")
    return Table(headers, tuple(rows), frozenset({"parameters", *_OPTIONS}), gives_way=("other options",))


def _changes(state: OptimizerState, *, expand: bool) -> list[Block]:
    """Return a row per changed parameter, then the totals and the origin of the names."""
    group = {name: str(number) for number, group in enumerate(state.groups) for name in group.names}
    rows = [
        (change.name, (_origin(change), change.operation, change.reason, group.get(change.name, "")))
        for change in state.changes
    ]
    headers = ("parameter", "from", "what", "because", "group")
    table = Table(headers, tuple(table_rows(rows, expand=expand)), gives_way=("group", "because"))
    return [table, Line((_totals(state),)), *_remarks(state)]


def _origin(change: Change) -> str:
    first, others = (change.sources or ("",))[0], len(change.sources) - 1
    more = f" and {others} more" if others > 0 else ""
    return ("" if first == change.name else name_beside(change.name, first)) + more


def _totals(state: OptimizerState) -> str:
    counts = plural(len(state.names), "parameter"), plural(len(state.groups), "group")
    tensors = sum(1 for slots in state.state.values() for _ in tensors_in(slots))
    return f"{counts[0]} in {counts[1]}; {plural(tensors, 'tensor')} of state, {human_bytes(state.nbytes)}"


def _remarks(state: OptimizerState) -> list[Line]:
    names = [Line(("names: ", Code(state.evidence)))] if state.evidence else []
    return [*names, *(Line((Code(remark),)) for remark in state.remarks)]


def _inside(envelope: str) -> Sequence[str | Code]:
    return (" at ", Code(f"::{printable(envelope)}")) if envelope else ()


def written_state_page(written: WrittenState, *, changes: bool = False, expand: bool = False) -> Page:
    """Return the origin of the names, the remarks, and what was written; with ``changes``, also the changes."""
    state = _state_in(written)
    line = Line(("wrote ", as_code(written.path), *_inside(written.envelope), f": {_totals(state)}"))
    shown = _changes(state, expand=expand) if changes else [*_remarks(state), *_left_out(state)]
    return [*shown, line]


def _left_out(state: OptimizerState) -> list[Line]:
    """Return a line for the parameters that were left out, and one for those that start without state."""
    lines = []
    for operation, start in (("dropped", "left out"), ("reset", "without state, so training starts it anew")):
        names: dict[str, list[str]] = {}
        for change in state.changes:
            if change.operation == operation:
                names.setdefault(change.reason, []).append(change.name)
        texts = [f"{listed(names[reason], _SHOWN)} ({reason})" for reason in names]
        if texts:
            lines.append(Line((f"{start}: ", Code(listed(texts, _SHOWN, show=str)))))
    return lines


def written_state_document(written: WrittenState) -> dict[str, object]:
    """Return the document of ``ckpt optim remap``, ``resplit`` and ``prune`` with ``--json``."""
    output = {"path": written.path, "at": written.envelope, "bytes": written.nbytes}
    return {**state_document(_state_in(written), changes=True), "output": output}


def _state_in(written: WrittenState) -> OptimizerState:
    return OptimizerState({}, ()) if written.state is None else written.state


def state_document(state: OptimizerState, *, changes: bool = False) -> dict[str, object]:
    """Return the document of ``ckpt optim show --json``, or with ``changes``, that of a dry run, without findings."""
    report = None if changes else state_report(state)
    group = {name: number for number, group in enumerate(state.groups) for name in group.names}
    return {
        "schema": "ckptkit.optim/1",
        "path": state.checkpoint.path,
        "at": state.checkpoint.envelope,
        "form": state.form,
        "evidence": state.evidence or None,
        "remarks": list(state.remarks),
        "parameters": [
            {"key": name, "group": group.get(name), **_slots_document(state.state.get(name, {}))}
            for name in dict.fromkeys([*state.names, *state.state])
        ],
        "groups": [
            {
                "parameters": len(group.names),
                "options": {key: _json_value(value) for key, value in group.options.items()},
            }
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
        "output": None,
    }


def _slots_document(slots: Mapping[str, SlotValue]) -> dict[str, object]:
    shape = parameter_shape(slots)
    return {
        "shape": None if shape is None else list(shape),
        "step": _json_value(number_of(slots.get("step"))),
        "slots": [
            {"name": name, "dtype": value.dtype, "shape": list(value.shape), "bytes": value.nbytes}
            if isinstance(value, LazyTensor)
            else {"name": name, "value": _json_value(value)}
            for name, value in slots.items()
        ],
    }


def _value_text(value: SlotValue) -> str:
    try:
        plain = _json_value(value)
    except CkptkitError:  # the file of an option that is a tensor is closed
        return str(value.info) if isinstance(value, LazyTensor) else ""
    return short_number(plain) if isinstance(plain, float) else printable(str(plain))


def _json_value(value: SlotValue) -> object:
    """Return what a JSON document has for a value; for a tensor with one element, the number."""
    if isinstance(value, LazyTensor):
        number = number_of(value)
        return str(value.info) if number is None else _json_value(number)
    if isinstance(value, OpaqueValue):
        return value.type
    if isinstance(value, float):
        return json_number(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return str(value)
