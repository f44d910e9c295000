"""What a patch holds as a page and as a JSON document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import human_bytes, listed, percent, plural, printable
from ckptkit.deltas.delta import STATES, Delta, DeltaSide, TensorDelta
from ckptkit.render.page import Block, Line, Message, Page, Table, as_code, name_beside, table_rows
from ckptkit.render.summary import share_cell, tensor_document

__all__ = ["delta_document", "delta_page"]

_MOST_ROWS = 20  # of tensors with the most packed bytes; --expand lists all
_MOST_NAMED = 8


def delta_page(delta: Delta, *, expand: bool = False) -> Page:
    """Return the page of ``ckpt delta``: both sides, what changed, the tensors with the most packed bytes, the size."""
    page: list[Block] = [
        Line(("base   ", *_side(delta.base))),
        Line(("new    ", *_side(delta.new))),
        _tensors(delta, expand=expand),
        _by_dtype(delta),
    ]
    page += [Line((sentence,)) for sentence in _sentences(delta, expand=expand)]
    return [*page, *(Line((Message(note),)) for note in delta.notes)]


def _side(side: DeltaSide) -> tuple[str, ...]:
    name = (as_code(side.name), ": ") if side.name else ()
    counts = f"{plural(side.tensors, 'tensor')}, {plural(side.elements, 'element')}, {human_bytes(side.nbytes)}, "
    return (*name, counts, as_code(side.contents))


def _tensors(delta: Delta, *, expand: bool) -> Table:
    """Return the table of what the patch has packed bytes of, or had to be told of; equal tensors have no row."""
    told = [tensor for tensor in delta.tensors if tensor.state != "equal"]
    told.sort(key=lambda tensor: -tensor.packed)
    shown = told if expand else told[:_MOST_ROWS]
    rows = [(tensor.info.key, _cells(tensor, delta)) for tensor in shown]
    headers = ("key", "tensor", "state", "packed", "of its bytes", "of the patch")
    right = frozenset(headers[3:])
    return Table(headers, tuple(table_rows(rows, expand=expand)), right, gives_way=("of the patch", "tensor"))


def _cells(tensor: TensorDelta, delta: Delta) -> tuple[str, ...]:
    key, state = tensor.info.key, str(tensor.state)
    if tensor.was is not None:
        state = f"was {tensor.was}"
    if tensor.state == "renamed" and not tensor.tied_to:
        state = f"was {name_beside(key, tensor.base_key)}"
    if tensor.tied_to:
        return str(tensor.info), f"tied to {name_beside(key, tensor.tied_to)}", "", "", ""
    if not tensor.packed:
        return str(tensor.info), state, "", "", ""
    packed, nbytes = tensor.packed, tensor.info.nbytes
    return str(tensor.info), state, human_bytes(packed), share_cell(packed, nbytes), share_cell(packed, delta.nbytes)


def _by_dtype(delta: Delta) -> Table:
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * 4)
    for tensor in delta.tensors:
        row = sums[tensor.info.dtype]
        is_packed = bool(tensor.packed)
        for at, count in enumerate((1, is_packed, tensor.info.nbytes, tensor.packed)):
            row[at] += count
    rows = [
        (
            printable(dtype),
            f"{tensors:,}",
            f"{packed:,}",
            human_bytes(nbytes),
            human_bytes(size),
            share_cell(size, nbytes),
        )
        for dtype, (tensors, packed, nbytes, size) in sums.items()
    ]
    headers = ("dtype", "tensors", "packed", "bytes", "in the patch", "share")
    return Table(headers, tuple(rows), frozenset(headers[1:]))


def _sentences(delta: Delta, *, expand: bool) -> Iterator[str]:
    counts = delta.counts
    told = len(delta.tensors) - counts["equal"]
    if told > _MOST_ROWS and not expand:
        yield f"{_MOST_ROWS:,} of {plural(told, 'tensor')} listed"
    named = ", ".join(
        f"{counts[state]:,} {state}" for state in STATES if counts[state] or state in ("equal", "changed")
    )
    yield f"{named}, {len(delta.dropped):,} dropped"
    if delta.dropped:
        yield f"dropped: {listed([info.key for info in delta.dropped], _MOST_NAMED, show=printable)}"
    if delta.left_out:
        yield f"left out, because a patch holds only tensors: {listed(delta.left_out, _MOST_NAMED, show=printable)}"
    whole = f"{percent(delta.share)} of the {human_bytes(delta.new.nbytes)} of new"
    size = f"{human_bytes(delta.nbytes)} ({delta.compression}), {whole}"
    yield f"the patch has {size}" if delta.path else f"the patch would have {size}; nothing was written"


def delta_document(delta: Delta) -> dict[str, object]:
    """Return the document of ``ckpt delta --json``."""
    return {
        "schema": "ckptkit.delta/1",
        "base": _side_document(delta.base),
        "new": _side_document(delta.new),
        "tensors": [
            {
                **tensor_document(tensor.info),
                "state": tensor.state,
                "base_key": None if tensor.state == "new" else tensor.base_key,
                "was": None if tensor.was is None else {"dtype": tensor.was.dtype, "shape": list(tensor.was.shape)},
                "tied_to": tensor.tied_to or None,
                "bytes": tensor.info.nbytes,
                "packed_bytes": tensor.packed,
            }
            for tensor in delta.tensors
        ],
        "dropped": [_dropped_document(info) for info in delta.dropped],
        "left_out": list(delta.left_out),
        "metadata": dict(delta.metadata),
        "notes": list(delta.notes),
        "summary": {
            **{str(state): count for state, count in delta.counts.items()},
            "dropped": len(delta.dropped),
            "share": delta.share,
        },
        "patch": {
            "path": delta.path or None,
            "bytes": delta.nbytes,
            "compression": delta.compression,
            "library": delta.library,
        },
    }


def _dropped_document(info: TensorInfo) -> dict[str, object]:
    return {**tensor_document(info), "bytes": info.nbytes}


def _side_document(side: DeltaSide) -> dict[str, object]:
    return {
        "name": side.name or None,
        "tensors": side.tensors,
        "elements": side.elements,
        "bytes": side.nbytes,
        "contents": side.contents,
    }
