"""The size of each section of a checkpoint by dtype, as stacked bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import human_bytes, percent, plural, printable
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.sections import sections_of
from ckptkit.render.pictures.style import SERIES
from ckptkit.render.pictures.svg import SMALL, WIDTH, Box, Drawing, Swatch, short

__all__ = ["sizes_picture"]

_NAMES: Final = 150  # width of the names
_NUMBERS: Final = 62
_ROW: Final = 22
_BAR: Final = 14


def sizes_picture(infos: Iterable[TensorInfo], title: str = "Size by section and dtype") -> Picture | None:
    """Return the bytes of each section by dtype; None without bytes."""
    by_key = {info.key: info for info in infos if info.nbytes}
    if not by_key:
        return None
    sections = sections_of({key: info.nbytes for key, info in by_key.items()})
    rows = [(name, _by_dtype(by_key[key] for key in keys), len(keys)) for name, keys in sections]
    totals = sum((dtypes for _, dtypes, _ in rows), Counter[str]())
    order = [dtype for dtype, _ in totals.most_common()]
    look = {dtype: SERIES[min(at, len(SERIES) - 1)] for at, dtype in enumerate(order)}
    whole, most = totals.total(), max(dtypes.total() for _, dtypes, _ in rows)
    drawing = Drawing()
    drawing.legend([Swatch(look[dtype], f"{printable(dtype)} {human_bytes(totals[dtype])}") for dtype in order], 0)
    top = drawing.height + 8
    words = []
    labels = short([name for name, _, _ in rows], _NAMES - 8)
    for at, ((name, dtypes, count), label) in enumerate(zip(rows, labels, strict=True)):
        y, shown, size = top + at * _ROW, printable(name), human_bytes(dtypes.total())
        words.append(f"{shown} {size} ({percent(dtypes.total() / whole)})")
        drawing.text(_NAMES - 8, y + 11, label, anchor="end", tip=f"{shown}: {size} in {plural(count, 'tensor')}")
        x = float(_NAMES)
        for dtype in order:
            width = dtypes[dtype] / most * (WIDTH - _NAMES - _NUMBERS)
            if width:
                tip = f"{shown}, {printable(dtype)}: {human_bytes(dtypes[dtype])}"
                drawing.rect(Box(x, y, max(width, 1), _BAR), look[dtype], tip, radius=1)
            x += width
        drawing.text(max(x, _NAMES + 1) + 5, y + 11, size, size=SMALL, faint=True)
    kinds = ", ".join(f"{printable(dtype)} {human_bytes(totals[dtype])}" for dtype in order)
    description = f"{human_bytes(whole)} in all. By section: {', '.join(words)}. By dtype: {kinds}."
    return drawing.picture("sizes", title, description)


def _by_dtype(infos: Iterable[TensorInfo]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for info in infos:
        sizes[info.dtype] += info.nbytes
    return sizes
