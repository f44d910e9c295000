"""Findings, the codes that name their kinds, and the report that holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from ckptkit.core.text import html_table, plural, printable
from ckptkit.errors import CkptkitError, one_line

__all__ = ["Code", "Finding", "ReaderWarning", "Report", "Severity", "codes_in"]

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: a stable ``code``, the FQN it is about (or empty), what is wrong and the way out."""

    code: str
    severity: Severity
    key: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding: its stable name, the severities that it can have (the usual one first), one sentence."""

    name: str
    severities: tuple[Severity, ...]
    meaning: str

    def finding(self, key: str, message: str, hint: str = "", *, severity: Severity | None = None) -> Finding:
        """Return a finding of this kind about ``key``, at the usual severity where none is given."""
        if severity is not None and severity not in self.severities:
            raise ValueError(f"{self.name} is declared as {' or '.join(self.severities)}, not as {severity}")
        return Finding(self.name, severity or self.severities[0], key, message, hint)


def codes_in(namespace: Mapping[str, object]) -> tuple[Code, ...]:
    """Return the codes that a module defines, in its order; a module passes its ``globals()``."""
    return tuple(value for value in namespace.values() if isinstance(value, Code))


class ReaderWarning(str):
    """The text of a reader's warning, with the code and severity of the finding that a check makes of it."""

    __slots__ = ("code", "severity")
    code: Code
    severity: Severity

    def __new__(cls, text: str, code: Code, severity: Severity | None = None) -> Self:
        """Return the text with its code, at the usual severity of the code where none is given."""
        warning = super().__new__(cls, text)
        warning.code, warning.severity = code, severity or code.severities[0]
        return warning

    def finding(self, hint: str = "") -> Finding:
        """Return the finding that a check reports."""
        return self.code.finding("", str(self), hint, severity=self.severity)


@dataclass(frozen=True)
class Report:
    """The findings of one check, in the order in which they were found; ``ok`` where none is an error."""

    findings: tuple[Finding, ...] = ()
    error: type[CkptkitError] = CkptkitError

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def summary(self) -> dict[str, int]:
        """Number of errors, warnings and notes."""
        count = Counter(finding.severity for finding in self.findings)
        return {"errors": count["error"], "warnings": count["warning"], "notes": count["note"]}

    def __str__(self) -> str:
        """One line a finding with its hint, then the count."""
        lines = [
            one_line(f"{f.severity}: {f.message}  [{f.code}]" + (f" ({f.hint})" if f.hint else ""))
            for f in self.findings
        ]
        parts = [plural(count, name.removesuffix("s")) for name, count in self.summary.items() if count]
        return "\n".join([*lines, ", ".join(parts) or "no findings"])

    def raise_for_errors(self, *, warnings: bool = False) -> None:
        """Raise the first error, saying how many more there are; do nothing where there is none.

        With ``warnings`` they count too, after the errors.
        """
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if warnings:
            errors += [finding for finding in self.findings if finding.severity == "warning"]
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            raise self.error(f"{errors[0].message}{more}", hint=errors[0].hint or None)

    def _repr_html_(self) -> str:
        return html_table(
            ("severity", "code", "key", "message", "hint"),
            [(f.severity, f.code, printable(f.key), one_line(f.message), one_line(f.hint)) for f in self.findings],
        )
