"""Findings as a page and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import printable
from ckptkit.errors import one_line
from ckptkit.render.page import Hint, Line, Message, Page, Table

__all__ = ["finding_lines", "findings_document", "findings_page", "findings_table"]


def findings_document(report: Report) -> dict[str, object]:
    """Return the JSON document of a command that checks something."""
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
        "summary": {**report.summary, "ignored": len(report.ignored)},
    }


def findings_page(report: Report) -> Page:
    """Return one line per finding with its hint below, then the number of findings, or what the check proved."""
    if report.proved and not report.findings and not report.ignored:
        return [Line((report.proved,)), findings_table(())]
    return [*finding_lines(report.findings), Line((report.counts,)), findings_table(report.findings)]


def findings_table(findings: Iterable[Finding]) -> Table:
    """Return a row per finding for scripts."""
    rows = ((one.severity, one.code, printable(one.key), one_line(one.message), one_line(one.hint)) for one in findings)
    return Table(("severity", "code", "key", "message", "hint"), tuple(rows), only_tsv=True)


def finding_lines(findings: Iterable[Finding]) -> Iterator[Line]:
    """Yield one line per finding, and its hint as an indented line."""
    for finding in findings:
        yield Line((f"{finding.severity}: ", Message(one_line(finding.message)), f"  [{finding.code}]"))
        if finding.hint:
            yield Line((Hint(one_line(finding.hint)),), indented=True)
