"""Findings as a page and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import printable
from ckptkit.errors import one_line
from ckptkit.render.page import Code, Line, Page

__all__ = ["CheckedPath", "finding_lines", "findings_document", "findings_page", "merged_report", "paths_page"]


class CheckedPath(NamedTuple):
    """The findings at one of several paths, under a ``title`` that describes the checkpoint there."""

    path: str
    title: tuple[str | Code, ...]
    findings: tuple[Finding, ...]
    ignored: tuple[Finding, ...] = ()


def merged_report(checked: Sequence[CheckedPath]) -> Report:
    """Return the findings at several paths as one report, with the path at the start of each message."""
    return Report(
        tuple(
            replace(finding, message=f"{printable(at_path.path)}: {finding.message}")
            for at_path in checked
            for finding in at_path.findings
        ),
        ignored=tuple(finding for at_path in checked for finding in at_path.ignored),
    )


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
    """Return one line per finding with its hint below, then the number of findings."""
    return [*finding_lines(report.findings), Line((report.counts,))]


def paths_page(checked: Sequence[CheckedPath]) -> Page:
    """Return the title of each path with its findings below, then the number of all findings."""
    lines: list[Line] = []
    for at_path in checked:
        lines += [Line(at_path.title), *finding_lines(at_path.findings), Line(())]
    return [*lines, Line((merged_report(checked).counts,))]


def finding_lines(findings: Iterable[Finding]) -> Iterator[Line]:
    """Yield one line per finding, and its hint as an indented line."""
    for finding in findings:
        yield Line((f"{finding.severity}: ", Code(one_line(finding.message)), f"  [{finding.code}]"))
        if finding.hint:
            yield Line((Code(one_line(finding.hint)),), indented=True)
