"""A comparison as a page and as a JSON document."""

from __future__ import annotations

from typing import Any

from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import plural, printable
from ckptkit.render.page import Line, Page, Row, Table, spelled
from ckptkit.render.show import describe, totals

__all__ = ["diff_document", "diff_page"]


def diff_document(result: StateDictDiff, expected: Checkpoint, found: Checkpoint) -> dict[str, Any]:
    """Return the document of ``ckpt diff --json``."""
    return {
        "schema": "ckptkit.diff/1",
        "expected": _side(expected),
        "found": _side(found),
        "matched": [
            {
                "key": pair.key,
                "found_key": pair.found.key,
                "dtype": pair.expected.dtype,
                "shape": list(pair.found.shape),
            }
            for pair in result.matched
        ],
        "missing": [_tensor(info) for info in result.missing],
        "unexpected": [_tensor(info) for info in result.unexpected],
        "shape_mismatched": [_pair(pair) for pair in result.shape_mismatched],
        "dtype_mismatched": [_pair(pair) for pair in result.dtype_mismatched],
        "values": None,
        "hints": [{"message": hint.message, "rename": hint.rename} for hint in result.hints],
        "summary": {
            "matched": len(result.matched),
            "missing": len(result.missing),
            "unexpected": len(result.unexpected),
            "shape_mismatched": len(result.shape_mismatched),
            "dtype_mismatched": len(result.dtype_mismatched),
            "coverage": result.coverage,
            "loads_strict": result.loads_strict,
            "loads": result.loads,
            "different": result.different,
        },
    }


def _side(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"path": checkpoint.path, "format": checkpoint.format, **totals(checkpoint.values())}


def _tensor(info: TensorInfo) -> dict[str, Any]:
    return {"key": info.key, "dtype": info.dtype, "shape": list(info.shape)}


def _pair(pair: KeyPair) -> dict[str, Any]:
    sides = {"expected": pair.expected, "found": pair.found}
    made = {name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in sides.items()}
    return {"key": pair.key, "found_key": pair.found.key, **made}


def diff_page(
    result: StateDictDiff, expected: Checkpoint, found: Checkpoint, *, expand: bool, everything: bool
) -> Page:
    """Return the page of ``ckpt diff``: what differs, marked as in a diff, then the verdict.

    ``-`` is missing, ``+`` unexpected, ``~`` another shape, ``≈`` another dtype, ``=`` matched.
    """
    wanted, given = totals(expected.values()), totals(found.values())
    rows = _rows(result, expand=expand, everything=everything)
    counts = [
        f"{len(result.matched):,} matched",
        f"{len(result.missing):,} missing",
        f"{len(result.unexpected):,} unexpected",
        f"{len(result.shape_mismatched):,} shape-mismatched",
        f"{len(result.dtype_mismatched):,} dtype-mismatched",
    ]
    return [
        Line(("expected  ", *describe(expected, wanted))),
        Line(("found     ", *describe(found, given))),
        *([Table(("", "key", "expected", "found"), tuple(rows))] if rows else []),
        Line((", ".join(counts),)),
        Line((f"coverage {_percent(result.coverage)} of {plural(wanted['elements'], 'element')}",)),
        Line((_verdict(result),)),
    ]


def _rows(result: StateDictDiff, *, expand: bool, everything: bool) -> list[tuple[str, ...]]:
    rows: list[Row] = []
    if everything:
        other = {pair.key for pair in (*result.dtype_mismatched, *result.uncopyable)}
        rows += [_row("=", pair) for pair in result.matched if pair.key not in other]
    rows += [Row(info.key, ("-", str(info), "")) for info in result.missing if info.key not in result.blocked]
    rows += [Row(info.key, ("+", "", str(info))) for info in result.unexpected]
    rows += [_row("~", pair) for pair in result.shape_mismatched]
    fatal = {pair.key for pair in result.uncopyable}
    rows += [_row("≈", pair) for pair in result.dtype_mismatched if pair.key not in fatal]
    rows += [_row("≈", pair, "  torch cannot copy it") for pair in result.uncopyable]
    rows += [Row(key, ("~", str(result.expected[key]), "no tensor")) for key in result.blocked]
    rows += [Row(key, ("+", "", "no tensor")) for key in result.foreign]
    rows += [Row(key, ("~", "extra state", "on one side only")) for key in result.extra_state]
    return [(mark, key, *rest) for key, mark, *rest in spelled(rows, expand=expand)]


def _row(mark: str, pair: KeyPair, remark: str = "") -> Row:
    renamed = "" if pair.found.key == pair.key else f"  as {printable(pair.found.key)}"
    return Row(pair.key, (mark, str(pair.expected), f"{pair.found}{renamed}{remark}"))


def _percent(share: float) -> str:
    # A rounded 100.0 % would say that nothing is missing.
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def _verdict(result: StateDictDiff) -> str:
    if result.loads_strict:
        return "load_state_dict accepts it"
    if result.loads:
        return "load_state_dict raises with strict=True; with strict=False it loads what matched and says nothing"
    return "load_state_dict raises, with strict=False too"
