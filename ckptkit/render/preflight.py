"""A preflight as one page, and as one JSON document."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ckptkit.core.text import human_bytes, plural, printable
from ckptkit.param_groups.lock import plain_option
from ckptkit.readiness import DryStep, Init, Memory, Preflight, Resume
from ckptkit.render.findings import finding_lines, findings_document
from ckptkit.render.page import Block, Code, Line, Page, Table

__all__ = ["preflight_document", "preflight_page"]

SCHEMA = "ckptkit.preflight/1"
_COUNTS = frozenset({"tensors", "elements", "parameters", "share", "lr", "weight_decay", "bytes", "each"})
_MOST = 24  # of what stays at init; the rest is in the JSON form


def preflight_page(report: Preflight) -> Page:
    """Return the sections that there are, what was not judged, the findings, and the verdict last."""
    page: list[Block] = []
    if report.init is not None:
        page += _init(report.init)
    page += _training(report)
    page += _groups(report)
    if report.memory is not None:
        page += _memory(report.memory)
    if report.resume is not None:
        page.append(_resume(report.resume))
    if report.step is not None:
        page.append(_step(report.step))
    page += [Line(("not judged: ", Code(printable(text)))) for text in report.not_judged]
    page.append(Line(()))
    page += finding_lines(report.findings)
    word, _, reason = report.verdict.partition(": ")
    page.append(Line((f"{word}: ", Code(printable(reason))) if reason else (word,)))
    return page


def _init(init: Init) -> Iterator[Block]:
    rows = tuple(
        (
            printable(one.module),
            _part(one.loaded, one.tensors),
            f"{one.elements:,}",
            _share(one.loaded_elements, one.elements),
        )
        for one in init.modules
    )
    yield Table(("from init", "tensors", "elements", "share"), rows, _COUNTS)
    here = {"all": ", and the model has its values", "part": ", of which the model has some", "none": "", "unknown": ""}
    counts = f"{_part(init.loaded, init.tensors)} tensors, {100 * init.coverage:.1f} % of {init.elements:,} elements"
    yield Line((f"init fills {counts}{here[init.in_model]}",))
    if init.kept:
        kept = tuple((printable(one.key), one.why, one.looks or "not judged") for one in init.kept[:_MOST])
        yield Table(("stays at init", "because", "looks"), kept)
        if len(init.kept) > _MOST:
            yield Line((f"and {len(init.kept) - _MOST:,} more",))


def _training(report: Preflight) -> Iterator[Block]:
    rows = []
    for one in report.training:
        state = "trains" if one.trainable == one.parameters else "in part" if one.trainable else "frozen"
        rows.append((printable(one.module), state, _part(one.trainable, one.parameters), f"{one.trainable_elements:,}"))
    if rows:
        yield Table(("module", "", "parameters", "elements"), tuple(rows), _COUNTS)


def _groups(report: Preflight) -> Iterator[Block]:
    rows = tuple(
        (
            printable(one.name),
            printable(one.optimizer),
            f"{len(one.names):,}",
            f"{one.elements:,}",
            *(
                printable(str(plain_option(one.options[key]))) if key in one.options else ""
                for key in ("lr", "weight_decay")
            ),
        )
        for one in report.groups
    )
    if rows:
        yield Table(("group", "optimizer", "parameters", "elements", "lr", "weight_decay"), rows, _COUNTS)


def _memory(memory: Memory) -> Iterator[Block]:
    rows = [("parameters", human_bytes(memory.parameters))]
    if memory.buffers:
        rows.append(("buffers", human_bytes(memory.buffers)))
    rows.append(("gradients", human_bytes(memory.gradients)))
    for state in memory.states:
        slots = f" ({', '.join(state.slots)})" if state.slots else ""
        size = "not known for this class" if state.nbytes is None else human_bytes(state.nbytes)
        rows.append((f"{printable(state.optimizer)} state{slots}", size))
    rows.append(("together, without activations", human_bytes(memory.total)))
    yield Table(("memory", "bytes"), tuple(rows), _COUNTS)


def _resume(resume: Resume) -> Line:
    said = f"resume: {_part(resume.matched, resume.expected)} tensors of the model are in the run"
    if resume.positions is not None:
        said += f"; its optimizer has {plural(resume.positions, 'parameter')}, {resume.with_state:,} with state"
    return Line((said,))


def _step(step: DryStep) -> Line:
    if step.loss is None:
        return Line(("dry step: it did not get as far as a loss",))
    moved = f", {step.moved:,} moved by {step.optimizer}" if step.optimizer else ", and no optimizer to move them"
    count = f"{_part(step.gradients, step.trainable)} parameters that train got a gradient"
    return Line((f"dry step on a copy: loss {step.loss:.6g}, {count}{moved}",))


def _part(some: int, whole: int) -> str:
    return f"{some:,} of {whole:,}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def preflight_document(report: Preflight) -> dict[str, Any]:
    """Return the document of ``ckpt preflight --json``: findings as every check has them, and the page's sections."""
    init, memory, resume, step = report.init, report.memory, report.resume, report.step
    found = findings_document(report)
    return {
        "schema": SCHEMA,
        "verdict": report.verdict,
        "findings": found["findings"],
        "summary": found["summary"],
        "init": None
        if init is None
        else {
            "loaded": init.loaded,
            "tensors": init.tensors,
            "loaded_elements": init.loaded_elements,
            "elements": init.elements,
            "coverage": init.coverage,
            "in_model": init.in_model,
            "modules": [
                {
                    "module": one.module,
                    "loaded": one.loaded,
                    "tensors": one.tensors,
                    "loaded_elements": one.loaded_elements,
                    "elements": one.elements,
                }
                for one in init.modules
            ],
            "kept": [
                {"key": one.key, "why": one.why, "elements": one.elements, "looks": one.looks} for one in init.kept
            ],
        },
        "training": [
            {
                "module": one.module,
                "trainable": one.trainable,
                "parameters": one.parameters,
                "trainable_elements": one.trainable_elements,
                "elements": one.elements,
            }
            for one in report.training
        ],
        "groups": [
            {
                "name": one.name,
                "optimizer": one.optimizer,
                "parameters": list(one.names),
                "elements": one.elements,
                "options": plain_option(dict(one.options)),
            }
            for one in report.groups
        ],
        "memory": None
        if memory is None
        else {
            "parameters": memory.parameters,
            "buffers": memory.buffers,
            "gradients": memory.gradients,
            "states": [
                {"optimizer": one.optimizer, "slots": list(one.slots), "bytes": one.nbytes} for one in memory.states
            ],
            "total": memory.total,
        },
        "resume": None
        if resume is None
        else {
            "matched": resume.matched,
            "expected": resume.expected,
            "positions": resume.positions,
            "with_state": resume.with_state,
            "form": resume.form,
        },
        "step": None
        if step is None
        else {
            "loss": step.loss if step.loss is None or math.isfinite(step.loss) else str(step.loss),
            "optimizer": step.optimizer,
            "trainable": step.trainable,
            "gradients": step.gradients,
            "moved": step.moved,
        },
        "not_judged": list(report.not_judged),
    }
