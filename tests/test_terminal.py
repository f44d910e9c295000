"""Pages in terminals of any width, in pipes, and as tab-separated values."""

from __future__ import annotations

import csv
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.core.text import printable
from ckptkit.render.page import Line, Table, as_text, as_tsv
from ckptkit.render.page.display import shortened
from ckptkit.render.page.width import fitted

SEGMENT = st.sampled_from(["encoder", "layers", "0", "11", "{0..11}", "self_attn", "q_proj", "weight", "権重", "é"])
NAME = st.lists(SEGMENT, min_size=1, max_size=9).map(".".join) | st.text(max_size=30)
CELL = NAME | st.lists(NAME, max_size=6).map(" ".join) | NAME.map(lambda name: f"{name} ×12")


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Return a table of names, sentences and numbers, some columns of which are aligned to the right."""
    headers = draw(st.lists(st.sampled_from(["key", "", "shape", "bytes", "because", "from"]), min_size=1, unique=True))
    row = st.tuples(*[CELL.map(printable) if header != "bytes" else st.just("1.0 kB") for header in headers])
    chosen = st.lists(st.sampled_from(headers), unique=True)
    return Table(
        tuple(headers),
        tuple(draw(st.lists(row, max_size=6))),
        right=frozenset({"bytes"}),
        gives_way=tuple(draw(chosen)),
    )


def columns_of(text: str) -> int:
    """Return the columns of a terminal that a text takes, by the properties of its characters in Unicode."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    marks = sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)
    return len(text) + wide - marks


@given(tables(), st.integers(16, 120))
def test_no_row_of_a_table_is_wider_than_the_terminal(table: Table, width: int) -> None:
    """A row has one line, and a note says that something was left out exactly where that is so."""
    lines = list(as_text(fitted([table], width)))
    whole = list(as_text([table]))
    assert max(map(columns_of, lines), default=0) <= width
    if any(columns_of(line) > width for line in whole):
        assert "--wide" in " ".join(lines)
        assert lines[1 + len(table.rows)] == ""
    else:
        assert "--wide" not in " ".join(lines)


@given(tables())
def test_tab_separated_values_are_what_csv_reads(table: Table) -> None:
    """The rows of the first table come back whole, whatever their cells have; nothing else of the page is printed."""
    rows = list(csv.reader(as_tsv([Line(("title",)), table, table]), "excel-tab"))
    assert rows == [list(table.headers), *([cell.strip() for cell in row] for row in table.rows)]


@pytest.mark.parametrize("size", [24, 16, 12])
def test_names_stay_different(size: int) -> None:
    """Names that differ anywhere differ after they are shortened, and keep the ends of the names where these differ."""
    roles = ("q_proj.weight", "k_proj.weight", "v_proj.bias")
    names = [f"encoder.transformer.layers.{layer}.self_attn.{role}" for layer in range(12) for role in roles]
    short = shortened(names, size)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= size
    assert shortened(["encoder.layers.{0..11}.blocks.self_attn.weight ×12"], 36) == [
        "encoder.layers…self_attn.weight ×12"
    ]
