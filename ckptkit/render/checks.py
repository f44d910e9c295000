"""The findings about checkpoints as a page and as a JSON document, below a title for each checkpoint."""

from __future__ import annotations

from ckptkit.checks.report import CheckReport, CheckReports, merge_reports
from ckptkit.render.findings import finding_lines, findings_document
from ckptkit.render.page import Line, Page, as_code
from ckptkit.render.summary import describe

__all__ = ["check_document", "check_page", "checks_document", "checks_page"]


def check_page(report: CheckReport) -> Page:
    """Return the page of ``ckpt check`` for one checkpoint."""
    return checks_page(merge_reports([report]))


def check_document(report: CheckReport) -> dict[str, object]:
    """Return the document of ``ckpt check --json`` for one checkpoint."""
    return checks_document(merge_reports([report]))


def checks_page(merged: CheckReports) -> Page:
    """Return a title for each checkpoint with its findings below, then the number of all findings."""
    lines: list[Line] = []
    for report in merged.reports:
        checkpoint = report.checkpoint
        title = describe(checkpoint) if checkpoint.format else (as_code(checkpoint.path),)
        lines += [Line(title), *finding_lines(report.findings), Line(())]
    return [*lines, Line((merged.counts,))]


def checks_document(merged: CheckReports) -> dict[str, object]:
    """Return the document of ``ckpt check --json``: each message begins with the path of its checkpoint."""
    return findings_document(merged)
