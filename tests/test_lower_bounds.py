"""The lower bounds of the dependencies are the versions that ``tests/compat/run`` tests."""

from __future__ import annotations

import re
import tomllib

from tests.helpers_cli import ROOT


def test_every_lower_bound_is_tested() -> None:
    """The oldest environment has exactly the lower bound of each dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(re.fullmatch(r"(\w+)>=([\d.]+)", line).groups() for line in project["dependencies"])  # type: ignore[union-attr]
    pins = dict(
        re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "tests/compat/2.4.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {name: pins[name].removesuffix(".0") for name in pins} == {
        name: bound.removesuffix(".0") for name, bound in bounds.items()
    }
