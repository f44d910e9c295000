"""The findings of a check as a page and as a JSON document."""

from __future__ import annotations

from typing import Any

from ckptkit.errors import one_line
from ckptkit.findings import Report
from ckptkit.report.page import Code, Line, Page
from ckptkit.text import plural

__all__ = ["findings_document", "findings_page"]


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
    lines: list[Line] = []
    for finding in report.findings:
        code = f"  [{finding.code}]"
        lines.append(Line((f"{finding.severity}: ", Code(one_line(finding.message)), code)))
        if finding.hint:
            lines.append(Line((Code(one_line(finding.hint)),), under=True))
    count = report.summary
    parts = [plural(count[name], name.removesuffix("s")) for name in ("errors", "warnings", "notes") if count[name]]
    return [*lines, Line((", ".join(parts) or "no findings",))]
