"""Results in a job of GitHub Actions: annotations, a text in the log, and the summary of the step."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ckptkit.checks.report import CheckReports
from ckptkit.comparison.state_dict_diff import StateDictDiff
from ckptkit.core.findings import Finding, Report, Severity
from ckptkit.core.result import Result
from ckptkit.core.text import printable
from ckptkit.errors import one_line
from ckptkit.render.checks import WHAT_WAS_READ
from ckptkit.render.page import Page, as_markdown, as_text

__all__ = ["Annotation", "annotations_of", "append_summary", "command_lines", "log_lines"]

# https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands says how each is written.
_LEVELS: Final[Mapping[Severity, str]] = {"error": "error", "warning": "warning", "note": "notice"}
_MOST_OF_A_LEVEL: Final = 10  # that GitHub shows of one step; the log and the summary have all
_MOST_BYTES: Final = 1 << 20  # of the summary of a step: GitHub refuses a longer one as a whole
_CUT: Final = "\n\nThe report is longer than GitHub shows: the log of this step has all of it.\n"


@dataclass(frozen=True, slots=True)
class Annotation:
    """What GitHub shows on the page of a run, and beside the file at ``path`` if that is not empty."""

    severity: Severity
    title: str
    message: str
    path: str = ""


def annotations_of(result: Result) -> Iterator[Annotation]:
    """Yield an annotation for each finding and each gate that does not hold.

    A result that is not ok, and has neither, has one for its most important numbers. Findings that only say what was
    read have none.
    """
    if isinstance(result, CheckReports):
        for report in result.reports:
            yield from _of_findings(report.findings, report.checkpoint.path)
    elif isinstance(result, Report):
        yield from _of_findings(result.findings)
    elif isinstance(result, StateDictDiff) and result.unmet:
        for unmet in result.unmet:
            yield Annotation("error", unmet.requirement, unmet.message)
    elif getattr(result, "ok", True) is False:
        yield Annotation("error", "ckpt", result.in_short)


def _of_findings(findings: Iterable[Finding], path: str = "") -> Iterator[Annotation]:
    for finding in findings:
        if finding.code not in WHAT_WAS_READ:
            message = f"{finding.message}\n{finding.hint}" if finding.hint else finding.message
            yield Annotation(finding.severity, finding.code, message, path)


def command_lines(annotations: Iterable[Annotation]) -> Iterator[str]:
    """Yield the commands that make annotations, each on one line, whatever the names in it are."""
    counts: Counter[Severity] = Counter()
    for one in annotations:
        counts[one.severity] += 1
        if counts[one.severity] > _MOST_OF_A_LEVEL:
            continue
        path = _in_workspace(one.path)
        values = {"file": path, "title": printable(one.title)} if path else {"title": printable(one.title)}
        properties = ",".join(f"{name}={_escaped_property(value)}" for name, value in values.items())
        where = "" if path or not one.path else f"{printable(one.path)}: "
        message = "\n".join(map(one_line, f"{where}{one.message}".split("\n")))
        yield f"::{_LEVELS[one.severity]} {properties}::{_escaped(message)}"


def log_lines(page: Page) -> Iterator[str]:
    """Yield a page as text between two commands, so that no name in it is taken for a command."""
    token = secrets.token_hex(16)
    yield f"::stop-commands::{token}"
    yield from as_text(page)
    yield f"::{token}::"


def append_summary(page: Page) -> None:
    """Append a page to the summary of the step, if this is a step. Raises ``OSError``."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    text = "".join(f"{line}\n" for line in as_markdown(page)).encode(errors="backslashreplace") + b"\n"
    with open(path, "ab") as file:
        left = _MOST_BYTES - file.tell()
        if len(text) > left:
            end = text.rfind(b"\n", 0, max(left - len(_CUT), 0))
            text = text[: max(end, 0)] + _CUT.encode()
        if len(text) <= left:
            file.write(text)


def _in_workspace(path: str) -> str:
    """Return the path as GitHub knows it, relative to the workspace; empty for a path that is not a file in there."""
    workspace = os.environ.get("GITHUB_WORKSPACE") or os.getcwd()
    if not path or not os.path.isfile(path):
        return ""
    relative = os.path.relpath(os.path.realpath(path), os.path.realpath(workspace))
    return "" if relative.split(os.sep)[0] == os.pardir else relative


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escaped_property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
