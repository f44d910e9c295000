"""The result of a preflight as one page and as one JSON document."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.text import human_bytes, option_text, percent, plural, printable, short_number
from ckptkit.param_groups.lock import plain_option
from ckptkit.readiness.model import DryStep, Init, Memory, Preflight, Resume
from ckptkit.render.findings import finding_facts, finding_lines, findings_document, tone_of
from ckptkit.render.page import Block, Line, Message, Page, Table, table_rows
from ckptkit.render.page.head import Fact, Head
from ckptkit.render.summary import coverage_documents, json_number, share_cell

__all__ = ["preflight_document", "preflight_head", "preflight_page"]

_RIGHT = frozenset({"tensors", "elements", "parameters", "share", "lr", "weight_decay", "bytes"})
_MOST_KEPT = 24  # rows of tensors that stay at init; the JSON document has all of them


def preflight_page(report: Preflight, *, expand: bool = False) -> Page:
    """Return a table per section of the report, then what was not measured, the findings, and the verdict.

    Tensors that stay at init are joined by layers, and only the first are listed, unless ``expand``.
    """
    page: list[Block] = []
    if report.init is not None:
        page += _init_blocks(report.init, expand=expand)
    page += _training_table(report)
    page += _groups_table(report)
    if report.memory is not None:
        page += _memory_table(report.memory)
    if report.resume is not None:
        page.append(_resume_line(report.resume))
    if report.step is not None:
        page.append(_step_line(report.step))
    page += [Line(("not measured: ", Message(printable(text)))) for text in report.not_judged]
    page.append(Line(()))
    page += finding_lines(report.findings)
    if report.ignored:
        page.append(Line((report.ignored_counts,)))
    page.append(_verdict(report))
    return page


def preflight_head(report: Preflight) -> Head:
    """Return the head of a report: the verdict, and what loads, trains and takes memory."""
    trainable = sum(module.trainable_elements for module in report.training)
    elements = sum(module.elements for module in report.training)
    facts = [
        *finding_facts(report),
        *([] if report.init is None else [Fact(percent(report.init.coverage), "of the elements from init")]),
        *([Fact(share_cell(trainable, elements), "of the elements train")] if elements else []),
        *([Fact.of_count(len(report.groups), "param group")] if report.groups else []),
        *([] if report.memory is None else [Fact(human_bytes(report.memory.total), "without activations")]),
    ]
    return Head("preflight", _verdict(report), (), tuple(facts), tone_of(report))


def _verdict(report: Preflight) -> Line:
    reason = report.not_ready_reason
    return Line(("not ready: ", Message(printable(reason)))) if reason else Line((report.verdict,))


def _init_blocks(init: Init, *, expand: bool) -> Iterator[Block]:
    rows = tuple(
        (
            printable(module.module),
            _some_of(module.loaded, module.tensors),
            f"{module.elements:,}",
            share_cell(module.loaded_elements, module.elements),
        )
        for module in init.modules
    )
    yield Table(("from init", "tensors", "elements", "share"), rows, _RIGHT, title="What init fills")
    in_model = {
        "all": ", and the model has its values",
        "part": ", of which the model has some",
        "none": "",
        "unknown": "",
    }[init.in_model]
    counts = f"{_some_of(init.loaded, init.tensors)} tensors, {percent(init.coverage)} of {init.elements:,} elements"
    yield Line((f"init fills {counts}{in_model}",))
    if init.kept:
        kept = table_rows([(one.key, (one.why, one.looks or "not measured")) for one in init.kept], expand=expand)
        most = len(kept) if expand else _MOST_KEPT
        yield Table(("stays at init", "because", "looks"), tuple(kept[:most]), title="What stays at init")
        if len(kept) > most:
            yield Line((f"and {plural(len(kept) - most, 'more row')}",))


def _training_table(report: Preflight) -> Iterator[Block]:
    rows = []
    for module in report.training:
        state = "trains" if module.trainable == module.parameters else "in part" if module.trainable else "frozen"
        trainable = _some_of(module.trainable, module.parameters)
        rows.append((printable(module.module), state, trainable, f"{module.trainable_elements:,}"))
    if rows:
        yield Table(("module", "", "parameters", "elements"), tuple(rows), _RIGHT, title="What trains")


def _groups_table(report: Preflight) -> Iterator[Block]:
    rows = tuple(
        (
            printable(group.name),
            printable(group.optimizer),
            f"{len(group.names):,}",
            f"{group.elements:,}",
            *(
                option_text(plain_option(group.options[key])) if key in group.options else ""
                for key in ("lr", "weight_decay")
            ),
        )
        for group in report.groups
    )
    if rows:
        headers = ("group", "optimizer", "parameters", "elements", "lr", "weight_decay")
        yield Table(headers, rows, _RIGHT, title="Param groups")


def _memory_table(memory: Memory) -> Iterator[Block]:
    rows = [("parameters", human_bytes(memory.parameters))]
    if memory.buffers:
        rows.append(("buffers", human_bytes(memory.buffers)))
    rows.append(("gradients", human_bytes(memory.gradients)))
    for state in memory.states:
        slots = f" ({', '.join(state.slots)})" if state.slots else ""
        size = "not known for this class" if state.nbytes is None else human_bytes(state.nbytes)
        rows.append((f"{printable(state.optimizer)} state{slots}", size))
    rows.append(("total, without activations", human_bytes(memory.total)))
    yield Table(("memory", "bytes"), tuple(rows), _RIGHT, title="Memory")


def _resume_line(resume: Resume) -> Line:
    text = f"resume: {_some_of(resume.matched, resume.expected)} tensors of the model are in the run"
    if resume.positions is not None:
        text += f"; its optimizer has {plural(resume.positions, 'parameter')}, {resume.with_state:,} with state"
    return Line((text,))


def _step_line(step: DryStep) -> Line:
    if step.loss is None:
        return Line(("dry step: it ended before there was a loss",))
    moved = f", {step.moved:,} moved by {step.optimizer}" if step.optimizer else ", and no optimizer to move them"
    count = f"{_some_of(step.gradients, step.trainable)} trainable parameters got a gradient"
    return Line((f"dry step on a copy: loss {short_number(step.loss)}, {count}{moved}",))


def _some_of(some: int, whole: int) -> str:
    return f"{some:,} of {whole:,}"


def preflight_document(report: Preflight) -> dict[str, object]:
    """Return the document of ``ckpt preflight --json``: the findings, and every section of the report."""
    findings = findings_document(report)
    return {
        "schema": "ckptkit.preflight/1",
        "verdict": report.verdict,
        "findings": findings["findings"],
        "summary": findings["summary"],
        "init": None if report.init is None else _init_document(report.init),
        "training": [
            {
                "module": module.module,
                "trainable": module.trainable,
                "parameters": module.parameters,
                "trainable_elements": module.trainable_elements,
                "elements": module.elements,
            }
            for module in report.training
        ],
        "groups": [
            {
                "name": group.name,
                "optimizer": group.optimizer,
                "parameters": list(group.names),
                "elements": group.elements,
                "options": plain_option(dict(group.options)),
            }
            for group in report.groups
        ],
        "memory": None if report.memory is None else _memory_document(report.memory),
        "resume": None if report.resume is None else _resume_document(report.resume),
        "step": None if report.step is None else _step_document(report.step),
        "not_judged": list(report.not_judged),
    }


def _init_document(init: Init) -> dict[str, object]:
    return {
        "loaded": init.loaded,
        "tensors": init.tensors,
        "loaded_elements": init.loaded_elements,
        "elements": init.elements,
        "coverage": init.coverage,
        "in_model": init.in_model,
        "modules": coverage_documents(init.modules),
        "kept": [
            {"key": tensor.key, "why": tensor.why, "elements": tensor.elements, "looks": tensor.looks}
            for tensor in init.kept
        ],
    }


def _memory_document(memory: Memory) -> dict[str, object]:
    return {
        "parameters": memory.parameters,
        "buffers": memory.buffers,
        "gradients": memory.gradients,
        "states": [
            {"optimizer": state.optimizer, "slots": list(state.slots), "bytes": state.nbytes} for state in memory.states
        ],
        "total": memory.total,
    }


def _resume_document(resume: Resume) -> dict[str, object]:
    return {
        "matched": resume.matched,
        "expected": resume.expected,
        "positions": resume.positions,
        "with_state": resume.with_state,
        "form": resume.form,
    }


def _step_document(step: DryStep) -> dict[str, object]:
    return {
        "loss": json_number(step.loss),
        "optimizer": step.optimizer,
        "trainable": step.trainable,
        "gradients": step.gradients,
        "moved": step.moved,
    }
