"""Suggested rules as a page and as a JSON document: each with its evidence, and what is not decided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckptkit.align import Alignment, Ambiguity, Suggestion
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import plural, printable
from ckptkit.render.page import Block, Line, Page, Row, Table, code, spelled
from ckptkit.render.show import describe, totals

__all__ = ["align_document", "align_page"]


def align_document(result: Alignment) -> dict[str, Any]:
    """Return the document of ``ckpt align --json``."""
    return {
        "schema": "ckptkit.align/1",
        "expected": _side(result.expected),
        "found": _side(result.found),
        "rules": [_rule(one) for one in result.suggestions],
        "ambiguous": [
            {
                "expected": [_tensor(info) for info in one.expected],
                "found": [_tensor(info) for info in one.found],
                "why": one.why,
                "candidates": [_rule(candidate) for candidate in one.candidates],
            }
            for one in result.ambiguous
        ],
        "shape_mismatched": [{"expected": _tensor(info), "found": _tensor(other)} for info, other in result.unequal],
        "missing": [_tensor(info) for info in result.missing],
        "unexpected": [_tensor(info) for info in result.unexpected],
        "presets": list(result.presets),
        "summary": {
            "tensors": len(result.expected),
            "same": len(result.same),
            "renamed": sum(len(one.keys) for one in result.suggestions),
            "ambiguous": sum(len(one.expected) for one in result.ambiguous),
            "missing": len(result.missing),
            "unexpected": len(result.unexpected),
            "share": result.share,
            "complete": result.complete,
        },
    }


def _side(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"path": checkpoint.path, "format": checkpoint.format, **totals(checkpoint.values())}


def _tensor(info: TensorInfo) -> dict[str, Any]:
    return {"key": info.key, "dtype": info.dtype, "shape": list(info.shape)}


def _rule(one: Suggestion) -> dict[str, Any]:
    return {
        "from": list(one.sources),
        "to": list(one.targets),
        "op": [{operation.name: operation.params()} for operation in one.operations],
        "tensors": len(one.keys),
        "elements": one.elements,
        "confidence": round(one.confidence, 3),
        "why": one.why,
    }


def align_page(result: Alignment, *, expand: bool) -> Page:
    """Return the page of ``ckpt align``: rules with what speaks for them, then what is open, then the verdict."""
    page: list[Block] = [
        Line(("expected  ", *describe(result.expected, totals(result.expected.values())))),
        Line(("found     ", *describe(result.found, totals(result.found.values())))),
    ]
    if result.suggestions:
        headers = ("rule", "operation", "tensors", "confidence", "because")
        page.append(Table(headers, tuple(map(_row, result.suggestions)), frozenset({"tensors", "confidence"})))
    if result.ambiguous:
        page.append(Table(("ambiguous", "could be", "because"), tuple(map(_doubt, result.ambiguous))))
    page += _open(result, expand=expand)
    return [*page, *_verdict(result)]


def _row(one: Suggestion) -> tuple[str, ...]:
    operations = ", ".join(map(str, one.operations))
    return printable(one.names), operations, f"{len(one.keys):,}", f"{one.confidence:.2f}", printable(one.why)


def _doubt(one: Ambiguity) -> tuple[str, ...]:
    return _names(one.expected), _names(one.found), one.why


def _names(infos: Iterable[TensorInfo]) -> str:
    rows = spelled([Row(info.key, ()) for info in infos], expand=False)
    more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    return ", ".join(row[0] for row in rows[:4]) + more


def _open(result: Alignment, *, expand: bool) -> Iterable[Block]:
    rows = [Row(info.key, ("~", str(info), str(other))) for info, other in result.unequal]
    rows += [Row(info.key, ("-", str(info), "")) for info in result.missing]
    rows += [Row(info.key, ("+", "", str(info))) for info in result.unexpected]
    if rows:
        cells = tuple((mark, key, *rest) for key, mark, *rest in spelled(rows, expand=expand))
        yield Table(("", "not explained", "expected", "found"), cells)


def _verdict(result: Alignment) -> Iterable[Line]:
    renamed = sum(len(one.keys) for one in result.suggestions)
    counts = [
        f"{len(result.same):,} by the name they have",
        f"{renamed:,} by {plural(len(result.suggestions), 'rule')}",
        f"{sum(len(one.expected) for one in result.ambiguous):,} ambiguous",
        f"{len(result.unequal):,} shape-mismatched",
        f"{len(result.missing):,} missing",
        f"{len(result.unexpected):,} unexpected",
    ]
    yield Line((f"of {plural(len(result.expected), 'tensor')}: {', '.join(counts)}",))
    share = "100 %" if result.share == 1 else f"{min(100 * result.share, 99.9):.1f} %"
    yield Line((f"explained {share} of the elements expected",))
    for name in result.presets:
        yield Line(("a preset fills them all: --rules ", code(f"preset:{name}")))
