"""The values that differ between two checkpoints, as a page."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.comparison.values import ValueDifference
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import plural, printable, short_number
from ckptkit.render.page import Line, Page, Table
from ckptkit.render.summary import describe

__all__ = ["value_page"]

_SHOWN = 10


def value_page(differences: Sequence[ValueDifference], expected: Checkpoint, found: Checkpoint) -> Page:
    """Return both sides, a row for each of the ten tensors that differ most, and how many more there are."""
    table = Table(
        ("key", "dtype and shape", "differ", "largest", "at", "expected", "found"),
        tuple(map(_row, differences[:_SHOWN])),
        right=frozenset({"differ", "largest"}),
    )
    more = len(differences) - _SHOWN
    return [
        Line(("expected  ", *describe(CheckpointSummary.of(expected), "expected"))),
        Line(("found     ", *describe(CheckpointSummary.of(found), "found"))),
        table,
        *([Line((f"and {plural(more, 'more tensor')}",))] if more > 0 else []),
    ]


def _row(difference: ValueDifference) -> tuple[str, ...]:
    wanted, got = difference.expected, difference.found
    described = str(wanted) if wanted.dtype == got.dtype else f"{wanted.dtype} and {got}"
    count = difference.changed_elements if difference.beyond is None else difference.beyond
    if count is None or difference.max_abs is None:
        return printable(wanted.key), described, "the bytes", "", "", "", ""
    largest = short_number(difference.max_abs, 3) if difference.max_abs else "only bits"
    return (
        printable(wanted.key), described, f"{count:,} of {wanted.elements:,}", largest,
        "" if difference.place is None else str(list(difference.place)), *difference.values,
    )  # fmt: skip
