"""Run the command line inside the test process."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptkit.cli import main
from tests.helpers_hints import problems_of_hint
from tests.helpers_schemas import problems_of

__all__ = ["ROOT", "Ran", "put_on_path", "run_ckpt"]

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ran:
    """The exit code of a command, and the text that it printed on stdout and stderr."""

    code: int
    out: str
    err: str


def run_ckpt(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """Run ``ckpt`` with these arguments; return the exit code and both outputs.

    What ``--json`` prints must follow the schema that it names. Hints of errors must name commands that are whole, and
    options that this command has.
    """
    capsys.readouterr()
    words = [str(argument) for argument in arguments]
    code = main(words)
    captured = capsys.readouterr()
    for line in (*captured.err.splitlines(), *captured.out.splitlines()):
        if line.startswith("hint: "):
            assert problems_of_hint(words, line) == [], line
    if "--json" in arguments and code in {0, 1} and captured.out:
        assert problems_of(json.loads(captured.out)) == []
    return Ran(code, captured.out, captured.err)


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``ckpt`` and ``python`` in ``folder`` the first on PATH: those of this test, and of this checkout."""
    folder.mkdir()
    program = folder / "ckpt"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m ckptkit "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
