"""Which share of the expected elements was found, as bars: of the whole, and of each section."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from ckptkit.core.text import percent, plural, printable
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.sections import WHOLE, numbered, range_name
from ckptkit.render.pictures.svg import SMALL, WIDTH, Box, Drawing, Swatch, short

__all__ = ["Part", "ShareRow", "shares_picture"]

_NAMES: Final = 124
_SHARE: Final = 52
_COUNT: Final = 84
_BARS: Final = WIDTH - _NAMES - _SHARE - _COUNT
_ROW: Final = 22
_BAR: Final = 14
_THIN: Final = 3.5


class Part(NamedTuple):
    """What may be said of elements, such as ``missing``, and its colour or mark."""

    text: str
    look: str


class ShareRow(NamedTuple):
    """The number of elements of a section for each part; ``more`` are beside the whole of the section."""

    name: str
    elements: tuple[int, ...]
    more: int = 0


def shares_picture(
    kind: str, title: str, parts: Sequence[Part], rows: Sequence[ShareRow], more: Part | None = None
) -> Picture | None:
    """Return a bar for each row and one for all, divided into ``parts``; the number beside it is the first share.

    A thin bar below has the elements that are ``more``, in the same scale. None without elements.
    """
    elements = tuple(map(sum, zip(*(row.elements for row in rows), strict=True)))
    whole = ShareRow(WHOLE, elements, sum(row.more for row in rows))
    if not sum(elements) and not whole.more:
        return None
    rows = _joined(rows)
    drawing = Drawing()
    drawing.legend(_swatches(whole, parts, more), 0)
    y = drawing.height + 8
    shown = [whole, *(rows if len(rows) > 1 else ())]
    labels = [WHOLE, *short([row.name for row in shown[1:]], _NAMES - 8)]
    for row, label in zip(shown, labels, strict=True):
        count, is_whole = sum(row.elements), row is whole
        drawing.text(_NAMES - 8, y + 11, label, anchor="end", bold=is_whole, tip=_sentence(row, parts, more))
        _draw_bars(drawing, row, parts, more, y)
        if count:
            share = percent(row.elements[0] / count)
            drawing.text(_NAMES + _BARS + _SHARE, y + 11, share, anchor="end", bold=is_whole)
        text = f"{count:,}" if count else f"+{row.more:,}"
        drawing.text(WIDTH, y + 11, text, anchor="end", size=SMALL, faint=True)
        y += _ROW + 8 * is_whole
    first, *others = (f"{_sentence(row, parts, more)}." for row in shown)
    return drawing.picture(kind, title, f"{first[0].upper()}{first[1:]}", " ".join(others))


def _joined(rows: Iterable[ShareRow]) -> list[ShareRow]:
    """Return the rows with one for layers that follow each other and are wholly of one part."""
    joined: list[tuple[ShareRow, tuple[str, int, int] | None]] = []
    for row in rows:
        layer = numbered(row.name)
        layers = None if layer is None or sum(map(bool, row.elements)) != 1 or row.more else (*layer, layer[1])
        before, others = joined[-1] if joined else (row, None)
        is_alike = list(map(bool, row.elements)) == list(map(bool, before.elements))
        if layers and others and is_alike and (layers[0], layers[1] - 1) == (others[0], others[2]):
            together = tuple(map(sum, zip(before.elements, row.elements, strict=True)))
            joined[-1] = ShareRow("", together), (others[0], others[1], layers[1])
        else:
            joined.append((row, layers))
    return [row if row.name or layers is None else row._replace(name=range_name(*layers)) for row, layers in joined]


def _swatches(whole: ShareRow, parts: Sequence[Part], more: Part | None) -> Iterator[Swatch]:
    for part, count in zip(parts, whole.elements, strict=True):
        if count:
            yield Swatch(part.look, f"{part.text} {percent(count / sum(whole.elements))}")
    if more is not None and whole.more:
        yield Swatch(more.look, f"{more.text} {whole.more:,}")


def _draw_bars(drawing: Drawing, row: ShareRow, parts: Sequence[Part], more: Part | None, y: float) -> None:
    count, x = sum(row.elements), float(_NAMES)
    for part, elements in zip(parts, row.elements, strict=True):
        width = elements / count * _BARS if elements else 0.0
        if width:
            tip = f"{printable(row.name)}: {part.text} {plural(elements, 'element')}, {percent(elements / count)}"
            drawing.cell(part.look, Box(x, y, max(width, 1), _BAR), tip)
        x += width
    if more is not None and row.more:
        width = min(row.more / count, 1) * _BARS if count else _BARS
        tip = f"{printable(row.name)}: {more.text} {plural(row.more, 'element')}"
        top = y + _BAR + 1.5 if count else y + (_BAR - _THIN) / 2
        drawing.cell(more.look, Box(_NAMES, top, max(width, 1), _THIN), tip)


def _sentence(row: ShareRow, parts: Sequence[Part], more: Part | None) -> str:
    count = sum(row.elements)
    shares = [f"{part.text} {percent(some / count)}" for part, some in zip(parts, row.elements, strict=True) if some]
    texts = [f"{', '.join(shares)} of {plural(count, 'element')}"] if count else []
    texts += [f"{more.text} {plural(row.more, 'element')}"] if more is not None and row.more else []
    return f"{printable(row.name)}: {', '.join(texts)}"
