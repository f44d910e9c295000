"""ckptkit is built, installed and used as a stranger would, and leaves the libraries of an environment alone.

``tests/compat/run`` shows the last with torch 2.4.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_cli import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = list(PROJECT["optional-dependencies"])
NAMES = [f"ckptkit-{PROJECT['version']}.tar.gz", f"ckptkit-{PROJECT['version']}-py3-none-any.whl"]
CONSTRAINTS = str(ROOT / "constraints.txt")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, as in the environment that has it, and return what it prints."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def resolved(folder: Path, *arguments: str | Path, cwd: Path | None = None) -> list[str]:
    """Return the names of the distributions that pip would install."""
    report = folder / "report.json"
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", report)
    run(*command, *arguments, cwd=folder if cwd is None else cwd)
    return [item["metadata"]["name"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    """A folder with the sdist, and with the wheel that was built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(python, "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, "hatchling", cwd=folder)
    run(python, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    with tarfile.open(folder / NAMES[0]) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    return folder


def test_the_sdist_has_what_its_tests_need(built: Path) -> None:
    """The sdist has every file of the repository, but for what only git reads."""
    with tarfile.open(built / NAMES[0]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).split())
    assert tracked - packed <= {".git-blame-ignore-revs", ".gitignore"}


def test_the_wheel_has_the_package_alone(built: Path) -> None:
    """The wheel has every file of the package, and nothing else but its metadata."""
    with zipfile.ZipFile(built / NAMES[1]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == set(run("git", "ls-files", "ckptkit", cwd=ROOT).split())


def test_a_clean_environment(built: Path, python: Path, tmp_path: Path) -> None:
    """In a new environment the wheel brings what it needs, and the command and the package run."""
    run(python, "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS, built / NAMES[1], cwd=tmp_path)
    ckpt = python.parent / "ckpt"
    assert run(ckpt, "-V", cwd=tmp_path) == f"ckpt {PROJECT['version']}\n"
    assert "nothing is missing that ckpt needs" in run(ckpt, "doctor", cwd=tmp_path)
    shown = run(ckpt, "show", ROOT / "fixtures" / "lenet_10class.pth", cwd=tmp_path)
    assert "10 tensors, 62,006 elements" in shown
    program = "import ckptkit; ckptkit.diff; print(ckptkit.__version__, ckptkit.__file__)"
    version, place = run(python, "-c", program, cwd=tmp_path).split()
    assert version == PROJECT["version"]
    assert Path(place).is_relative_to(python.parent.parent)


def test_installing_replaces_no_library(tmp_path: Path) -> None:
    """pip says what it would install where torch and the other dependencies are there already: ckptkit alone."""
    assert resolved(tmp_path, ROOT) == ["ckptkit"]


def test_extras_resolve(tmp_path: Path) -> None:
    """pip finds versions that fit for all extras together, and so for each, with the versions of the tests."""
    names = resolved(tmp_path, "--ignore-installed", "-c", CONSTRAINTS, f"{ROOT}[{','.join(EXTRAS)}]")
    assert {"ckptkit", "torch", "safetensors", "click", "tabulate"} <= set(names)


def test_a_git_url(tmp_path: Path) -> None:
    """pip installs from the address of the repository, as the documentation says."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout of the repository")
    address = f"git+file://localhost{ROOT}"  # old versions of pip refuse an address without a host
    assert resolved(tmp_path, "--no-deps", "--ignore-installed", f"ckptkit[yaml] @ {address}") == ["ckptkit"]


def test_the_pip_part_of_the_environment_for_conda(tmp_path: Path) -> None:
    """pip takes the requirements of docs/environment.yml as conda gives them: as a file, beside that file."""
    yaml = pytest.importorskip("ruamel.yaml")
    (requirements,) = [
        item["pip"]
        for item in yaml.YAML(typ="safe").load(ROOT / "docs" / "environment.yml")["dependencies"]
        if isinstance(item, dict)
    ]
    (tmp_path / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
    asked = ("--no-deps", "-r", tmp_path / "requirements.txt")
    assert resolved(tmp_path, *asked, cwd=ROOT / "docs") == ["ckptkit"]
