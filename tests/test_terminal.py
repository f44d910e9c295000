"""Pages in terminals of any width, in pipes, and as tab-separated values."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import re
import subprocess
import sys
import termios
import unicodedata
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tabulate import tabulate

from ckptkit.cli.common.printing import progress_bar
from ckptkit.core.text import printable
from ckptkit.render.page import Line, Table, as_markdown, as_text, as_tsv, join_rows, name_beside
from ckptkit.render.page.shortening import shortened
from ckptkit.render.page.width import fitted
from tests.helpers_cli import ROOT, run_ckpt

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


@settings(max_examples=50)
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


def test_wide_characters_and_accents_are_aligned() -> None:
    """Cells end in the same column of the terminal, whatever their characters take."""
    rows = (("権重", "1.0 kB"), ("e\u0301e\u0301", "24 B"), ("plain", "権"))
    lines = list(as_text([Table(("key", "bytes"), rows, frozenset({"bytes"}))]))
    assert [columns_of(line) for line in lines] == [14] * 4


@settings(max_examples=50)
@given(tables())
def test_tables_look_as_tabulate_lays_them_out(table: Table) -> None:
    """Where each character takes one column, text has the table that tabulate calls plain; all Markdown is as wide."""
    ascii_only = [tuple(re.sub(r"[^ -~]+", "", cell) for cell in row) for row in table.rows]
    rows = tuple(tuple(cell.strip() for cell in row) for row in ascii_only)
    align = ["right" if header in table.right else "left" for header in table.headers]
    expected = tabulate(rows, table.headers, tablefmt="plain", disable_numparse=True, colalign=align) if rows else ""
    table = replace(table, rows=rows)
    assert list(as_text([table])) == [line.rstrip() for line in expected.split("\n")] * bool(rows)
    lines = list(as_markdown([table]))
    assert len({len(line) for line in lines}) <= 1


@settings(max_examples=50)
@given(tables())
def test_tab_separated_values_are_what_csv_reads(table: Table) -> None:
    """The rows of the first table come back whole, whatever their cells have; nothing else of the page is printed."""
    rows = list(csv.reader(as_tsv([Line(("title",)), table, table]), "excel-tab"))
    assert rows == [list(table.headers), *([cell.strip() for cell in row] for row in table.rows)]


@pytest.mark.parametrize("size", [24, 16, 12])
def test_names_stay_different(size: int) -> None:
    """Names that differ anywhere differ after they are shortened."""
    roles = ("q_proj.weight", "k_proj.weight", "v_proj.bias")
    names = [f"encoder.transformer.layers.{layer}.self_attn.{role}" for layer in range(12) for role in roles]
    short = shortened(names, size)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= size
    assert shortened(["encoder.layers.{0..11}.blocks.self_attn.weight ×12"], 36) == [
        "…{0..11}.blocks.self_attn.weight ×12"
    ]


@settings(max_examples=50)
@given(st.lists(CELL.map(printable), max_size=9), st.integers(1, 40))
def test_a_shortened_text_shows_where_it_was_cut(texts: list[str], size: int) -> None:
    """It has signs for what was left out: what is between them is in the text, in that order; and it fits."""
    for text, short in zip(texts, shortened(texts, size), strict=True):
        assert columns_of(short) <= max(size, columns_of(text) if short == text else 0)
        assert short == text or re.search(".*".join(map(re.escape, f" {short} ".split("…"))), f" {text} ", re.DOTALL)


def test_names_lose_what_they_share() -> None:
    """Segments of a name that few other names have are kept, with the index where it differs."""
    parts = ["attention.output.dense", "output.dense", "attention.self.key"]
    names = [f"bert.encoder.layer.{layer}.{part}.weight" for layer in range(12) for part in parts]
    assert shortened(names, 33)[-3:] == [
        "…11.attention.output.dense.weight",
        "…layer.11.output.dense.weight",
        "…11.attention.self.key.weight",
    ]
    rows = ["source: bert.encoder.layer.3.output.dense.weight", "source"]
    assert shortened(rows, 32) == ["source: …3.output.dense.weight", "source"]
    assert shortened(['{"model_type": "llama", "a.b": 1}'], 20) == ['{"model_type": "lla…']


def test_rows_are_joined_with_the_other_name_beside_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a renaming keeps the indices, the rows of a dry run and of a diff are one; others stay apart."""
    old = {f"net.h.{i}.w": torch.zeros(2) for i in (0, 1, 2, 5)}
    save_file(old, tmp_path / "old.safetensors")
    save_file({key.replace("net.h", "layers"): value for key, value in old.items()}, tmp_path / "new.safetensors")
    rename = ["--rename", "net.h.*=layers.*"]
    ran = run_ckpt(capsys, "remap", tmp_path / "old.safetensors", "-o", tmp_path / "o.pt", *rename, "-n")
    assert re.search(r"layers\.\{0\.\.2,5\}\.w ×4 .* source: net\.h\.\{0\.\.2,5\}\.w  ", ran.out)
    ran = run_ckpt(capsys, "diff", tmp_path / "new.safetensors", tmp_path / "old.safetensors", "-a", *rename)
    assert re.search(r"= +layers\.\{0\.\.2,5\}\.w ×4 .* as net\.h\.\{0\.\.2,5\}\.w$", ran.out, re.MULTILINE)
    ran = run_ckpt(
        capsys, "diff", tmp_path / "new.safetensors", tmp_path / "old.safetensors", "-a", "--expand", *rename
    )
    assert re.search(r"= +layers\.5\.w .* as net\.h\.5\.w$", ran.out, re.MULTILINE)
    other = name_beside("a.0.w", "b.1.w")
    assert join_rows([("a.0.w", (other,)), ("a.1.w", (other,))]) == [("a.{0,1}.w ×2", "b.1.w")]


def read_all(terminal: int) -> str:
    """Return what was printed on a terminal until all its writers were closed, and close it."""
    printed = b""
    with contextlib.suppress(OSError):  # Linux reports the end as an error
        while some := os.read(terminal, 1 << 16):
            printed += some
    os.close(terminal)
    return printed.decode()


def in_terminal(width: int, *arguments: object, **variables: str) -> list[str]:
    """Return what ``ckpt`` prints on a terminal of that width, line by line."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (40, width))
    environment = {**os.environ, "NO_COLOR": "1", **variables}
    command = [sys.executable, "-m", "ckptkit", *map(str, arguments)]
    with subprocess.Popen(command, stdout=end, stderr=subprocess.PIPE, env=environment, cwd=ROOT) as process:
        os.close(end)
        printed = read_all(terminal)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    return click.unstyle(printed).splitlines()


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the names of a BERT of twelve layers."""
    path = tmp_path_factory.mktemp("terminal") / "bert.safetensors"
    parts = ["attention.self.query", "attention.self.key", "attention.output.dense", "attention.output.LayerNorm"]
    names = [f"bert.encoder.layer.{layer}.{part}" for layer in range(12) for part in [*parts, "intermediate.dense"]]
    names += ["bert.embeddings.word_embeddings", "cls.predictions.transform.dense"]
    save_file({f"{name}.weight": torch.ones(8, 8) for name in names}, path)
    return path


RENAME = ["--rename", "bert.encoder.layer.*=transformer.blocks.*"]


@pytest.mark.parametrize(
    ("width", "arguments", "rows"),
    [
        (80, ["show", "FILE", "--expand"], 62),
        (60, ["diff", "FILE", "FILE", "-a", "--expand", *RENAME], 122),
        (40, ["remap", "FILE", "-o", "out.safetensors", "-n", *RENAME], 7),
    ],
    ids=["show", "diff", "remap"],
)
def test_commands_fit_into_a_terminal(width: int, arguments: list[str], rows: int, transformer: Path) -> None:
    """No line is wider than the terminal, or than COLUMNS, and every tensor or group of tensors has its own row."""
    arguments = [str(transformer) if argument == "FILE" else argument for argument in arguments]
    lines = in_terminal(width, *arguments) if width > 40 else in_terminal(100, *arguments, COLUMNS=str(width))
    assert max(map(columns_of, lines)) <= max(width, len(str(transformer)) + len("expected  :"))
    named = [line for line in lines if re.search(r"weight|…", line)]
    assert len(set(named)) == len(named) == rows


def test_a_progress_bar_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn over itself, so it must not be wider than the terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 40))
    with os.fdopen(end, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(10, "comparing", hidden=False) as progress:
            assert progress is not None
            progress(10)
        monkeypatch.undo()
    drawn = click.unstyle(read_all(terminal)).split("\r")
    assert "100%" in "".join(drawn)
    assert max(map(len, drawn)) <= 40


def test_pipes_and_wide_show_everything(transformer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe, also where COLUMNS is set, and with --wide in a terminal, every name is whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        piped = run_ckpt(capsys, "show", transformer).out
    assert "bert.encoder.layer.{0..11}.attention.output.LayerNorm.weight ×12" in piped
    assert in_terminal(40, "show", transformer, "--wide") == piped.splitlines()
    assert run_ckpt(capsys, "show", transformer, "--format", "plain").out == piped


def test_formats_exclude_each_other(transformer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short form may repeat --format, and must not contradict it; a report without a table has no tsv."""
    assert run_ckpt(capsys, "show", transformer, "--format", "json", "--json").code == 0
    assert run_ckpt(capsys, "show", transformer, "--format", "tsv", "--wide").err.startswith(
        "ckpt: --format tsv and --wide exclude each other\n"
    )
    assert run_ckpt(capsys, "show", transformer, "--tree", "--format", "tsv").code == 2
    assert run_ckpt(capsys, "diff", transformer, transformer, "--format", "tsv").out == "\tkey\texpected\tfound\n"
    ran = run_ckpt(capsys, "check", transformer, "--format", "tsv")
    codes = [row["code"] for row in csv.DictReader(ran.out.splitlines(), dialect="excel-tab")]
    assert codes == [
        one["code"] for one in json.loads(run_ckpt(capsys, "check", transformer, "--json").out)["findings"]
    ]
    ran = run_ckpt(capsys, "convert", transformer, "-o", transformer.parent / "o.pt", "-n", "--report", "tsv")
    rows = list(csv.DictReader(ran.out.splitlines(), dialect="excel-tab"))
    with safe_open(transformer, "pt") as file:
        assert {row["key"] for row in rows} == set(file.keys())
