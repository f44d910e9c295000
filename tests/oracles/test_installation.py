"""Installing ckptkit leaves the libraries of an environment alone; ``tests/compat/run`` shows it with torch 2.4."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers_cli import ROOT


def test_installing_replaces_no_library(tmp_path: Path) -> None:
    """pip says what it would install where torch and the other dependencies are there already: ckptkit alone."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    assert [item["metadata"]["name"] for item in found] == ["ckptkit"]
