"""The findings about checkpoints as a page and as a JSON document, below a title for each checkpoint."""

from __future__ import annotations

from ckptkit.checks.codes import NOT_SCANNED
from ckptkit.checks.report import CheckReport, CheckReports, merge_reports
from ckptkit.formats.codes import NO_CHECKSUM
from ckptkit.render.findings import finding_lines, findings_document, findings_table
from ckptkit.render.page import Line, Page, as_code
from ckptkit.render.summary import describe

__all__ = ["check_document", "check_page", "checks_document", "checks_page"]

_WHAT_WAS_READ = frozenset({NOT_SCANNED.name, NO_CHECKSUM.name})


def check_page(report: CheckReport) -> Page:
    """Return the page of ``ckpt check`` for one checkpoint."""
    return checks_page(merge_reports([report]))


def check_document(report: CheckReport) -> dict[str, object]:
    """Return the document of ``ckpt check --json`` for one checkpoint."""
    return checks_document(merge_reports([report]))


def checks_page(merged: CheckReports) -> Page:
    """Return a line for each checkpoint that is clean; for others a title with the findings below, and their number."""
    lines: list[Line] = []
    for report in merged.reports:
        checkpoint = report.checkpoint
        title = describe(checkpoint) if checkpoint.format else (as_code(checkpoint.path),)
        if _is_clean(report):
            lines.append(Line((*title[:-1], f": no findings; {report.proved}")))
        else:
            gap = [Line(())] if lines and lines[-1].parts else []
            lines += [*gap, Line(title), *finding_lines(report.findings), Line(())]
    if all(map(_is_clean, merged.reports)):
        return [*lines, findings_table(merged.findings)]
    gap = [Line(())] if lines[-1].parts else []
    return [*lines, *gap, Line((merged.counts,)), findings_table(merged.findings)]


def _is_clean(report: CheckReport) -> bool:
    """Return whether the findings only say what was read, which ``proved`` says in short."""
    return not report.ignored and all(finding.code in _WHAT_WAS_READ for finding in report.findings)


def checks_document(merged: CheckReports) -> dict[str, object]:
    """Return the document of ``ckpt check --json``: each message begins with the path of its checkpoint."""
    return findings_document(merged)
