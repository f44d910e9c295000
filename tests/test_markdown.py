"""Reports as Markdown: a parser of GitHub's dialect finds the tables and names of the page, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from safetensors.torch import save_file

from ckptkit.core.text import printable
from ckptkit.render.page import Block, Code, Line, Listing, Table, as_code, as_markdown, as_text
from tests.helpers_cli import ROOT, run_ckpt

PARSER = MarkdownIt("gfm-like", {"linkify": False})
PLAIN = {"text", "code_inline", "softbreak"}
ANY = st.text(st.characters(exclude_categories=())) | st.text("`|\\\\<>[]()*_~&; a\n-+#=1.:@", max_size=30)


def _tokens(lines: Iterable[str]) -> list[Token]:
    text = "\n".join(lines)
    tokens = PARSER.parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    assert {token.type for token in inline} <= PLAIN, text
    assert not {token.type for token in tokens} & {"html_block", "heading_open", "hr", "blockquote_open", "code_block"}
    return tokens


def _cells(tokens: list[Token]) -> list[list[str]]:
    """Return the cells of each table row as a reader sees them, headers included."""
    rows: list[list[str]] = []
    for before, token in pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif before.type in ("th_open", "td_open"):
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


@given(st.lists(ANY, min_size=1, max_size=4))
def test_a_table_has_its_rows_and_exact_names(names: list[str]) -> None:
    """Every name is the content of one code span in its own row, for any characters."""
    table = Table(("key", "bytes"), tuple((printable(name), "1.0 kB") for name in names), frozenset({"bytes"}))
    tokens = _tokens(as_markdown([table]))
    assert _cells(tokens) == [["key", "bytes"], *([printable(name), "1.0 kB"] for name in names)]
    spans = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    assert spans == [printable(name) for name in names if name]


@given(ANY, ANY)
def test_lines_quote_names_and_nothing_else(first: str, second: str) -> None:
    """In a line and in an indented line, a name is the content of a code span, and words of ckptkit are text."""
    page = [
        Line((as_code(first), " <is> *not* `that` [x](y) & ", as_code(second))),
        Line((as_code(second),), indented=True),
    ]
    tokens = _tokens(as_markdown(page))
    shown = ["".join(child.content for child in token.children) for token in tokens if token.children]
    assert shown[0] == f"{printable(first)} <is> *not* `that` [x](y) & {printable(second)}".strip()
    assert shown[1:] == ([printable(second)] if second else [])
    assert list(as_text(page))[1] == f"  {printable(second)}"


@given(st.lists(ANY, min_size=1, max_size=4))
def test_a_listing_is_one_block_of_code(names: list[str]) -> None:
    """The lines of a listing are unchanged, with any number of backticks."""
    lines = tuple(f"  {printable(name)}" for name in names)
    (token,) = PARSER.parse("\n".join(as_markdown([Listing(lines)])))
    assert (token.type, token.content) == ("fence", "".join(f"{line}\n" for line in lines))


def test_blocks_are_separated() -> None:
    """Several lines are one list, a single line is a paragraph, and tables and listings are separate blocks."""
    table = Table(("a",), (("1",),))
    page: list[Block] = [
        Line(("one",)),
        table,
        table,
        Line(("two",)),
        Line(("three",)),
        Listing(("x",)),
        Line(("four",)),
    ]
    found = [token.type for token in _tokens(as_markdown(page)) if token.level == 0 and token.nesting >= 0]
    assert found == ["paragraph_open", "table_open", "table_open", "bullet_list_open", "fence", "paragraph_open"]
    assert list(as_text(page)) == ["one", "", "a", "1", "", "a", "1", "", "two", "three", "", "x", "", "four"]


def test_an_empty_code_part_leaves_no_backticks() -> None:
    assert list(as_markdown([Line((Code(""), "x"))])) == ["x"]


MODEL, DDP = "py:fixtures.lenet:build", "fixtures/lenet_ddp.pt"
REPORTS: dict[str, list[str]] = {
    "show": ["show", DDP],
    "show tree": ["show", DDP, "--tree"],
    "show ties": ["show", "fixtures/encoder_tied.pt"],
    "stats": ["stats", DDP],
    "stats ties": ["stats", "fixtures/encoder_tied.pt", "--depth", "2"],
    "diff": ["diff", MODEL, DDP],
    "diff all": ["diff", MODEL, DDP, "-a", "--rename", "module.*=*"],
    "remap": ["remap", DDP, "--rename", "module.*=*", "-o", "OUT", "-n"],
    "merge": ["merge", MODEL, DDP, "--rename", "module.*=*", "--on-mismatch", "skip", "-o", "OUT", "-n"],
    "convert": ["convert", DDP, "-o", "OUT", "-n"],
    "groups table": ["groups", "table", "--model", MODEL, "fixtures/groups.toml"],
    "groups validate": ["groups", "validate", "--model", MODEL, "SPEC"],
}


@pytest.mark.parametrize("arguments", REPORTS.values(), ids=REPORTS.keys())
def test_every_report_has_a_markdown_form(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Markdown has the same words and exit code as the text; together with --json it is an error."""
    monkeypatch.chdir(ROOT)
    spec = tmp_path / "spec.toml"
    spec.write_text('[[group]]\nparams = "fc3.*"\nlrr = 0.1\n', encoding="utf-8")
    places = {"OUT": str(tmp_path / "o.safetensors"), "SPEC": str(spec)}
    arguments = [places.get(argument, argument) for argument in arguments]
    text, ran = run_ckpt(capsys, *arguments), run_ckpt(capsys, *arguments, "--markdown")
    assert (ran.code, ran.err) == (text.code, text.err)
    tokens = _tokens(ran.out.splitlines())
    shown = [token.content if token.type == "fence" else "" for token in tokens]
    shown += ["".join(child.content for child in token.children or ()) for token in tokens]
    assert sorted(re.findall(r"\S+", " ".join(shown))) == sorted(re.findall(r"\S+", text.out))
    both = run_ckpt(capsys, *arguments, "--markdown", "--json")
    assert (both.code, both.out) == (2, "")
    assert both.err.startswith("ckpt: --json and --markdown exclude each other\nhint: see ckpt ")


def test_a_writing_command_prints_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --dry-run, the page ends with the output, and stderr is the same as without --markdown."""
    source, out = tmp_path / "a|b`.safetensors", tmp_path / "o.safetensors"
    save_file({"x|`": torch.ones(1)}, source)
    ran = run_ckpt(capsys, "convert", source, "-o", out, "--markdown")
    assert ran.code == 0
    assert "| `` x\\|` ``" in ran.out
    assert ran.out.splitlines()[-1].startswith(f"wrote `{out}`: safetensors, 1 tensor")
    assert ran.err.startswith(f"wrote {out}: safetensors, 1 tensor")
