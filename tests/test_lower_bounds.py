"""The lower bounds of the dependencies are the versions that ``tests/compat/run`` tests."""

from __future__ import annotations

import re
import tomllib

from tests.helpers_cli import ROOT


def test_every_lower_bound_is_tested() -> None:
    """The oldest environment has exactly the lower bound of each dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "tests/compat/2.4.txt").read_text(encoding="utf-8")
    for line in project["dependencies"]:
        name, bound = line.split(">=")
        assert re.search(rf"^{name}=={re.escape(bound)}(\.0)?$", pins, re.MULTILINE), line
    assert len(re.findall("==", pins)) == len(project["dependencies"])
