"""The reports of ``run_checks``: about one checkpoint, and about several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ckptkit.core.findings import Report
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import printable

__all__ = ["CheckReport", "CheckReports", "merge_reports"]


@dataclass(frozen=True, repr=False)
class CheckReport(Report):
    """The findings about one checkpoint; ``checkpoint`` has its path, format and size."""

    checkpoint: CheckpointSummary = NO_CHECKPOINT


@dataclass(frozen=True, repr=False)
class CheckReports(Report):
    """The findings about several checkpoints, each with its path in the message, and the ``reports`` about each."""

    reports: tuple[CheckReport, ...] = field(default=())


def merge_reports(reports: Sequence[CheckReport]) -> CheckReports:
    """Return the findings about several checkpoints as one report, with the path at the start of each message."""
    return CheckReports(
        tuple(
            replace(finding, message=f"{printable(report.checkpoint.path)}: {finding.message}")
            for report in reports
            for finding in report.findings
        ),
        ignored=tuple(finding for report in reports for finding in report.ignored),
        reports=tuple(reports),
    )
