"""Findings as a page and as a JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import in_quotes, printable, quoted
from ckptkit.errors import one_line
from ckptkit.render.page import Hint, Line, Message, Page, Row, Table, Tone, join_rows
from ckptkit.render.page.head import Fact, Head

__all__ = [
    "finding_facts", "finding_lines", "findings_document", "findings_head", "findings_page", "findings_table",
    "tone_of",
]  # fmt: skip

_MOST_ALIKE = 5  # lines that say the same of other keys; more are one line and a list of as many names


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


def findings_head(report: Report) -> Head:
    """Return the head of a report: what the check proved, or the number of findings."""
    is_proved = report.proved and not report.findings and not report.ignored
    verdict = Line((report.proved if is_proved else report.counts,))
    return Head("findings", verdict, (), tuple(finding_facts(report)), tone_of(report), is_command=False)


def finding_facts(report: Report) -> list[Fact]:
    """Return the number of errors, warnings and notes for the head of a report."""
    counts: list[tuple[int, str, Tone]] = [
        (len(report.errors), "error", "error"),
        (len(report.warnings), "warning", "warning"),
        (len(report.notes), "note", "note"),
    ]
    return [Fact.of_count(count, noun, tone=tone if count else "") for count, noun, tone in counts]


def tone_of(report: Report) -> Tone:
    """Return whether a report is good: it has errors, warnings, or neither."""
    return "error" if report.errors else "warning" if report.warnings else "good"


def findings_table(findings: Iterable[Finding]) -> Table:
    """Return a row per finding for scripts."""
    rows = ((one.severity, one.code, printable(one.key), one_line(one.message), one_line(one.hint)) for one in findings)
    return Table(("severity", "code", "key", "message", "hint"), tuple(rows), only_tsv=True)


def finding_lines(findings: Iterable[Finding]) -> Iterator[Line]:
    """Yield one line per finding, and its hint as an indented line below it and its neighbours of the same code.

    Findings whose keys differ in indices only share a line. Where many lines would say the same of other keys, the
    first stands for them, and an indented line lists the keys.
    """
    alike = [list(run) for _, run in groupby(_joined(findings), key=attrgetter("number"))]
    for number, run in enumerate(alike, 1):
        first = run[0].finding
        for one in run if len(run) <= _MOST_ALIKE else run[:1]:
            yield Line(
                (f"{first.severity}: ", Message(one_line(one.message)), f"  [{first.code}]"), tone=first.severity
            )
        if len(run) > _MOST_ALIKE:
            named, left = run[1 : 1 + _MOST_ALIKE], run[1 + _MOST_ALIKE :]
            names = [f"{one.name} ×{one.keys:,}" if one.keys > 1 else one.name for one in named]
            more = f" and {sum(one.keys for one in left):,} more" if left else ""
            yield Line(
                (f"the same for {sum(one.keys for one in run[1:]):,} more: {', '.join(names)}{more}",), indented=True
            )
        following = alike[number][0].finding if number < len(alike) else None
        is_repeated = following is not None and (following.code, following.hint) == (first.code, first.hint)
        if first.hint and not is_repeated:
            yield Line((Hint(one_line(first.hint)),), indented=True)


class _Joined(NamedTuple):
    """One message about keys that differ in indices: those of a set of findings with the same number."""

    message: str
    name: str
    keys: int
    number: int
    finding: Finding


def _joined(findings: Iterable[Finding]) -> Iterator[_Joined]:
    """Yield the messages of findings that say the same of their keys: one for all keys that differ in indices.

    Keys are joined as the rows of a table are. A finding stays alone if its message does not have its key exactly once,
    or if its hint has the key.
    """
    numbers: dict[tuple[object, ...], int] = {}
    sets: list[tuple[str, str, Finding, bool]] = []
    rows: dict[Row, None] = {}
    for finding in findings:
        name = quoted(finding.key)
        before, found, after = finding.message.partition(name)
        is_alone = not finding.key or not found or name in after or finding.key in finding.hint
        look = (finding.code, finding.severity, before, after, finding.hint, len(sets) if is_alone else None)
        row = (finding.key, (str(numbers.setdefault(look, len(sets))),))
        if row in rows:  # the same twice
            row = (finding.key, (str(len(sets)),))
        if int(row[1][0]) == len(sets):
            sets.append((before, after, finding, is_alone))
        rows[row] = None
    for joined, text in join_rows(rows):
        number = int(text)
        before, after, finding, is_alone = sets[number]
        start, sign, count = joined.rpartition(" ×")
        is_joined = bool(sign) and count.isdecimal()  # a key may have the sign too, but does not end as a count does
        name = in_quotes(start if is_joined else joined)
        if is_alone:
            yield _Joined(finding.message, quoted(finding.key), 1, number, finding)
        else:
            message = f"{before}{name} ×{count}{after}" if is_joined else f"{before}{name}{after}"
            yield _Joined(message, name, int(count) if is_joined else 1, number, finding)
