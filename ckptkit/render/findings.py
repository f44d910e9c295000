"""The findings of a check as a page and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import plural, printable
from ckptkit.errors import one_line
from ckptkit.render.page import Code, Line, Page

__all__ = ["Checked", "finding_lines", "findings_by_path", "findings_document", "findings_page", "in_one"]


class Checked(NamedTuple):
    """What a check found at one of several paths; ``title`` says what is there."""

    path: str
    title: tuple[str | Code, ...]
    findings: tuple[Finding, ...]


def in_one(checked: Iterable[Checked]) -> Report:
    """Return the findings about several paths as one report, each with its path at the front of its message."""
    return Report(
        tuple(
            replace(finding, message=f"{printable(one.path)}: {finding.message}")
            for one in checked
            for finding in one.findings
        )
    )


def findings_document(report: Report) -> dict[str, Any]:
    """Return the document of the checking commands with ``--json``."""
    return {
        "schema": "ckptkit.check/1",
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "key": finding.key,
                "message": finding.message,
                "hint": finding.hint,
            }
            for finding in report.findings
        ],
        "summary": report.summary,
    }


def findings_page(report: Report) -> Page:
    """Return one line a finding, its hint below it, then the count."""
    return [*finding_lines(report.findings), _count(report)]


def findings_by_path(checked: Sequence[Checked]) -> Page:
    """Return the title of each path with its findings below it, then the count of them all."""
    lines: list[Line] = []
    for one in checked:
        lines += [Line(one.title), *finding_lines(one.findings), Line(())]
    return [*lines, _count(in_one(checked))]


def finding_lines(findings: Iterable[Finding]) -> Iterator[Line]:
    """Yield one line a finding, and its hint below it."""
    for finding in findings:
        yield Line((f"{finding.severity}: ", Code(one_line(finding.message)), f"  [{finding.code}]"))
        if finding.hint:
            yield Line((Code(one_line(finding.hint)),), under=True)


def _count(report: Report) -> Line:
    count = report.summary
    parts = [plural(count[name], name.removesuffix("s")) for name in ("errors", "warnings", "notes") if count[name]]
    return Line((", ".join(parts) or "no findings",))
