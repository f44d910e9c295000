"""``ckpt doctor`` names the versions in use and what is missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from tests.helpers_cli import ROOT, run_ckpt


def test_the_versions_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    """The document has the version of every package that ckptkit needs, and no problem here."""
    ran = run_ckpt(capsys, "doctor", "--json")
    document = json.loads(ran.out)
    assert (ran.code, document["problems"], document["schema"]) == (0, [], "ckptkit.doctor/1")
    found = {package["name"]: package["version"] for package in document["packages"]}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = [line.partition(">=")[0] for line in needed]
    assert {name.replace("-", "_"): found for name, found in found.items()} == {name: version(name) for name in names}
    devices = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    assert document["torch"] == {"error": None, "devices": ", ".join(devices), "cuda": torch.version.cuda}
    assert {"yaml", "test", "dev"} <= {extra["name"] for extra in document["extras"]}


def test_a_torch_that_cannot_be_imported_is_a_problem() -> None:
    """The page says so, and the exit code is 1."""
    program = "import sys; sys.modules['torch'] = None; from ckptkit.cli import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "problem: torch is installed and cannot be imported" in done.stdout


def test_a_checkout_without_an_installation_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an installation no requirement is known: the page says so instead of failing."""
    found = Distribution.from_name

    def from_name(name: str) -> Distribution:
        if name == "ckptkit":
            raise PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(Distribution, "from_name", from_name)
    ran = run_ckpt(capsys, "doctor")
    assert (ran.code, "problem: ckptkit is not installed" in ran.out) == (1, True)
    ran = run_ckpt(capsys, "doctor", "--json")
    assert (json.loads(ran.out)["ckptkit"], json.loads(ran.out)["packages"]) == (None, [])


def test_another_program_of_the_same_name_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another ``ckpt`` that comes first on PATH is named."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir()
        (folder / "ckpt").write_text("#!/bin/sh\n", encoding="utf-8")
        (folder / "ckpt").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(ours / "python"))
    monkeypatch.setenv("PATH", f"{other}{os.pathsep}{ours}")
    ran = run_ckpt(capsys, "doctor")
    assert (ran.code, f"problem: {other}/ckpt comes first on PATH" in ran.out) == (1, True)


def test_a_package_that_is_not_installed_has_no_version(tmp_path: Path) -> None:
    """``ckpt -V`` says so, where ckptkit is on the path of Python without being installed."""
    for name in ("ckptkit", "click", "tabulate"):
        origin = Path(str(importlib.import_module(name).__file__))
        origin = origin.parent if origin.name == "__init__.py" else origin
        (tmp_path / origin.name).symlink_to(origin)
    command = [sys.executable, "-S", "-m", "ckptkit", "-V"]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ckpt: ckptkit is not installed, so it has no version\nhint: see ckpt doctor\n"
