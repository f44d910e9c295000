"""What the README and the page about testing promise, beyond their blocks, which tests/test_docs.py runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from ckptkit.rules.parse import parse_rules
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


def test_rule_file_example(capsys: pytest.CaptureFixture[str]) -> None:
    """The rule file in the README is valid."""
    import tomllib

    block = next(text for text in re.findall(r"```toml\n(.*?)```", README, re.DOTALL) if "[[rule]]" in text)
    rules = parse_rules(file=tomllib.loads(block))
    assert [len(stage.rules) for stage in rules.stages] == [2, 1]
    assert capsys.readouterr().err == ""


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
