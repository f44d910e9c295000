"""Several checkpoints as a page and as a JSON document: one row each, also for those that cannot be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.result.summary import NO_CHECKPOINT, CheckpointSummary
from ckptkit.core.text import human_bytes, plural, printable
from ckptkit.errors import CkptkitError
from ckptkit.quantized import quantized_weights
from ckptkit.render.page import Line, Page, Table

__all__ = ["ListedCheckpoint", "listing_document", "listing_page"]

_MOST_DTYPES = 3


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """One row: totals of the chosen tensors, how many have each dtype, and how many weights each scheme of codes has.

    Or ``error``, which says why the checkpoint cannot be read.
    """

    path: str
    summary: CheckpointSummary = NO_CHECKPOINT
    dtypes: Mapping[str, int] = field(default_factory=dict)
    quantized: Mapping[str, int] = field(default_factory=dict)
    error: CkptkitError | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, infos: Mapping[str, TensorInfo]) -> Self:
        """Return the row of an open checkpoint; the dtype of the most tensors is first."""
        counts = Counter(info.dtype for info in infos.values())
        weights = quantized_weights(checkpoint).weights
        schemes = Counter(weight.scheme for weight in weights if any(part in infos for part in weight.parts))
        summary = CheckpointSummary.of(checkpoint, infos.values())
        return cls(checkpoint.path, summary, dict(counts.most_common()), dict(schemes.most_common()))


def listing_page(listed: Sequence[ListedCheckpoint]) -> Page:
    """Return the page of ``ckpt show`` for several paths: a row each, then the totals."""
    headers: tuple[str, ...] = ("path", "format", "tensors", "elements", "bytes", "dtypes")
    rows = [_row(row) for row in listed]
    if any(row.quantized for row in listed):
        headers = (*headers, "quantised as")
        rows = [(*cells, _scheme_cell(row.quantized)) for cells, row in zip(rows, listed, strict=True)]
    table = Table(headers, tuple(rows), frozenset(headers[2:5]), gives_way=("elements", "dtypes"))
    totals = _totals(listed)
    size = f"{plural(totals['tensors'], 'tensor')}, {plural(totals['elements'], 'element')}"
    unreadable = totals["unreadable"]
    failed = f"; {unreadable:,} of them cannot be read" if unreadable else ""
    count = plural(totals["checkpoints"], "checkpoint")
    return [table, Line((f"{count}, {size}, {human_bytes(totals['bytes'])}{failed}",))]


def _row(listed: ListedCheckpoint) -> tuple[str, ...]:
    if listed.error is not None:
        return printable(listed.path), "cannot be read", "", "", "", ""
    summary = listed.summary
    inside = f"::{printable(summary.envelope)}" if summary.envelope else ""
    return (
        f"{printable(listed.path)}{inside}", summary.format, f"{summary.tensors:,}", f"{summary.elements:,}",
        human_bytes(summary.nbytes), _dtype_cell(listed.dtypes),
    )  # fmt: skip


def _dtype_cell(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    shown = [f"{dtype} ×{count:,}" for dtype, count in list(dtypes.items())[:_MOST_DTYPES]]
    return ", ".join(shown) + (f", {len(dtypes) - _MOST_DTYPES} more" if len(dtypes) > _MOST_DTYPES else "")


def _scheme_cell(schemes: Mapping[str, int]) -> str:
    return ", ".join(f"{scheme} ×{count:,}" for scheme, count in schemes.items())


def _totals(listed: Iterable[ListedCheckpoint]) -> dict[str, int]:
    rows = list(listed)
    return {
        "checkpoints": len(rows),
        "unreadable": sum(row.error is not None for row in rows),
        "tensors": sum(row.summary.tensors for row in rows),
        "elements": sum(row.summary.elements for row in rows),
        "bytes": sum(row.summary.nbytes for row in rows),
    }


def listing_document(listed: Sequence[ListedCheckpoint]) -> dict[str, object]:
    """Return the document of ``ckpt show --json`` for several paths."""
    return {
        "schema": "ckptkit.show-list/1",
        "checkpoints": [
            {
                "path": row.path,
                "format": row.summary.format or None,
                "envelope": row.summary.envelope or None,
                "tensors": row.summary.tensors,
                "elements": row.summary.elements,
                "bytes": row.summary.nbytes,
                "dtypes": dict(row.dtypes),
                "quantized": dict(row.quantized),
                "error": None if row.error is None else row.error.reason,
            }
            for row in listed
        ],
        "summary": _totals(listed),
    }
