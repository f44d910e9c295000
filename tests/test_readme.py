"""The commands in the README run and print what it shows; the recipes of the page about testing pass."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptkit.rules.parse import parse_rules
from ckptkit.testing import assert_loads
from fixtures.lenet import build
from tests.helpers_cli import ROOT, run_ckpt

TESTING = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^(pip install .*)$", README, re.MULTILINE)


def _sessions() -> list[tuple[str, str]]:
    pairs = []
    for block in CONSOLE:
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            pairs.append((command, output))
    return pairs


@pytest.mark.parametrize(("command", "output"), _sessions(), ids=[command[:40] for command, _ in _sessions()])
def test_sessions(
    command: str, output: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command in the README prints exactly the text below it, on stdout and then on stderr."""
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    ran = run_ckpt(capfd, *shlex.split(command)[1:])
    assert (ran.out + ran.err).strip() == output.strip()


def test_python_example(tmp_path: Path) -> None:
    """The script in the README runs unchanged from the checkout."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{block}", encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "8 matched, 2 shape-mismatched\nloaded 8 of 10 tensors, 99.4 % of the elements; kept 2 as they were\n"
    )


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TESTING, re.DOTALL))
def test_recipes_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe of the page about testing is a test that passes."""
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/testing.md", "exec"), names)  # noqa: S102 - the page is part of this repository
    (test,) = [value for name, value in names.items() if name.startswith("test_")]
    test(*[tmp_path] * test.__code__.co_argcount)


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


def test_linked_files_exist() -> None:
    """The files that the README and CONTRIBUTING link to or name exist."""
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`((?:tests|fixtures|\.ci)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{document} names {name}"
