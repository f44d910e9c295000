"""Every command prints names from files exactly, on one line and without control characters."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ckptkit import diff, load_into, open_checkpoint, plan_remap, run_checks
from ckptkit.core.patterns import literal
from ckptkit.core.text import printable, quoted
from tests.helpers_cli import ROOT, Ran, run_ckpt

NAMES: dict[str, str] = {
    "CSI": "\x1b[2J\x1b[1;31mgone",
    "OSC": "\x1b]0;title\x07",
    "C1": "\x9b2J\x85",
    "newline": "a\nckpt: b: no such file",
    "CR": "shown\rhidden",
    "bidi": "\u202ecod\u2066exe",
    "zero width": "w\u200b\ufeffx\u2060",
    "line separators": "a\u2028b\u2029c",
    "lone surrogate": "a\ud800",
    "fillers": "\u3164\u2800\ufe0f",
    "pad": "  pad  ",
    "no break": "\u00a0a\u3000",
    "columns": "w  F32    [4]",
    "backslash": "a\\x1b\\",
    "quotes": "it's \"it\"",
    "pipe": "a|b`c``d",
    "html": '<img onerror=1>"><script>alert(1)</script>&amp;',
    "formula": "=cmd|'/c calc'!A0",
    "shell": "$(touch pwned);`id`",
    "click": "100%s {} %(x)s",
    "digits": "0012",
    "float": "1e5",
    "nan": "nan",
    "underscore": "1_000",
    "index": "{0,1}",
    "count": "w ×2",
    "wide": "層の重み",
    "combining": "e\u0301",
    "one MB": "x\x1b" * 500_000,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _write_named(directory: Path, name: str) -> Path:
    """Write a torch file in which every key, entry and text value has this name."""
    state = {f"{name}.weight": torch.ones(2, 3), f"{name}.bias": torch.ones(3), "z": torch.ones(4)}
    state[f"{name}.tied"] = state[f"{name}.bias"]
    path = directory / "names.pt"
    torch.save({"state_dict": state, f"{name}e": 1, "args": {name: [name]}, "v": name}, path)
    return path


def _write_plain(directory: Path) -> Path:
    path = directory / "plain.pt"
    torch.save({"plain.weight": torch.ones(2, 3), "plain.bias": torch.ones(4), "y": torch.ones(4)}, path)
    return path


COMMANDS: dict[str, list[str]] = {
    "show": ["show", "FILE"],
    "show expanded": ["show", "FILE", "--expand"],
    "show tree": ["show", "FILE", "--tree"],
    "show markdown": ["show", "FILE", "--markdown"],
    "show entries": ["show", "FILE::args"],
    "show nothing": ["show", "FILE::nothing"],
    "diff": ["diff", "FILE", "PLAIN"],
    "diff turned": ["diff", "PLAIN", "FILE"],
    "diff hint": ["diff", "PLAIN", "FILE", "--rename", "*=*"],
    "remap": ["remap", "FILE", "-o", "OUT", "-n", "--rename", "z=y"],
    "remap collision": ["remap", "FILE", "-o", "OUT", "--rename", "*.weight=z"],
    "remap written": ["remap", "FILE", "-o", "OUT.pt", "--rename", "z=y"],
    "merge": ["merge", "FILE", "FILE", "-o", "OUT", "-n"],
    "merge nothing": ["merge", "PLAIN", "FILE", "-o", "OUT"],
    "convert markdown": ["convert", "FILE", "-o", "OUT", "-n", "--markdown"],
    "convert dtype": ["convert", "FILE", "-o", "OUT.pt", "--dtype", "BF16"],
    "check": ["check", "FILE"],
    "check markdown": ["check", "FILE", "--markdown"],
}


def _run(capsys: pytest.CaptureFixture[str], arguments: list[str], directory: Path, name: str) -> Ran:
    directory.mkdir()
    places = {
        "FILE": str(_write_named(directory, name)),
        "PLAIN": str(_write_plain(directory)),
        "OUT": str(directory / "o"),
    }
    places |= {"FILE::args": f"{places['FILE']}::args", "FILE::nothing": f"{places['FILE']}::nothing"}
    places["OUT.pt"] = f"{places['OUT']}.pt"
    return run_ckpt(capsys, *(places.get(argument, argument) for argument in arguments))


def _assert_harmless(text: str) -> None:
    assert {char for char in text if char != "\n" and not char.isprintable()} == set()
    assert max(map(len, text.splitlines()), default=0) < 6000


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_name_adds_no_line_and_no_control(
    arguments: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With any names, a command has the same exit code and number of lines as with usual names, all printable."""
    ran = _run(capsys, arguments, tmp_path / "a", name)
    usual = _run(capsys, arguments, tmp_path / "b", "usual")
    _assert_harmless(ran.out)
    _assert_harmless(ran.err)
    assert ran.code == usual.code, ran.err
    assert (ran.out.count("\n"), ran.err.count("\n")) == (usual.out.count("\n"), usual.err.count("\n"))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_are_read_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has every name exactly; the text has it as the body of a Python string, unless it is cut."""
    path = _write_named(tmp_path, name)
    keys = [f"{name}.weight", f"{name}.bias", "z", f"{name}.tied"]
    out = run_ckpt(capsys, "show", path, "--json").out
    assert out.isascii()
    document = json.loads(out)
    assert [info["key"] for info in document["tensors"]] == keys
    assert [entry["path"] for entry in document["entries"]] == [f"{name}e", "args", "v"]
    plan = json.loads(run_ckpt(capsys, "convert", path, "-o", tmp_path / "o.pt", "-n", "--json").out)
    assert [step["key"] for step in plan["plan"]] == keys
    differing = json.loads(run_ckpt(capsys, "diff", _write_plain(tmp_path), path, "--json").out)
    assert [info["key"] for info in differing["unexpected"]] == keys
    shown = run_ckpt(capsys, "show", path, "--expand").out
    cells = [re.split(r" {2,}", line)[0] for line in shown.splitlines()]
    assert [printable(key) for key in keys if printable(key) in cells] == [printable(key) for key in keys]
    if len(name) < 100:
        assert [ast.literal_eval(_literal(cell)) for cell in cells if cell.endswith((".weight", ".tied"))] == [
            keys[0], keys[3]
        ]  # fmt: skip


def _literal(cell: str) -> str:
    quote = cell.replace("'", "\\'")
    return f"'{quote}'"


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_survive_writing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch and safetensors read every written name back exactly, also through a plan file, or it is refused."""
    path, plan = _write_named(tmp_path, name), tmp_path / "plan.json"
    out = {suffix: tmp_path / f"o.{suffix}" for suffix in ("pt", "safetensors")}
    assert run_ckpt(capsys, "remap", path, "-o", out["pt"], "--rename", "z=y", "--plan", plan, "-q").code == 0
    expected = [f"{name}.weight", f"{name}.bias", "y", f"{name}.tied"]
    kept = torch.load(path, weights_only=True)
    assert list(torch.load(out["pt"], weights_only=True)["state_dict"]) == expected
    again = run_ckpt(capsys, "remap", path, "-o", out["pt"], "--apply", plan, "--force", "-q")
    found = torch.load(out["pt"], weights_only=True)
    assert (again.code, list(found.pop("state_dict"))) == (0, expected), again.err
    assert kept.pop("state_dict")
    assert found == kept
    ran = run_ckpt(capsys, "remap", path, "-o", out["safetensors"], "--rename", "z=y", "-q")
    if ran.code:
        assert name.encode(errors="surrogatepass") != name.encode(errors="replace")
        assert (ran.code, ran.out, quoted(f"{name}.weight") in ran.err) == (2, "", True)
        assert not out["safetensors"].exists()
    else:
        with safe_open(out["safetensors"], "pt") as file:
            assert sorted(file.keys()) == sorted(expected)


MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter(NAME, torch.nn.Parameter(torch.ones(2)))
        self.register_parameter("frozen " + NAME, torch.nn.Parameter(torch.ones(2), requires_grad=False))
        self.plain = torch.nn.Linear(2, 2)
"""

SPECS: dict[str, dict[str, Any]] = {
    "owned": {"defaults": {"lr": 0.1}, "group": [{"name": "NAME", "params": "re:.*", "NAME": "NAME"}]},
    "missing": {"group": [{"params": "plain.*", "lr": 0.1}]},
    "nothing": {"group": [{"params": "LITERAL", "lr": 0.1}, {"rest": True, "lr": 0.1}]},
    "twice": {"group": [{"name": "NAME", "params": "plain.*"}, {"name": "NAME", "rest": True}]},
    "unknown": {"group": [{"rest": True, "lr": 0.1}], "NAME": 1},
}
WITHOUT_MODEL = {"one MB", "lone surrogate"}  # such names cannot be written into the source of a model


@pytest.mark.parametrize("name", [NAMES[key] for key in NAMES if key not in WITHOUT_MODEL],
                         ids=[key for key in NAMES if key not in WITHOUT_MODEL])  # fmt: skip
@pytest.mark.parametrize("command", ["table", "validate", "lock"])
def test_parameters_of_a_model(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of parameters, groups and options are printed harmlessly too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, (kind, spec) in enumerate(SPECS.items()):
        lines, seen = [], []
        for module, called in ((f"odd{number}{command}", name), (f"usual{number}{command}", "usual")):
            (tmp_path / f"{module}.py").write_text(f"NAME = {called!r}\n{MODEL}", encoding="utf-8")
            text = json.dumps(spec).replace("NAME", json.dumps(called)[1:-1])
            text = text.replace("LITERAL", json.dumps(literal(f"{called}x"))[1:-1])
            (tmp_path / f"{module}.json").write_text(text, encoding="utf-8")
            more = ["-o", f"{module}.lock.json", "--markdown"] if command == "lock" else []
            importlib.invalidate_caches()  # the new file may be newer than the cached directory listing
            ran = run_ckpt(capsys, "groups", command, "--model", f"py:{module}:Net", f"{module}.json", *more)
            _assert_harmless(ran.out + ran.err)
            seen.append(ran.err)
            lines.append((ran.code, ran.out.count("\n"), ran.err.count("\n")))
        assert lines[0] == lines[1], (kind, seen)
        sys.modules.pop(f"odd{number}{command}", None)
        sys.modules.pop(f"usual{number}{command}", None)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "\u202eb", "'; touch pwned; '", "\udcff", "a  b "], ids=ascii)
def test_files_of_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths are printed harmlessly in titles, errors and warnings."""
    path = _write_named(tmp_path, "w").rename(tmp_path / f"{name}.pt")
    out = tmp_path / f"out {name}.pt"
    commands: list[list[str | Path]] = [
        ["show", path],
        ["show", tmp_path / name],
        ["convert", path, "-o", out],
        ["convert", path, "-o", out],
        ["check", path, tmp_path / name],
        ["diff", path, out, "--rules", tmp_path / name],
    ]
    for arguments in commands:
        ran = run_ckpt(capsys, *arguments)
        _assert_harmless(ran.out + ran.err)
        assert printable(name.strip()) in ran.out + ran.err
    assert run_ckpt(capsys, "show", path, "--json").out.isascii()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_terminals_of_any_kind(encoding: str, tmp_path: Path) -> None:
    """On a narrow terminal without Unicode and colours, every command works."""
    name = "\x1b[2J" + NAMES["wide"] + NAMES["lone surrogate"] + "×" * 30
    path, plain = str(_write_named(tmp_path, name)), str(_write_plain(tmp_path))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "40", "NO_COLOR": "1"}
    commands = [["show", path, "--tree"], ["diff", plain, path]]
    if encoding == "ascii":
        commands += [
            ["show", path],
            ["show", path, "--markdown"],
            ["show", path, "--keep", "\x1bé"],
            ["remap", path, "-o", "/dev/null/x"],
            ["check", path],
        ]
    for arguments in commands:
        command = [sys.executable, "-m", "ckptkit", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        assert done.returncode in (0, 1, 2), done.stderr
        assert b"Traceback" not in done.stderr
        assert b"\x1b" not in done.stdout + done.stderr
        _assert_harmless((done.stdout + done.stderr).decode(encoding))


def test_only_a_diff_has_colours(tmp_path: Path) -> None:
    """Only a diff on a terminal has colours, unless NO_COLOR is set; a tensor named ``+`` gets none."""
    path, plain = str(_write_named(tmp_path, "+")), str(_write_plain(tmp_path))
    torch.save({"+": torch.ones(1), "-": torch.ones(1)}, path)
    assert b"\x1b[32m" in _on_terminal(["diff", plain, path], {})
    assert b"\x1b" not in _on_terminal(["diff", plain, path], {"NO_COLOR": "1"})
    assert b"\x1b" not in _on_terminal(["diff", plain, path], {"TERM": "dumb"})
    assert b"\x1b" not in _on_terminal(["show", path], {})


def _on_terminal(arguments: list[str], more: dict[str, str]) -> bytes:
    """Return what a terminal receives from the program, on both streams."""
    ours, theirs = os.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")} | {
        "TERM": "xterm"
    }
    command = [sys.executable, "-m", "ckptkit", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment | more, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        output = b"".join(_chunks(ours))
    os.close(ours)
    assert process.returncode in (0, 1)
    return output


def _chunks(descriptor: int) -> Iterator[bytes]:
    try:
        while chunk := os.read(descriptor, 65536):
            yield chunk
    except OSError:  # Linux raises it when the other side of a terminal is closed
        return


def test_the_progress_bar_prints_no_names(tmp_path: Path) -> None:
    """Names do not move the cursor while the progress bar is shown."""
    path = str(_write_named(tmp_path, NAMES["CSI"] + NAMES["newline"]))
    output = _on_terminal(["remap", path, "-o", str(tmp_path / "o.pt"), "--rename", "z=y"], {"NO_COLOR": "1"})
    assert b"\x1b[2J" not in output
    assert b"\x1b]" not in output
    assert b"\nckpt: b" not in output


def test_names_in_a_traceback_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in a traceback are escaped too."""
    path = _write_named(tmp_path, NAMES["CSI"])

    def broken(*_: object) -> None:
        raise RuntimeError(NAMES["CSI"] + NAMES["newline"])

    monkeypatch.setattr("ckptkit.rules.apply.apply_rules", broken)
    ran = run_ckpt(capsys, "show", path, "--keep", "*")
    assert ran.code == 70
    assert "\\x1b[2J" in ran.err
    _assert_harmless(ran.err)


# None of them runs, loads or names anything.
_ATTRIBUTES = {
    "class", "d", "fill", "fill-opacity", "font-family", "font-size", "font-weight", "height", "hidden", "role", "rx",
    "stroke", "stroke-opacity", "stroke-width", "text-anchor", "viewbox", "width", "x", "xmlns", "y",
}  # fmt: skip
_PICTURES = {"figure", "figcaption", "svg", "title", "desc", "g", "path", "rect", "text"}


class _Text(HTMLParser):
    """Parses HTML into its elements and the text of its cells, as a browser does."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert {name for name, _ in attrs} <= _ATTRIBUTES, attrs
        self.tags.add(tag)
        self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.cells[-1] += data


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_notebooks_show_names_as_text(name: str, tmp_path: Path) -> None:
    """The HTML of each public result is a table, and names are the text of cells."""
    model = torch.nn.Module()
    model.register_parameter("plain", torch.nn.Parameter(torch.ones(2)))
    state = {"plain": torch.ones(2), name: torch.ones(1)}
    path = tmp_path / "f.pt"
    torch.save(state, path)
    with open_checkpoint(path) as checkpoint:
        results = [
            diff(model, checkpoint)._repr_html_(),
            plan_remap(checkpoint)._repr_html_(),
            load_into(model, checkpoint)._repr_html_(),
            run_checks(checkpoint)._repr_html_(),
        ]
    for made in results:
        found = _Text(made)
        words = {"div", "style", "table", "thead", "tbody", "tr", "th", "td", "p", "br", "code"}
        assert found.tags <= words | _PICTURES
        _assert_harmless(made.replace("\n", "").replace("><", ">\n<"))  # no name makes an element longer than a line
        shown = "".join(found.cells)
        in_table = printable(name).replace(" ×", " \\xd7")  # what looks like a count of joined keys
        assert any(text in shown for text in (printable(name), in_table, quoted(name), "no findings"))
