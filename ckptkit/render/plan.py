"""A plan as a page and as a JSON document, before it is carried out and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ckptkit.core.text import human_bytes, plural, printable
from ckptkit.plans.execute import Written
from ckptkit.plans.plan import Dropped, Plan, Step
from ckptkit.render.page import Code, Line, Page, Row, Table, as_text, code, spelled

__all__ = ["plan_document", "plan_page", "written_text"]


def plan_document(command: str, plan: Plan, written: Written | None) -> dict[str, Any]:
    """Return the document of ``ckpt merge``, ``remap`` or ``convert`` with ``--json``."""
    return {
        "schema": f"ckptkit.{command}/1",
        "plan": [
            {
                "key": step.out.key,
                "dtype": step.out.dtype,
                "shape": list(step.out.shape),
                "sources": [{"role": source.role, "key": source.key} for source in (*step.sources, *step.equals)],
                "operation": step.operation,
                "rule": step.rule or None,
            }
            for step in plan.steps
        ],
        "dropped": [{"role": drop.role, "key": drop.key, "reason": drop.reason} for drop in plan.dropped],
        "kept": list(plan.kept),
        "summary": {
            "tensors": len(plan.steps),
            "elements": plan.elements,
            "bytes": plan.nbytes,
            "dropped": len(plan.dropped),
            "by_source": dict(Counter(map(_roles, plan.steps))),
            "by_operation": dict(Counter(step.operation for step in plan.steps)),
        },
        "output": None
        if written is None
        else {
            "path": written.path,
            "format": written.format,
            "tensors": written.tensors,
            "bytes": written.nbytes,
        },
    }


def plan_page(plan: Plan, written: Written | None, *, expand: bool) -> Page:
    """Return the page of a writing command: every tensor of the output with its source, and what is left out."""
    rows = [Row(step.out.key, (str(step.out), _origin(step), step.operation, step.rule)) for step in plan.steps]
    tensors = Table(("key", "tensor", "from", "operation", "rule"), tuple(spelled(rows, expand=expand)))
    left = [_left_out(plan.dropped, expand=expand)] if plan.dropped else []
    last = (f"{_summary(plan)}; nothing was written",) if written is None else _wrote(plan, written)
    return [tensors, *left, *(Line((said,)) for said in _kept(plan)), Line(last)]


def _kept(plan: Plan) -> list[str]:
    if not plan.kept:
        return []
    more = f" and {len(plan.kept) - 8} more" if len(plan.kept) > 8 else ""
    return [f"kept as they are: {', '.join(map(printable, plan.kept[:8]))}{more}"]


def _origin(step: Step) -> str:
    source, others = step.sources[0], len(step.sources) - 1
    if source.key == step.out.key and (not others or _roles(step) != source.role):
        return _roles(step)
    return f"{_roles(step)}: {printable(source.key)}" + (f" and {others} more" if others else "")


def _roles(step: Step) -> str:
    return " and ".join(dict.fromkeys(source.role for source in step.sources))


def _left_out(dropped: Iterable[Dropped], *, expand: bool) -> Table:
    rows = [Row(drop.key, (drop.role, drop.reason)) for drop in dropped]
    return Table(("left out", "of", "because"), tuple(spelled(rows, expand=expand)))


def _summary(plan: Plan) -> str:
    by_source = Counter(map(_roles, plan.steps))
    parts = ", ".join(f"{count:,} from {role}" for role, count in by_source.items())
    left = f", {plural(len(plan.dropped), 'entry', 'entries')} left out" if plan.dropped else ""
    return f"{plural(len(plan.steps), 'tensor')}, {human_bytes(plan.nbytes)}: {parts}{left}"


def _wrote(plan: Plan, written: Written) -> tuple[str | Code, ...]:
    return "wrote ", code(written.path), f": {written.format}, {_summary(plan)}"


def written_text(plan: Plan, written: Written, shared: Iterable[tuple[str, ...]]) -> list[str]:
    """Return what to say after writing: what it is, where from, and what was left out."""
    lines = as_text([Line(_wrote(plan, written))])
    tensors = [drop for drop in plan.dropped if not drop.is_entry]
    others = [drop.key for drop in plan.dropped if drop.is_entry]
    lines += _kept(plan)
    if tensors:
        lines += as_text([_left_out(tensors, expand=False)])
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        lines.append(f"left out, not among the tensors taken: {', '.join(map(printable, others[:8]))}{more}")
    if written.beside:
        more = f" and {len(written.beside) - 4} more" if len(written.beside) > 4 else ""
        lines.append(f"other weights stay beside them: {', '.join(map(printable, written.beside[:4]))}{more}")
    lines += [f"written apart, shared before: {', '.join(map(printable, group[:8]))}" for group in shared]
    return lines
