"""Findings, the codes of their kinds, and the report that collects them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from ckptkit.core.arguments import require_flags
from ckptkit.core.result import Result
from ckptkit.core.text import plural
from ckptkit.errors import CkptkitError, hint_for_python, message_for_python, one_line

__all__ = ["Code", "Finding", "ReaderWarning", "Report", "Severity", "codes_in"]

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check; printed, it names the arguments and functions of Python.

    ``message`` and ``hint`` are those of ``--json``: they name the options of ``ckpt``.

    Attributes:
        code: The stable name of the kind of finding; docs/codes.md lists the codes.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        key: The name of the tensor or parameter, or an empty string.
        message: What is wrong, in one sentence.
        hint: What to do about it, or an empty string.
        keys: The names of all tensors or parameters where there are several, and ``key`` is the first; else empty.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> report = ckptkit.validate_param_groups(model, torch.optim.SGD([model.weight], lr=0.1))
        >>> for finding in report.findings:
        ...     print(finding.severity, finding.code, finding.key)
        error groups.missing bias
    """

    code: str
    severity: Severity
    key: str
    message: str
    hint: str = ""
    keys: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        """Return the severity, the message and the hint on one line, with the words of Python."""
        hint = f" ({hint_for_python(self.hint)})" if self.hint else ""
        return one_line(f"{self.severity}: {message_for_python(self.message)}{hint}")


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding: a stable name, the possible severities (the usual severity first), and the meaning.

    ``hint`` is the hint of each finding that a check makes of a reader's warning.
    """

    name: str
    severities: tuple[Severity, ...]
    meaning: str
    hint: str = ""

    def finding(
        self,
        key: str,
        message: str,
        hint: str = "",
        *,
        severity: Severity | None = None,
        keys: Iterable[str] = (),
    ) -> Finding:
        """Return a finding of this kind about ``key``; without ``severity``, with the usual severity.

        Give ``keys`` where the finding is about several names, so that an ignore list can match all of them.
        """
        if severity is not None and severity not in self.severities:
            raise ValueError(f"{self.name} is declared as {' or '.join(self.severities)}, not as {severity}")
        return Finding(self.name, severity or self.severities[0], key, message, hint, tuple(keys))


def codes_in(namespace: Mapping[str, object]) -> tuple[Code, ...]:
    """Return the codes among the globals of a module, in order; the module passes its ``globals()``."""
    return tuple(value for value in namespace.values() if isinstance(value, Code))


class ReaderWarning(str):
    """The text of a reader's warning, with the code and severity of the finding that a check makes of it."""

    __slots__ = ("code", "severity")
    code: Code
    severity: Severity

    def __new__(cls, text: str, code: Code, severity: Severity | None = None) -> Self:
        """Return the text with its code; without ``severity``, with the usual severity of the code."""
        warning = super().__new__(cls, text)
        warning.code, warning.severity = code, severity or code.severities[0]
        return warning

    def finding(self) -> Finding:
        """Return the finding that a check reports, with the hint of the code."""
        return self.code.finding("", str(self), self.code.hint, severity=self.severity)


@dataclass(frozen=True, repr=False)
class Report(Result):
    """The findings of one check, in the order of their discovery.

    ``error`` is the exception class that ``raise_for_errors`` raises. ``ignored`` has the findings that an ignore list
    left out: they count neither for ``ok`` nor for ``raise_for_errors``. ``proved`` is what the check proves where it
    finds nothing; the page says it then.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> report = ckptkit.validate_param_groups(model, torch.optim.SGD([model.weight], lr=0.1))
        >>> report.ok, report.counts
        (False, '1 error')
    """

    _truth: ClassVar[str] = "ask for .ok"

    findings: tuple[Finding, ...] = ()
    error: type[CkptkitError] = CkptkitError
    ignored: tuple[Finding, ...] = field(default=(), kw_only=True)
    proved: str = field(default="", kw_only=True, compare=False)

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that are warnings."""
        return self._of("warning")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """The findings that are notes."""
        return self._of("note")

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    @property
    def summary(self) -> dict[str, int]:
        """The number of errors, warnings and notes."""
        return _count(self.findings)

    @property
    def counts(self) -> str:
        """The numbers of findings as text: ``1 error, 2 notes; 3 findings ignored (1 error, 2 warnings)``."""
        return "; ".join(filter(None, (_counts_text(_count(self.findings)) or "no findings", self.ignored_counts)))

    @property
    def ignored_counts(self) -> str:
        """The number of ignored findings as text, or an empty string."""
        if not self.ignored:
            return ""
        return f"{plural(len(self.ignored), 'finding')} ignored ({_counts_text(_count(self.ignored))})"

    def raise_for_errors(self, *, warnings: bool = False) -> None:
        """Raise the first error as an exception of class ``error``, with the number of further errors.

        Do nothing if there is no error. With ``warnings``, warnings count as errors too, after the errors.

        Example:
            >>> model = torch.nn.Linear(2, 2)
            >>> report = ckptkit.validate_param_groups(model, torch.optim.SGD([model.weight], lr=0.1))
            >>> report.raise_for_errors()
            Traceback (most recent call last):
            ckptkit.errors.GroupsError: 'bias' (2,) is trainable but in no group: ...
        """
        require_flags(warnings=warnings)
        errors = (*self.errors, *self.warnings) if warnings else self.errors
        if errors:
            more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
            raise self.error(f"{errors[0].message}{more}", hint=errors[0].hint or None)

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return self.counts


def _count(findings: Iterable[Finding]) -> dict[str, int]:
    count = Counter(finding.severity for finding in findings)
    return {"errors": count["error"], "warnings": count["warning"], "notes": count["note"]}


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(plural(count, name.removesuffix("s")) for name, count in counts.items() if count)
