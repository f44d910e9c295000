"""The content of a checkpoint as a page, as a tree and as a JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint, Entry, TensorInfo
from ckptkit.core.checkpoint.provenance import PROVENANCE
from ckptkit.core.result.summary import CheckpointSummary, totals
from ckptkit.core.text import human_bytes, plural, printable
from ckptkit.core.ties import shared_keys
from ckptkit.quantized import quantized_weights
from ckptkit.render.page import Block, Line, Listing, Page, Table, name_beside, table_rows
from ckptkit.render.page.head import Fact, Head, Subject
from ckptkit.render.summary import describe, quantized_document, quantized_lines, totals_document, value_cell

if TYPE_CHECKING:
    from ckptkit.deltas.delta import Delta

__all__ = ["show_document", "show_page"]

_MOST_PARTS = 40
_DIGITS = 16  # of a digest that a page has
_DEEPEST = 64  # a name can be all dots; segments below this depth are printed on one line


def show_document(
    checkpoint: Checkpoint,
    *,
    infos: Mapping[str, TensorInfo] | None = None,
    digests: Mapping[str, str] | None = None,
    merge: Mapping[str, object] | None = None,
    delta: Delta | None = None,
) -> dict[str, object]:
    """Return the document of ``ckpt show --json`` for the chosen tensors of a checkpoint, by default all.

    ``merge`` is what a file beside the checkpoint says about its merge, and ``delta`` what a patch holds.
    """
    recorded = _recorded(checkpoint, merge)
    infos = checkpoint if infos is None else infos
    shared = shared_keys(checkpoint)
    return {
        "schema": "ckptkit.show/1",
        "path": checkpoint.path,
        "format": checkpoint.format,
        "tensors": [
            {
                "key": info.key,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "elements": info.elements,
                "bytes": info.nbytes,
                "shared_with": list(shared.get(info.key, ())),
                "digest": (digests or {}).get(info.key),
            }
            for info in infos.values()
        ],
        "quantized": quantized_document(quantized_weights(checkpoint), infos),
        "entries": [
            {"path": entry.path, "type": entry.type, "value": entry.value, "beside": entry.is_outside}
            for entry in checkpoint.entries
        ],
        "metadata": dict(checkpoint.metadata),
        "merge": None if recorded is None else dict(recorded),
        "delta": None if delta is None else delta.to_dict(),
        "warnings": list(checkpoint.warnings),
        "summary": totals_document(CheckpointSummary.of(checkpoint, infos.values())),
    }


def show_head(checkpoint: Checkpoint) -> Head:
    """Return the head of a report: the path, and the numbers of tensors, elements and bytes."""
    summary = CheckpointSummary.of(checkpoint)
    facts = (
        Fact(f"{summary.tensors:,}", "tensors"),
        Fact(f"{summary.elements:,}", "elements"),
        Fact(human_bytes(summary.nbytes), "in tensors"),
    )
    title = Line(describe(summary))
    return Head(
        "ckpt show", Line((f"{summary.format}, {plural(summary.tensors, 'tensor')}",)), (Subject("", title),), facts
    )


def show_page(
    checkpoint: Checkpoint,
    *,
    infos: Mapping[str, TensorInfo] | None = None,
    digests: Mapping[str, str] | None = None,
    merge: Mapping[str, object] | None = None,
    delta: Delta | None = None,
    tree: bool = False,
    expand: bool = False,
) -> Page:
    """Return the page of ``ckpt show``: the chosen tensors, the totals, then all other entries of the file.

    Without ``infos``, all tensors are listed. With ``tree``, they are listed as a tree of modules. With ``digests`` by
    key, each tensor has the first digits of its digest. ``merge`` is what a file beside the checkpoint says about its
    merge. The page of a patch says what it holds, ``delta``, and lists none of its own tensors.
    """
    if delta is not None:
        from ckptkit.render.delta import delta_page

        title = Line((*describe(CheckpointSummary.of(checkpoint)), "; a patch, whose tensors are not weights"))
        return [title, *delta_page(delta, expand=expand)]
    infos = checkpoint if infos is None else infos
    recorded = _recorded(checkpoint, merge)
    if tree:
        return _tree_page(checkpoint, infos, digests, recorded)
    shared = shared_keys(checkpoint)
    has_ties = not shared.keys().isdisjoint(infos)
    known: dict[tuple[object, ...], tuple[str, ...]] = {}  # most tensors look like many others
    rows = []
    for key, info in infos.items():
        look = (info.dtype, info.shape, info.kind, info.stored_bytes)
        cells = known.get(look)
        if cells is None:
            dtype = info.dtype if info.kind == "dense" else f"{info.dtype} ({info.kind})"
            cells = known[look] = (dtype, str(list(info.shape)), human_bytes(info.nbytes))
        if digests is not None:
            cells = (*cells, _digest(digests, key))
        rows.append((key, (*cells, _ties(key, shared.get(key, ()))) if has_ties else cells))
    has_digests = digests is not None
    more = [*["sha256"] * has_digests, *(["shares memory with"] if has_ties else [])]
    table = tuple(table_rows(rows, expand=expand))
    size = "bytes" if len(table) == len(rows) else "bytes each"  # where a row stands for several tensors
    headers = ("key", "dtype", "shape", size, *more)
    tensors = (
        Table(headers, table, frozenset({size}), ("shares memory with", size, "dtype", *["shape"] * has_digests))
        if rows
        else Listing(("no tensors",))
    )
    title = Line(describe(CheckpointSummary.of(checkpoint, infos.values())))
    quantized = quantized_lines(quantized_weights(checkpoint), infos)
    return [title, *quantized, tensors, *_totals(infos.values()), *_other_entries(checkpoint, digests, recorded)]


def _digest(digests: Mapping[str, str], key: str) -> str:
    return digests.get(key, "").partition(":")[2][:_DIGITS]


def _ties(key: str, others: Sequence[str]) -> str:
    first = ", ".join(name_beside(key, name) for name in others[:3])
    return first + (f" and {len(others) - 3} more" if len(others) > 3 else "")


def _tree_page(
    checkpoint: Checkpoint,
    infos: Mapping[str, TensorInfo],
    digests: Mapping[str, str] | None,
    recorded: Mapping[str, object] | None,
) -> Page:
    """Return the modules as their names nest them, each with its size."""
    below: dict[tuple[str, ...], list[TensorInfo]] = {}
    for info in infos.values():
        path = tuple(info.key.split(".", _DEEPEST))
        for depth in range(1, len(path)):
            below.setdefault(path[:depth], []).append(info)
    lines = []
    printed: set[tuple[str, ...]] = set()
    for info in infos.values():
        path = tuple(info.key.split(".", _DEEPEST))
        for depth in range(1, len(path)):
            if path[:depth] not in printed:
                printed.add(path[:depth])
                tensors, elements, nbytes = totals(below[path[:depth]])
                what = f"{plural(tensors, 'tensor')}, {plural(elements, 'element')}, {human_bytes(nbytes)}"
                lines.append(f"{'  ' * (depth - 1)}{printable(path[depth - 1])}  ({what})")
        digest = f"  {_digest(digests, info.key)}" if digests else ""
        lines.append(f"{'  ' * (len(path) - 1)}{printable(path[-1])}  {info}{digest}")
    return [
        Line(describe(CheckpointSummary.of(checkpoint, infos.values()))),
        *quantized_lines(quantized_weights(checkpoint), infos),
        Listing(tuple(lines or ["no tensors"])),
        *_other_entries(checkpoint, digests, recorded),
    ]


def _totals(infos: Iterable[TensorInfo]) -> list[Block]:
    """Return the totals by section (the first segment of a key) and by dtype, where there are several."""
    sections: dict[str, list[TensorInfo]] = {}
    dtypes: dict[str, list[TensorInfo]] = {}
    for info in infos:
        sections.setdefault(info.key.partition(".")[0], []).append(info)
        dtypes.setdefault(info.dtype, []).append(info)
    tables: list[Block] = []
    for title, parts in (("section", sections), ("dtype", dtypes)):
        if 1 < len(parts) <= _MOST_PARTS and len(parts) < sum(map(len, parts.values())):
            rows = []
            for name, group in parts.items():
                tensors, elements, nbytes = totals(group)
                rows.append((printable(name), f"{tensors:,}", f"{elements:,}", human_bytes(nbytes)))
            numbers = ("tensors", "elements", "bytes")
            tables.append(Table((f"by {title}", *numbers), tuple(rows), frozenset(numbers), gives_way=("elements",)))
    return tables


def _recorded(checkpoint: Checkpoint, merge: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """Return what the metadata of a checkpoint, or else the file beside it, says about the merge that made it."""
    if PROVENANCE not in checkpoint.metadata:
        return merge
    from ckptkit.render.merging.recorded import recorded_in

    return recorded_in(checkpoint.metadata)


def _other_entries(
    checkpoint: Checkpoint, digests: Mapping[str, str] | None, recorded: Mapping[str, object] | None
) -> list[Block]:
    inside, beside = _sorted_entries(checkpoint)
    metadata = {key: text for key, text in checkpoint.metadata.items() if key != PROVENANCE or recorded is None}
    tables: dict[tuple[str, ...], list[tuple[str, ...]]] = {
        ("also holds", "type", "value"): list(map(_entry_row, inside)),
        (f"beside {printable(checkpoint.envelope)}", "type", "value"): list(map(_entry_row, beside)),
        ("metadata", "value"): [(printable(key), value_cell(text)) for key, text in metadata.items()],
        ("code references, not run",): [(printable(name),) for name in checkpoint.references],
    }
    blocks: list[Block] = [Table(headers, tuple(rows)) for headers, rows in tables.items() if rows]
    if recorded is not None:
        from ckptkit.render.merging.recorded import recorded_blocks

        blocks += recorded_blocks(recorded)
    only_headers = checkpoint.files and digests is None
    return [*blocks, Line(("headers only: no tensor value was read",))] if only_headers else blocks


def _sorted_entries(checkpoint: Checkpoint) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of the selected mapping, and those beside it in the file."""
    beside = [entry for entry in checkpoint.entries if checkpoint.envelope and entry.is_outside]
    inside = [entry for entry in checkpoint.entries if not checkpoint.envelope or not entry.is_outside]
    return inside, beside


def _entry_row(entry: Entry) -> tuple[str, ...]:
    return printable(entry.path), printable(entry.type), _value(entry)


def _value(entry: Entry) -> str:
    if isinstance(entry.value, str):
        return value_cell(entry.value)
    return value_cell(json.dumps(entry.value, ensure_ascii=False))
