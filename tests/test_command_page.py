"""The page of the commands in the documentation shows what ``--help`` shows, as text that can be copied."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from ckptkit.cli.common.program import ckpt
from tests.helpers_cli import ROOT


@pytest.fixture(scope="module")
def page() -> Any:
    """The extension, which is not in a package."""
    spec = importlib.util.spec_from_file_location("command_page", ROOT / "docs" / "command_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_code(page: Any) -> None:
    """Lines that begin with a command are a block of code; in other text no character is markup."""
    lines = [
        "Keys as in 'a.*' for --rename.",
        "",
        "| A PATH is a file.",
        "",
        "| ckpt show a.pt --keep 'a.*'",
        "| ckpt -V",
    ]
    page.format_description(None, None, lines)
    assert lines == [
        r"Keys as in 'a.\*' for ``--rename``.", "", "A PATH is a file.", "",
        "", ".. code-block:: sh", "", "    ckpt show a.pt --keep 'a.*'", "    ckpt -V", "",
    ]  # fmt: skip


def test_options_are_in_the_sections_of_the_help(page: Any) -> None:
    """The options have the order and the titles of ``--help-all``, and none is lost."""
    command = ckpt.get_command(SimpleNamespace(), "remap")  # type: ignore[arg-type]
    names = [name for _, section in command.sections() for name in section]  # type: ignore[union-attr]
    lines = [line for name in sorted(names) for line in (f".. option:: {name} <X>", "", "    **Required** a*", "")]
    page.format_options(None, SimpleNamespace(command=command), lines)
    assert [line.split()[2] for line in lines if line.startswith(".. option:: ")] == names
    assert [line for line in lines if "rubric" in line] == [".. rubric:: Rules for keys", ".. rubric:: Output"]
    assert lines[2] == r"    **Required** a\*"
