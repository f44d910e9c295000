"""What the README and the page about testing promise, beyond their blocks, which tests/test_docs.py runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ckptkit.testing import assert_loads
from fixtures.lenet import build
from tests.helpers_cli import ROOT, run_ckpt

TESTING = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(pip install .*)$", README, re.MULTILINE)


def test_recipe_shows_the_real_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure on the page about testing is what the first recipe prints without ``fresh``."""
    monkeypatch.chdir(ROOT)
    (shown,) = re.findall(r"```text\nAssertionError: (.*?)```", TESTING, re.DOTALL)
    with pytest.raises(AssertionError) as error:
        assert_loads(build(), "fixtures/lenet_10class.pth")
    assert str(error.value).strip() == shown.strip()


def test_the_picture_shows_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal in the picture has the commands and the lines that they print today: python docs/picture.py."""
    picture = ET.parse(ROOT / "docs" / "_static" / "terminal.svg")  # noqa: S314 - a file of this repository
    rows: dict[float, list[tuple[float, str]]] = {}
    for text in picture.iter("{http://www.w3.org/2000/svg}text"):
        if "clip-path" in text.attrib:
            rows.setdefault(float(text.attrib["y"]), []).append((float(text.attrib["x"]), text.text or ""))
    shown = ["".join(piece for _, piece in sorted(rows[y])).replace("\xa0", " ").rstrip() for y in sorted(rows)]
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    printed: list[str] = []
    for command in (line[2:] for line in shown if line.startswith("$ ")):
        ran = run_ckpt(capsys, *shlex.split(command)[1:])
        printed += [f"$ {command}", *(line.rstrip() for line in (ran.out + ran.err).splitlines()), ""]
    assert [line for line in shown if line] == [line for line in printed if line]


def test_two_commands_do_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command installs and does the main job, the other installs and tests; both use the constraints."""
    assert len(COMMANDS) == 2
    assert all(command.startswith("pip install -c constraints.txt ") for command in COMMANDS)
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    job = COMMANDS[0].partition(" && ")[2]
    assert run_ckpt(capsys, *shlex.split(job)[1:]).code == 0
    assert COMMANDS[1].endswith("&& python -m pytest -q -n auto")
