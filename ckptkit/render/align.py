"""Suggested rules as a page and as a JSON document, with evidence for each rule and the tensors that have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptkit.align import Alignment, Ambiguity, Suggestion
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import percent, plural, printable
from ckptkit.render.page import Block, Hint, Line, Page, Table, as_code, table_rows
from ckptkit.render.summary import checkpoint_document, describe, tensor_document

__all__ = ["align_document", "align_page"]

_MOST_POSSIBLE = 6  # rules that are possible for tensors that fit equally


def align_document(result: Alignment) -> dict[str, object]:
    """Return the document of ``ckpt align --json``."""
    return {
        "schema": "ckptkit.align/1",
        "expected": checkpoint_document(CheckpointSummary.of(result.expected)),
        "found": checkpoint_document(CheckpointSummary.of(result.found)),
        "rules": [_rule_document(rule) for rule in result.suggestions],
        "ambiguous": [
            {
                "expected": [tensor_document(info) for info in ambiguity.expected],
                "found": [tensor_document(info) for info in ambiguity.found],
                "why": ambiguity.why,
                "candidates": [_rule_document(candidate) for candidate in ambiguity.candidates],
            }
            for ambiguity in result.ambiguous
        ],
        "shape_mismatched": [
            {"expected": tensor_document(expected), "found": tensor_document(found)}
            for expected, found in result.unequal
        ],
        "missing": [tensor_document(info) for info in result.missing],
        "unexpected": [tensor_document(info) for info in result.unexpected],
        "presets": list(result.presets),
        "different": list(result.different),
        "hints": list(result.hints),
        "summary": {
            "tensors": len(result.expected),
            "same": len(result.same),
            "renamed": sum(len(rule.keys) for rule in result.suggestions),
            "ambiguous": sum(len(ambiguity.expected) for ambiguity in result.ambiguous),
            "missing": len(result.missing),
            "unexpected": len(result.unexpected),
            "equal": None if result.equal is None else len(result.equal),
            "different": None if result.equal is None else len(result.different),
            "share": result.share,
            "complete": result.complete,
        },
    }


def _rule_document(rule: Suggestion) -> dict[str, object]:
    return {
        "from": list(rule.sources),
        "to": list(rule.targets),
        "op": [{operation.name: operation.params()} for operation in rule.operations],
        "tensors": len(rule.keys),
        "elements": rule.elements,
        "confidence": round(rule.confidence, 3),
        "why": rule.why,
    }


def align_page(result: Alignment, *, expand: bool = False) -> Page:
    """Return the page of ``ckpt align``: the rules with their evidence, then unexplained tensors, then the counts."""
    page: list[Block] = [
        Line(("expected  ", *describe(CheckpointSummary.of(result.expected), "expected"))),
        Line(("found     ", *describe(CheckpointSummary.of(result.found), "found"))),
    ]
    headers = ("rule", "operation", "tensors", "confidence", "because")
    rows = tuple(map(_rule_row, result.suggestions))
    page.append(Table(headers, rows, frozenset({"tensors", "confidence"}), gives_way=("operation", "confidence")))
    possible = tuple(row for ambiguity in result.ambiguous for row in _possible_rows(ambiguity, expand=expand))
    names = ("possible rule", "operation", "tensors", "because")
    page.append(Table(names, possible, frozenset({"tensors"}), gives_way=("operation", "tensors")))
    page += _unexplained(result, expand=expand)
    if result.note:
        page.append(Line((result.note,)))
    return [*page, *_counts(result)]


def _rule_row(rule: Suggestion) -> tuple[str, ...]:
    return *_rule_cells(rule), f"{rule.confidence:.2f}", printable(rule.why)


def _rule_cells(rule: Suggestion) -> tuple[str, str, str]:
    return printable(rule.names), ", ".join(map(str, rule.operations)), f"{len(rule.keys):,}"


def _possible_rows(ambiguity: Ambiguity, *, expand: bool) -> Iterator[tuple[str, ...]]:
    """Yield a row for each rule that is possible; one for all of them where they are too many to be made."""
    why = ambiguity.why
    if not ambiguity.candidates:
        yield f"{_names(ambiguity.found)} = {_names(ambiguity.expected)}", "", f"{len(ambiguity.expected):,}", why
    shown = ambiguity.candidates if expand else ambiguity.candidates[:_MOST_POSSIBLE]
    for candidate in shown:
        yield *_rule_cells(candidate), why
    left = len(ambiguity.candidates) - len(shown)
    if left:
        yield f"and {left} more = {_names(ambiguity.expected)}", "", "", why


def _names(infos: Iterable[TensorInfo]) -> str:
    rows = table_rows([(info.key, ()) for info in infos], expand=False)
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{rows[0][0]}{more}"


def _unexplained(result: Alignment, *, expand: bool) -> Iterable[Block]:
    rows = [(expected.key, ("~", str(expected), str(found))) for expected, found in result.unequal]
    rows += [(info.key, ("-", str(info), "")) for info in result.missing]
    rows += [(info.key, ("+", "", str(info))) for info in result.unexpected]
    if rows:
        cells = tuple((mark, key, *rest) for key, mark, *rest in table_rows(rows, expand=expand))
        yield Table(("", "not explained", "expected", "found"), cells)


def _counts(result: Alignment) -> Iterable[Line]:
    renamed = sum(len(rule.keys) for rule in result.suggestions)
    counts = [
        f"{len(result.same):,} with the same name",
        f"{renamed:,} by {plural(len(result.suggestions), 'rule')}",
        f"{sum(len(ambiguity.expected) for ambiguity in result.ambiguous):,} ambiguous",
        f"{len(result.unequal):,} shape-mismatched",
        f"{len(result.missing):,} missing",
        f"{len(result.unexpected):,} unexpected",
    ]
    yield Line((f"of {plural(len(result.expected), 'tensor')}: {', '.join(counts)}",))
    yield Line((f"explained {percent(result.share)} of the expected elements{_values(result)}",))
    for name in result.presets:
        yield Line(("this preset fills all of them: --rules ", as_code(f"preset:{name}")))
    for hint in result.hints:
        yield Line((Hint(hint),))


def _values(result: Alignment) -> str:
    """Return what the digests say about the filled tensors; empty without digests."""
    if result.equal is None:
        return ""
    filled = len(result.same) + sum(len(rule.keys) for rule in result.suggestions)
    unknown = filled - len(result.equal) - len(result.different)
    said = [f"{len(result.equal):,} of {plural(filled, 'tensor')} with equal bytes"]
    said += [f"{len(result.different):,} with other values, which do not count"] if result.different else []
    said += [f"{unknown:,} not compared{_why_unknown(result, unknown)}"] if unknown else []
    return f": {', '.join(said)}"


def _why_unknown(result: Alignment, unknown: int) -> str:
    """Return how many of the tensors that were not compared have another dtype, of which bytes say nothing."""
    sources: dict[str, tuple[str, ...]] = {key: (key,) for key in result.same}
    for rule in result.suggestions:
        sources |= rule.keys
    known = {*(result.equal or ()), *result.different}
    others = sum(
        result.expected[key].dtype
        not in {result.found[source].dtype for source in sources[key] if source in result.found}
        for key in sources.keys() - known
    )
    if not others:
        return ""
    return ", since their dtypes differ" if others == unknown else f", {others:,} of them since their dtypes differ"
