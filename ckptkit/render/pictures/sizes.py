"""The size of each section of a checkpoint by dtype, as stacked bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import human_bytes, listed, percent, plural, printable
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.sections import sections_of
from ckptkit.render.pictures.style import SERIES
from ckptkit.render.pictures.svg import SMALL, WIDTH, Box, Drawing, short

__all__ = ["sizes_picture"]

_LABELS = 150  # width of the names
_NUMBERS = 66
_ROW = 22
_BAR = 14


def sizes_picture(infos: Iterable[TensorInfo], title: str = "Size by section and dtype") -> Picture | None:
    """Return the bytes of each section by dtype; None without bytes."""
    by_key = {info.key: info for info in infos if info.nbytes}
    if not by_key:
        return None
    sections = sections_of({key: info.nbytes for key, info in by_key.items()})
    rows = [(name, _by_dtype(by_key[key] for key in keys), len(keys)) for name, keys in sections]
    totals: Counter[str] = Counter()
    for _, dtypes, _ in rows:
        totals.update(dtypes)
    order = [dtype for dtype, _ in totals.most_common()]
    colour = {dtype: SERIES[min(at, len(SERIES) - 1)] for at, dtype in enumerate(order)}
    whole, most = totals.total(), max(dtypes.total() for _, dtypes, _ in rows)
    drawing = Drawing()
    _legend(drawing, [(colour[dtype], f"{printable(dtype)}  {human_bytes(totals[dtype])}") for dtype in order])
    top = drawing.height + 10
    labels = short([name or "others" for name, _, _ in rows], _LABELS - 8)
    for at, ((name, dtypes, count), label) in enumerate(zip(rows, labels, strict=True)):
        y = top + at * _ROW
        tip = f"{printable(name) or 'others'}: {human_bytes(dtypes.total())} in {plural(count, 'tensor')}"
        drawing.text(_LABELS - 8, y + 11, label, anchor="end", tip=tip)
        x, room = float(_LABELS), WIDTH - _LABELS - _NUMBERS
        for dtype in order:
            width = dtypes[dtype] / most * room
            if width:
                part = f"{printable(name) or 'others'}, {printable(dtype)}: {human_bytes(dtypes[dtype])}"
                drawing.rect(Box(x, y, max(width, 1), _BAR), colour[dtype], part, radius=1.5)
            x += width
        drawing.text(x + 6, y + 11, human_bytes(dtypes.total()), size=SMALL, faint=True)
    words = [
        f"{printable(name) or 'others'} {human_bytes(dtypes.total())} ({percent(dtypes.total() / whole)})"
        for name, dtypes, _ in rows
    ]
    kinds = listed([f"{printable(dtype)} {human_bytes(totals[dtype])}" for dtype in order], len(order), show=str)
    description = f"{human_bytes(whole)} in all. By section: {', '.join(words)}. By dtype: {kinds}."
    return drawing.picture("sizes", title, description)


def _by_dtype(infos: Iterable[TensorInfo]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for info in infos:
        sizes[info.dtype] += info.nbytes
    return sizes


def _legend(drawing: Drawing, items: Iterable[tuple[str, str]]) -> None:
    x, y = 0.0, 0.0
    for fill, text in items:
        width = 22 + len(text) * SMALL * 0.56
        if x and x + width > WIDTH:
            x, y = 0.0, y + 18
        drawing.rect(Box(x, y + 1, 11, 11), fill, radius=2)
        drawing.text(x + 16, y + 10.5, text, size=SMALL)
        x += width
