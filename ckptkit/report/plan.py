"""A plan as text and as a JSON document, before it is carried out and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ckptkit.execution import Written
from ckptkit.plan import Dropped, Plan, Step
from ckptkit.report.table import Row, collapse, plain_table
from ckptkit.text import human_bytes, plural, printable

__all__ = ["plan_document", "plan_text", "written_text"]


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
        "summary": {
            "tensors": len(plan.steps),
            "elements": plan.elements,
            "bytes": plan.nbytes,
            "dropped": len(plan.dropped),
            "by_source": dict(Counter(step.sources[0].role for step in plan.steps)),
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


def plan_text(plan: Plan, *, expand: bool) -> list[str]:
    """Return the lines of ``--dry-run``: every tensor of the output with its source, and what is left out."""
    rows = [Row(step.out.key, (str(step.out), _origin(step), step.operation, step.rule)) for step in plan.steps]
    cells = [(printable(row.key), *row.cells) for row in rows] if expand else collapse(rows)
    lines = plain_table(cells, ["key", "tensor", "from", "operation", "rule"])
    if plan.dropped:
        lines += ["", *_dropped_table(plan.dropped, expand=expand)]
    return [*lines, "", f"{_summary(plan)}; nothing was written"]


def _origin(step: Step) -> str:
    source, others = step.sources[0], len(step.sources) - 1
    if source.key == step.out.key and not others:
        return source.role
    return f"{source.role}: {printable(source.key)}" + (f" and {others} more" if others else "")


def _dropped_table(dropped: Iterable[Dropped], *, expand: bool) -> list[str]:
    rows = [Row(drop.key, (drop.role, drop.reason)) for drop in dropped]
    cells = [(printable(row.key), *row.cells) for row in rows] if expand else collapse(rows)
    return plain_table(cells, ["left out", "of", "because"])


def _summary(plan: Plan) -> str:
    by_source = Counter(step.sources[0].role for step in plan.steps)
    parts = ", ".join(f"{count:,} from {role}" for role, count in by_source.items())
    left = f", {plural(len(plan.dropped), 'entry', 'entries')} left out" if plan.dropped else ""
    return f"{plural(len(plan.steps), 'tensor')}, {human_bytes(plan.nbytes)}: {parts}{left}"


def written_text(plan: Plan, written: Written, shared: Iterable[tuple[str, ...]]) -> list[str]:
    """Return what to say after writing: what it is, where from, and what was left out."""
    lines = [f"wrote {printable(written.path)}: {written.format}, {_summary(plan)}"]
    tensors = [drop for drop in plan.dropped if not drop.entry]
    others = [drop.key for drop in plan.dropped if drop.entry]
    if tensors:
        lines += _dropped_table(tensors, expand=False)
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        lines.append(f"left out, not among the tensors taken: {', '.join(map(printable, others[:8]))}{more}")
    if written.beside:
        more = f" and {len(written.beside) - 4} more" if len(written.beside) > 4 else ""
        lines.append(f"other weights stay beside them: {', '.join(map(printable, written.beside[:4]))}{more}")
    lines += [f"written apart, shared before: {', '.join(map(printable, group[:8]))}" for group in shared]
    return lines
