"""What the documentation says about installing agrees with ``pyproject.toml``."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from tests.helpers_cli import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")


def test_the_page_lists_every_extra() -> None:
    """The table has a row for each extra, in the order of ``pyproject.toml``."""
    assert re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE) == list(PROJECT["optional-dependencies"])


def test_the_page_has_the_lowest_versions() -> None:
    """The page has the lowest versions of Python and torch."""
    assert PROJECT["requires-python"] == ">=" + re.findall(r"Python ([\d.]+) or later", PAGE)[0]
    assert f"torch>={re.findall(r'torch ([0-9.]+) or later', PAGE)[0]}" in PROJECT["dependencies"]


def test_the_environment_file_installs_this_package() -> None:
    """The file for conda is valid YAML, takes the Python that the package needs, and gives pip the checkout."""
    yaml = pytest.importorskip("ruamel.yaml")
    path = ROOT / "docs" / "environment.yml"
    table = yaml.YAML(typ="safe").load(path)
    assert list(table) == ["name", "dependencies"]
    python, pip, requirements = table["dependencies"]
    assert (table["name"], pip) == (PROJECT["name"], "pip")
    assert python == f"python{PROJECT['requires-python']}"
    assert [(path.parent / place).resolve() for place in requirements["pip"]] == [ROOT.resolve()]
