"""Type checkers accept a script of a user, and find each typo in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers_cli import ROOT

SCRIPT = (ROOT / "tests" / "typing" / "user_script.py").read_text(encoding="utf-8")
# What the script says, and a typo of it; each is on a line of its own.
TYPOS = {
    '"fc3.*": "skip"': '"fc3.*": "skipp"',
    "found.matched": "found.mached",
    "info.dtype": "info.dtyp",
    "ignore=[": "ignored=[",
    "ckptkit.build_param_groups": "ckptkit.build_param_group",
    "force=True": "forced=True",
    "written.nbytes": "written.bytes",
    'checkpoint.read("head.bias")': "checkpoint.read(3)",
    'fresh="fc3.*"': "fresh=3",
    "rtol=1e-6": 'rtol="1e-6"',
    "error.hint": "error.hints",
}


def mypy(script: Path, _mode: str) -> list[int]:
    """Return the line of each error that ``mypy --strict`` finds."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [int(line) for line in re.findall(r"^\S+?:(\d+): error:", done.stdout, re.MULTILINE)]


def pyright(script: Path, mode: str) -> list[int]:
    """Return the line of each error that pyright finds in this mode."""
    program = shutil.which("basedpyright")
    if program is None:
        pytest.skip("basedpyright is not installed")
    settings = script.with_name("pyrightconfig.json")
    content = {"typeCheckingMode": mode, "include": [str(script)], "extraPaths": [str(ROOT)]}
    settings.write_text(json.dumps(content), encoding="utf-8")
    command = [program, "--outputjson", "--pythonpath", sys.executable, "--project", str(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [entry["range"]["start"]["line"] + 1 for entry in found if entry["severity"] == "error"]


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_the_script_is_accepted(checker: Callable[[Path, str], list[int]], tmp_path: Path) -> None:
    """The types of the package fit a script that has types itself."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    assert checker(script, "strict") == []


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_every_typo_is_found(checker: Callable[[Path, str], list[int]], tmp_path: Path) -> None:
    """Each wrong name, keyword, value or type is an error on its line, and there is no error elsewhere."""
    wrong = SCRIPT
    for right, typo in TYPOS.items():
        assert SCRIPT.count(right) == 1, right
        wrong = wrong.replace(right, typo)
    script = tmp_path / "script.py"
    script.write_text(wrong, encoding="utf-8")
    lines = [number for number, line in enumerate(SCRIPT.splitlines(), 1) if any(right in line for right in TYPOS)]
    assert len(lines) == len(TYPOS)
    assert sorted(checker(script, "standard")) == lines  # the strict mode also names what follows from a typo
