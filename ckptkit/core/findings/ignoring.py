"""Leave expected findings out of a report, by entries ``CODE`` or ``CODE:KEY-PATTERN``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ckptkit.core.findings import Finding, Report
from ckptkit.core.findings.code_names import CODE_NAMES
from ckptkit.core.findings.codes import IGNORE_UNUSED
from ckptkit.core.patterns import Pattern, parse_pattern
from ckptkit.core.text import kind_of, listed, quoted
from ckptkit.errors import RuleError

__all__ = ["IgnoreEntry", "IgnoreLike", "ignore_findings", "parse_ignore"]

IgnoreLike = str | Sequence[str]

_FORM = 'write "CODE" or "CODE:KEY-PATTERN", such as "groups.decay:*.norm.*"'
_SHOWN = 3
_Report = TypeVar("_Report", bound=Report)


@dataclass(frozen=True, slots=True)
class IgnoreEntry:
    """An entry of the ignore list: the pattern of the codes, and the pattern of the keys or None for every key."""

    text: str
    code: Pattern
    key: Pattern | None = None

    def matches_code(self, finding: Finding) -> bool:
        """Return whether the entry is about findings of this code."""
        return self.code.match(finding.code) is not None

    def matches_key(self, key: str) -> bool:
        """Return whether the entry is about this key."""
        return self.key is None or self.key.match(key) is not None


def parse_ignore(entries: IgnoreLike, name: str = "--ignore") -> tuple[IgnoreEntry, ...]:
    """Return the entries of an ignore list: one text, or several.

    An entry is ``CODE`` or ``CODE:KEY-PATTERN``. ``CODE`` is a code of docs/codes.md, or a pattern such as
    ``groups.*``. ``KEY-PATTERN`` is a pattern of the pattern language, and matches the whole key of a finding.
    ``name`` is what messages call the list. Raises ``RuleError`` for a code that no check has, with similar codes as
    the hint, and for a pattern that is not valid.

    >>> [entry.text for entry in parse_ignore(["groups.state-steps", "groups.decay:*.norm.*"])]
    ['groups.state-steps', 'groups.decay:*.norm.*']
    """
    texts = [entries] if isinstance(entries, str) else entries
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise RuleError(f"{name.lstrip('-')} is {kind_of(entries)}, not a list of codes", hint=_FORM)
    return tuple(_entry(text, name) for text in texts)


def _entry(text: str, name: str) -> IgnoreEntry:
    code, separator, key = text.partition(":")
    if separator and not key:
        raise RuleError(f"{name}: {quoted(text)} has no pattern after the colon", hint=_FORM)
    codes = None if code in CODE_NAMES else _parse(code, text, name) if "*" in code else None
    if code not in CODE_NAMES and (codes is None or all(codes.match(one) is None for one in CODE_NAMES)):
        raise RuleError(f"{name}: no finding has the code {quoted(code)}", hint=_similar(code))
    return IgnoreEntry(text, codes or parse_pattern(code), _parse(key, text, name) if separator else None)


def _parse(pattern: str, entry: str, name: str) -> Pattern:
    try:
        return parse_pattern(pattern)
    except RuleError as error:
        raise RuleError(f"{name}: {quoted(entry)}: {error.reason}", hint=error.hint) from None


def _similar(code: str) -> str:
    known = sorted(CODE_NAMES)
    if "*" in code:
        known = sorted({f"{name.partition('.')[0]}.*" for name in CODE_NAMES if "." in name})
    same_end = [name for name in known if code and name.rpartition(".")[2] == code]
    near = same_end or difflib.get_close_matches(code, known, n=_SHOWN, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"docs/codes.md lists the codes; {_FORM}"


def ignore_findings(
    report: _Report, entries: Sequence[IgnoreEntry], *, bare_name: Callable[[str], str] | None = None
) -> _Report:
    """Return ``report`` with the findings that ``entries`` match in ``ignored`` instead of ``findings``.

    A finding about several keys is left out only if the entries match all its keys. An entry that leaves no finding out
    gives a note. With ``bare_name``, a pattern may also match the name that it returns for a key.
    """
    if not entries:
        return report
    kept: list[Finding] = []
    ignored: list[Finding] = []
    used: set[str] = set()
    left: dict[str, tuple[Finding, list[str]]] = {}  # by entry, a finding that stays, and its keys without a match
    for finding in report.findings:
        fitting = [entry for entry in entries if entry.matches_code(finding)]
        keys = finding.keys or (finding.key,)
        hits = {entry.text: {key for key in keys if _matches(entry, key, bare_name)} for entry in fitting}
        rest = [key for key in keys if not any(key in hit for hit in hits.values())]
        (kept if rest else ignored).append(finding)
        for text, hit in hits.items():
            if hit and rest:
                left.setdefault(text, (finding, rest))
            elif hit:
                used.add(text)
    for entry in entries:
        note = _unused(entry, left.get(entry.text))
        expecting = [other for other in entries if other.matches_code(note)]
        if entry.text not in used and entry not in expecting:
            (ignored if any(other.matches_key(note.key) for other in expecting) else kept).append(note)
    return replace(report, findings=tuple(kept), ignored=(*report.ignored, *ignored))


def _matches(entry: IgnoreEntry, key: str, bare_name: Callable[[str], str] | None) -> bool:
    return entry.matches_key(key) or (bare_name is not None and entry.matches_key(bare_name(key)))


def _unused(entry: IgnoreEntry, left: tuple[Finding, list[str]] | None) -> Finding:
    if left is None:
        return IGNORE_UNUSED.finding(
            entry.text, f"ignore: {quoted(entry.text)} matches no finding", "remove the entry if it is no longer needed"
        )
    finding, rest = left
    return IGNORE_UNUSED.finding(
        entry.text,
        f"ignore: {quoted(entry.text)} matches only some keys of a finding, which stays: {finding.code} is also about "
        f"{listed(rest, _SHOWN)}",
        "add an entry for the other keys, or write the code without a pattern",
    )
