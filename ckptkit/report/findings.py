"""The findings of a check as text and as a JSON document."""

from __future__ import annotations

from typing import Any

from ckptkit.errors import one_line
from ckptkit.findings import Report
from ckptkit.text import plural

__all__ = ["findings_document", "findings_text"]


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


def findings_text(report: Report) -> list[str]:
    """Return one line a finding, its hint below it, then the count."""
    lines = []
    for finding in report.findings:
        lines.append(f"{finding.severity}: {one_line(finding.message)}  [{finding.code}]")
        if finding.hint:
            lines.append(f"  {one_line(finding.hint)}")
    count = report.summary
    parts = [plural(count[name], name.removesuffix("s")) for name in ("errors", "warnings", "notes") if count[name]]
    return [*lines, ", ".join(parts) or "no findings"]
