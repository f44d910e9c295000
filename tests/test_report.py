"""Results as text: joined rows spell exactly the keys that they stand for."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptkit
from ckptkit.core.checkpoint import Access, Checkpoint, Description, TensorInfo
from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.render.findings import finding_lines
from ckptkit.render.page import Code, Line, Page, Table, as_text, join_rows, name_beside
from ckptkit.render.page.html import as_html
from ckptkit.render.show import show_page


def _spelled(cell: str) -> list[str]:
    """Return the keys that the text of a joined key stands for."""
    text, _, count = cell.partition(" ×")
    parts = []
    tokens = re.split(r"(\{[^}]*\})", text)
    for token in tokens:
        if token.startswith("{"):
            values: list[str] = []
            for piece in token[1:-1].split(","):
                first, _, last = piece.partition("..")
                values += map(str, range(int(first), int(last or first) + 1))
            parts.append(values)
        else:
            parts.append([token])
    keys = ["".join(choice) for choice in itertools.product(*parts)]
    assert len(keys) == int(count or 1)
    return keys


_keys = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "1", "2", "5", "10", "012", ""]), min_size=1, max_size=4).map(".".join),
    unique=True,
    max_size=60,
)


@given(_keys, st.integers(1, 3))
def test_joined_rows_stand_for_exactly_their_keys(keys: list[str], kinds: int) -> None:
    """Joined rows spell no other keys, lose no key, and never join different cells."""
    rows = [(key, (f"F32 [{sum(map(ord, key)) % kinds}]",)) for key in keys]
    found = [(key, cell) for joined, cell in join_rows(rows) for key in _spelled(joined)]
    assert sorted(found) == sorted((key, *cells) for key, cells in rows)


@given(_keys)
def test_joined_rows_spell_the_other_names_beside_their_keys(keys: list[str]) -> None:
    """The name in another column is spelled with the key, index by index, and belongs to it."""
    others = {key: f"net.{key.replace('a', 'h')}" if number % 5 else "b" for number, key in enumerate(keys)}
    rows = [(key, (f"from {name_beside(key, others[key])}",)) for key in keys]
    found: dict[str, str] = {}
    for joined, cell in join_rows(rows):
        _, _, count = joined.partition(" ×")
        names = _spelled(cell + f" ×{count}" * bool(count and "{" in cell))
        found |= zip(_spelled(joined), names * (int(count or 1) if len(names) == 1 else 1), strict=True)
    assert found == {key: f"from {name}" for key, name in others.items()}


def test_missing_indices_are_shown() -> None:
    """A missing index is left out of the range; several indices are joined only if all combinations exist."""
    keys = [f"layers.{i}.w" for i in (0, 1, 2, 3, 7)] + ["e.0.x.0", "e.1.x.1"]
    assert join_rows((key, ()) for key in keys) == [("layers.{0..3,7}.w ×5",), ("e.0.x.0",), ("e.1.x.1",)]


def test_names_that_look_like_numbers_stay_names() -> None:
    """``0012`` is not an index, and a table prints cells unchanged."""
    rows = [("0012", ("1e5",)), ("0013", ("1e5",))]
    assert join_rows(rows) == [("0012", "1e5"), ("0013", "1e5")]
    assert list(as_text([Table(("key", "x"), tuple(join_rows(rows)))])) == ["key    x", "0012   1e5", "0013   1e5"]


@pytest.mark.parametrize("key", ["." * 20_000, ".".join("0" * 8_000), ".".join("a" * 8_000)], ids=["dots", "0s", "as"])
def test_a_key_of_thousands_of_segments(key: str) -> None:
    """The work and the output grow with the length of the key only; deep segments are printed on one line."""
    info = TensorInfo(key, "F32", (1,))
    checkpoint = Checkpoint(
        {key: info}, Access(lambda _: pytest.fail("it is read")), Description("x.pt", "safetensors")
    )
    tree = list(as_text(show_page(checkpoint, tree=True)))
    assert sum(map(len, tree)) < 20_000
    assert tree[-1].startswith("  " * 64)
    (row,) = list(as_text(show_page(checkpoint)))[3:]
    assert len(row) < 500
    assert "more characters>" in row
    assert "F32" in row


def test_digits_that_torch_does_not_write_are_not_an_index() -> None:
    """``1\u0663`` is 13 for ``int``, but torch does not write it."""
    assert join_rows([("a.1\u0663", ()), ("a.14", ())]) == [("a.1\u0663",), ("a.14",)]


def test_html_is_escaped_and_bounded() -> None:
    """Names are text in a notebook, an indented line stays indented, and a table has at most 500 rows."""
    rows = (('"><script>', "1"),) * 600
    page: Page = [
        Line(("of ", Code("<img src=x onerror=1>"))),
        Line((Code("a & b"),), indented=True),
        Table(("a", "b"), rows),
        Table(("no", "rows"), ()),
    ]
    html = as_html(page)
    assert "<img" not in html
    assert "<script" not in html
    assert "<p>of <code>&lt;img src=x onerror=1&gt;</code><br>  <code>a &amp; b</code></p>" in html
    assert html.count("<tr>") == 501
    assert html.endswith("<p>and 100 rows more</p></div>")


def test_findings_that_say_the_same_share_a_line() -> None:
    """A forgotten encoder takes a line for each kind of parameter, and one hint; the findings are complete."""
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(12))
    head = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"layers": layers, "head": head, "odd'name": torch.nn.Linear(2, 3)})
    report = ckptkit.validate_param_groups(model, torch.optim.SGD(head.parameters(), lr=0.1))
    lines = str(report).splitlines()
    assert [line.partition(" is trainable")[0] for line in lines] == [
        "error: 'layers.{0..11}.weight' ×12 (2, 2)",
        "error: 'layers.{0..11}.bias' ×12 (2,)",
        """error: "odd'name.weight" (3, 2)""",
        """error: "odd'name.bias" (3,)""",
        lines[4],
        "26 errors",
    ]
    assert (lines[4][:2], len(report.findings)) == ("  ", 26)
    odd = [Finding("x.y", "note", key, f"{quoted(key)} is odd") for key in ("5", "w ×2.weight")]
    assert list(as_text(list(finding_lines(odd)))) == [f"note: {quoted(one.key)} is odd  [x.y]" for one in odd]
    names = [f"{name}.{number}.w" for name in "abcdefgh" for number in range(2)]
    findings = [Finding("x.y", "error", key, f"{quoted(key)} is bad", "mend it") for key in names]
    more = ", ".join(f"'{name}.{{0,1}}.w' ×2" for name in "bcdef")
    assert list(as_text(list(finding_lines(findings)))) == [
        "error: 'a.{0,1}.w' ×2 is bad  [x.y]",
        f"  the same for 14 more: {more} and 4 more",
        "  mend it",
    ]


@pytest.mark.parametrize("message", ["{} is bad", "no value for {}", "{}", "{} and {}", "nothing said of it"])
def test_lines_of_findings_name_each_key(message: str) -> None:
    """Joined or not, the lines stand for each finding exactly once, wherever its message names the key."""
    keys = ["a.0.w", "a.1.w", "b", "it's"]
    findings = [Finding("x.y", "error", key, message.format(*[quoted(key)] * 2)) for key in keys]
    lines = [text.removeprefix("error: ").removesuffix("  [x.y]") for text in as_text(list(finding_lines(findings)))]
    if message.count("{}") != 1:
        assert lines == [finding.message for finding in findings]
    else:
        assert lines == [
            message.format("'a.{0,1}.w' ×2"),
            *(finding.message for finding in findings[2:]),
        ]
