"""The findings about checkpoints as a page and as a JSON document, below a title for each checkpoint."""

from __future__ import annotations

from ckptkit.checks.codes import NOT_SCANNED
from ckptkit.checks.report import CheckReport, CheckReports, merge_reports
from ckptkit.core.text import human_bytes
from ckptkit.formats.codes import NO_CHECKSUM
from ckptkit.render.findings import finding_facts, finding_lines, findings_document, findings_table, tone_of
from ckptkit.render.page import Line, Page, as_code
from ckptkit.render.page.head import Fact, Head, Subject
from ckptkit.render.summary import describe

__all__ = [
    "WHAT_WAS_READ",
    "check_document",
    "check_head",
    "check_page",
    "checks_document",
    "checks_head",
    "checks_page",
]

WHAT_WAS_READ = frozenset({NOT_SCANNED.name, NO_CHECKSUM.name})  # findings about what was read, not about a fault


def check_page(report: CheckReport) -> Page:
    """Return the page of ``ckpt check`` for one checkpoint."""
    return checks_page(merge_reports([report]))


def check_document(report: CheckReport) -> dict[str, object]:
    """Return the document of ``ckpt check --json`` for one checkpoint."""
    return checks_document(merge_reports([report]))


def check_head(report: CheckReport) -> Head:
    """Return the head of a report about one checkpoint."""
    return checks_head(merge_reports([report]))


def checks_head(merged: CheckReports) -> Head:
    """Return the head of a report: how many findings there are, and how much was checked.

    It names the checkpoint only where there is one: of several, the page names each above its findings.
    """
    checkpoints = [report.checkpoint for report in merged.reports]
    subjects = tuple(Subject("", _title(report)) for report in merged.reports) if len(checkpoints) == 1 else ()
    is_clean = all(map(_is_clean, merged.reports))
    facts = (
        *(() if is_clean else finding_facts(merged)),
        *(() if subjects else (Fact.of_count(len(checkpoints), "checkpoint"),)),
        Fact.of_count(sum(one.tensors for one in checkpoints), "tensor"),
        Fact(human_bytes(sum(one.nbytes for one in checkpoints)), "in tensors"),
    )
    verdict = Line(("no findings",)) if is_clean else Line((merged.counts,))
    return Head("check", verdict, subjects, facts, tone_of(merged))


def _title(report: CheckReport) -> Line:
    return Line(describe(report.checkpoint) if report.checkpoint.format else (as_code(report.checkpoint.path),))


def checks_page(merged: CheckReports) -> Page:
    """Return a line for each checkpoint that is clean; for others a title with the findings below, and their number."""
    lines: list[Line] = []
    for report in merged.reports:
        title = _title(report)
        if _is_clean(report):
            lines.append(Line((*title.parts[:-1], f": no findings; {report.proved}"), tone="good"))
        else:
            gap = [Line(())] if lines and lines[-1].parts else []
            lines += [*gap, title, *finding_lines(report.findings), Line(())]
    if all(map(_is_clean, merged.reports)):
        return [*lines, findings_table(merged.findings)]
    gap = [Line(())] if lines[-1].parts else []
    return [*lines, *gap, Line((merged.counts,)), findings_table(merged.findings)]


def _is_clean(report: CheckReport) -> bool:
    """Return whether the findings only say what was read, which ``proved`` says in short."""
    return not report.ignored and all(finding.code in WHAT_WAS_READ for finding in report.findings)


def checks_document(merged: CheckReports) -> dict[str, object]:
    """Return the document of ``ckpt check --json``: each message begins with the path of its checkpoint."""
    return findings_document(merged)
