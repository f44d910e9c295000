"""The descriptions of the benchmarks are sound, and their report says what is above a limit. Nothing is timed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from ckptkit.cli.common.program import ckpt as program
from tests.benchmarks import scripts, timed
from tests.benchmarks.descriptions import Command, Rival, Row, ckpt, code, shell
from tests.benchmarks.growth import GROWTH, SIZES
from tests.benchmarks.inputs import FILES, grown, scaled, text_of
from tests.benchmarks.measure import Measured, Programs, Rules, Run, Side, run
from tests.benchmarks.peers import PEERS
from tests.benchmarks.reasons import last_error
from tests.benchmarks.report import BEGIN, END, Report
from tests.benchmarks.rows import ROWS

FUNCTIONS = {"script": scripts, "timed": timed}


def commands() -> list[Command]:
    """Return the commands of all rows and of what grows."""
    rows = [command for row in ROWS for command in (row.ours, *(rival.command for rival in row.rivals)) if command]
    return rows + [command for growth in GROWTH for command in (growth.ours, growth.rival.command)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_list_the_files_that_their_commands_read(row: Row) -> None:
    """Each file that the commands of a row read is one of the row, and is described."""
    words = " ".join(
        word for one in (row.ours, *(rival.command for rival in row.rivals)) if one for word in one.arguments
    )
    named = set(re.findall(r"[\w-]+\.(?:safetensors|pt|pth|yml)\b|\b\w+-model\b", words))
    assert {name for name in named if not name.startswith("out")} <= set(row.files)
    assert set(row.files) <= FILES.keys()
    assert row.rivals, "nothing to compare with"


def test_names_are_unique() -> None:
    """No two rows of a name, and no two rivals of a name in a row; each peer is compared with."""
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        rivals = [rival.name for rival in row.rivals]
        assert len(set(rivals)) == len(rivals), row.name
    assert {command.peer for command in commands() if command.peer} == {one.name for one in PEERS}


@pytest.mark.parametrize(
    "command", [one for one in commands() if one.program == "ckpt"], ids=lambda one: " ".join(one.arguments)
)
def test_command_lines_are_accepted(command: Command) -> None:
    """Each command line of ckptkit names a command, and options that it has."""
    name, *words = command.arguments
    if name == "--help":
        return
    context = click.Context(program)
    found = program.get_command(context, name)
    assert found is not None
    found.make_context(name, list(words), parent=context)


@pytest.mark.parametrize(
    "command", [one for one in commands() if one.program in FUNCTIONS], ids=lambda one: " ".join(one.arguments)
)
def test_functions_take_the_arguments_that_they_get(command: Command) -> None:
    """Each function of the two files of functions exists, and takes these arguments."""
    name, *words = command.arguments
    function: Callable[..., object] = getattr(FUNCTIONS[command.program], name)
    inspect.signature(function).bind(*words)


def test_sizes_follow_the_scale() -> None:
    """A small scale leaves fewer tensors, at least one; what grows has the files of its commands."""
    assert text_of(("large.safetensors",), 1.0) == "60 tensors, 1.01 GB"
    assert text_of(("a.safetensors", "again.safetensors"), 0.1) == "2 × 10,000 tensors, 160 kB"
    assert str(scaled(FILES["large.pt"], 1e-9)).startswith("1 tensors")
    for growth in GROWTH:
        words = " ".join((*growth.ours.arguments, *growth.rival.command.arguments))
        named = {name for name in re.findall(r"\w+\.safetensors", words) if not name.startswith("out")}
        assert named <= grown(growth.unit, SIZES[growth.unit][0]).keys()


def test_a_process_is_measured_from_outside(tmp_path: Path) -> None:
    """The peak is that of the command, and a command that fails says why."""
    programs = Programs(tmp_path, None, frozenset())
    (tmp_path / "out.old").write_text("", encoding="utf-8")
    large = run(programs, code("bytearray(b'1') * 50_000_000"), Rules())
    assert not large.problem
    assert not list(tmp_path.glob("out*"))
    assert large.peak - run(programs, shell("true"), Rules()).peak > 40_000_000
    failed = run(programs, code("raise ValueError('no such thing')"), Rules())
    assert failed.problem == "exit code 1: ValueError: no such thing"
    assert run(programs, shell("sleep 60"), Rules(longest=0.1)).ended


def test_reasons_can_be_published() -> None:
    """The reason why another program failed names no server and no folder of the machine."""
    text = "Traceback\n│ ERROR: No file /root/some/model.bin at https://example.org/simple │\nWARNING: more\n"
    assert last_error(text) == "No file model.bin at (address)"
    assert last_error("\n") == "it printed no error"


def test_the_report_compares_what_was_written(tmp_path: Path) -> None:
    """The share of the bytes of another program has a limit of its own; bytes count also where time does not."""
    (tmp_path / "out.old").write_bytes(b"old")
    written = run(Programs(tmp_path, None, frozenset()), shell("printf 12345 > out-x; printf 1 > other"), Rules())
    assert written.written == 5
    rivals = (
        Rival("zip", shell("zip"), None, "", 0.9),
        Rival("tar", shell("tar"), None, "", 0.9),
        Rival("cp", shell("cp")),
    )
    row = Row("Deltas", "delta", (), ckpt("delta"), rivals)
    ours, zipped, tarred, copied = (
        Side({0: Run(1.0, 0, written=count)}) for count in (9_000_000, 9_500_000, 20_000_000, 1)
    )
    report = Report(
        "a machine", (0.1, 0.2), 1.0, 1.0, "run.py", False, {}, (Measured(row, ours, (zipped, tarred, copied)),), (), ()
    )
    assert report.above() == ["delta: 0.95 of the bytes of zip, limit 0.9"]
    assert "| delta | 9.0 | zip | **0.95** | 0.9 | 9.5 |\n|  |  | tar | 0.45 | 0.9 | 20.0 |" in report.markdown()


def test_the_report_names_what_is_above_a_limit(tmp_path: Path) -> None:
    """The first turn does not count. A rival without a limit that is faster is named too."""
    rivals = (
        Rival("cp", shell("cp"), 1.1),
        Rival("other", shell("other"), None, "reads less"),
        Rival("slow", shell("slow")),
    )
    row = Row("Copies", "rename", (), ckpt("remap"), rivals, megabytes=30)
    ours, copy, other, slow = (
        Side({turn: Run(seconds, 50e6) for turn, seconds in enumerate(times)})
        for times in ((9.0, 1.2, 1.4, 1.3), (1.0, 1.0, 1.0, 1.0), (1.0, 0.5, 0.5, 0.5), (5.0,))
    )
    later = Measured(Row("Later", "value diff", (), None, (rivals[0],)), None, (copy,))
    report = Report(
        "a machine",
        (0.1, 0.2),
        1.0,
        1.0,
        "run.py",
        False,
        {},
        (Measured(row, ours, (copy, other, slow)), later),
        (),
        (),
    )
    assert report.above() == ["rename: 1.30 of cp, limit 1.1", "rename: 50 MB, limit 30 MB"]
    assert report.behind() == ["rename: 2.60 of other (reads less)"]
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nend\n", encoding="utf-8")
    report.write_page(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert text.endswith("end\n")
    assert "old" not in text
    assert "| rename | 1.30 s | **50, limit 30** | cp | **1.30** | 1.20 – 1.40 | 1.1 | 1.00 s | 50 |" in text
    assert "|  |  |  | slow | 0.26 | one run |" in text
    assert "| value diff | not built |" in text
