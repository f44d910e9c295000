"""The size of each section of a checkpoint by dtype, as stacked bars; of one checkpoint, or of two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import human_bytes, percent, plural, printable
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.sections import sections_of
from ckptkit.render.pictures.style import SERIES
from ckptkit.render.pictures.svg import SMALL, WIDTH, Box, Drawing, Swatch, short

__all__ = ["sizes_picture"]

_NAMES: Final = 140  # width of the names
_NUMBERS: Final = 62
_NUMBERS_OF_TWO: Final = 122  # with the name of the side
_ROW: Final = 22
_BAR: Final = 14
_ROW_OF_TWO: Final = 34
_BAR_OF_TWO: Final = 11
_Sizes = Counter[str]  # bytes by dtype


class _Row(NamedTuple):
    """The sizes of a section on each side, and its number of tensors."""

    name: str
    sides: tuple[_Sizes, ...]
    tensors: int


def sizes_picture(sides: Sequence[tuple[str, Iterable[TensorInfo]]]) -> Picture | None:
    """Return the bytes of each section by dtype, for one side or for two with their names; None without bytes.

    Two sides with equal sizes are drawn once.
    """
    names = [name for name, _ in sides]
    by_key = [{info.key: info for info in infos if info.nbytes} for _, infos in sides]
    weights = {key: float(info.nbytes) for infos in by_key for key, info in infos.items()}
    if not weights:
        return None
    rows = [
        _Row(name, tuple(_by_dtype(infos, keys) for infos in by_key), len(keys)) for name, keys in sections_of(weights)
    ]
    if all(side == row.sides[0] for row in rows for side in row.sides):
        names, rows = [""], [row._replace(sides=row.sides[:1]) for row in rows]
    totals = [sum((row.sides[at] for row in rows), _Sizes()) for at in range(len(names))]
    order = [dtype for dtype, _ in sum(totals, _Sizes()).most_common()]
    look = {dtype: SERIES[min(at, len(SERIES) - 1)] for at, dtype in enumerate(order)}
    drawing = Drawing()
    drawing.legend([Swatch(look[dtype], _of_all(dtype, totals)) for dtype in order], 0)
    _draw(drawing, rows, names, look)
    sentences = [_sentence(name, whole) for name, whole in zip(names, totals, strict=True)]
    details = [_section_sentence(row, names, totals) for row in rows]
    return drawing.picture("sizes", "Size by section and dtype", " ".join(sentences), " ".join(details))


def _by_dtype(infos: dict[str, TensorInfo], keys: Iterable[str]) -> _Sizes:
    sizes = _Sizes()
    for key in keys:
        if key in infos:
            sizes[infos[key].dtype] += infos[key].nbytes
    return sizes


def _draw(drawing: Drawing, rows: Sequence[_Row], names: Sequence[str], look: dict[str, str]) -> None:
    top = drawing.height + 8
    height, bar = (_ROW, _BAR) if len(names) == 1 else (_ROW_OF_TWO, _BAR_OF_TWO)
    room = WIDTH - _NAMES - (_NUMBERS if len(names) == 1 else _NUMBERS_OF_TWO)
    scale = room / max(side.total() for row in rows for side in row.sides)
    for at, (row, label) in enumerate(zip(rows, short([row.name for row in rows], _NAMES - 8), strict=True)):
        shown, y = printable(row.name), top + at * height
        middle = y + (bar + 1) * len(names) / 2 + 4
        drawing.text(_NAMES - 8, middle, label, anchor="end", tip=f"{shown}: {plural(row.tensors, 'tensor')}")
        for number, (name, sizes) in enumerate(zip(names, row.sides, strict=True)):
            x, side_y = float(_NAMES), y + number * (bar + 1)
            for dtype, colour in look.items():
                width = sizes[dtype] * scale
                if width:
                    tip = f"{name} {shown}, {printable(dtype)}: {human_bytes(sizes[dtype])}".strip()
                    drawing.rect(Box(x, side_y, max(width, 1), bar), colour, tip, radius=1)
                x += width
            text = f"{human_bytes(sizes.total())} {name}".strip()
            drawing.text(max(x, _NAMES + 1) + 5, side_y + bar - 2, text, size=SMALL, faint=True)


def _of_all(dtype: str, totals: Sequence[_Sizes]) -> str:
    sizes = " → ".join(human_bytes(whole[dtype]) for whole in totals)
    return f"{printable(dtype)} {sizes}"


def _sentence(name: str, sizes: _Sizes) -> str:
    kinds = ", ".join(f"{printable(dtype)} {human_bytes(nbytes)}" for dtype, nbytes in sizes.most_common())
    beginning = f"{name}: " if name else ""
    return f"{beginning}{human_bytes(sizes.total())} in all" + (
        f", of which {kinds}." if len(sizes) > 1 else f", {kinds}."
    )


def _section_sentence(row: _Row, names: Sequence[str], totals: Sequence[_Sizes]) -> str:
    parts = [
        f"{name} {human_bytes(sizes.total())} ({percent(sizes.total() / (whole.total() or 1))})".strip()
        for name, sizes, whole in zip(names, row.sides, totals, strict=True)
    ]
    return f"{printable(row.name)}: {', '.join(parts)}."
