"""Each block of the README and of the documentation runs, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers_cli import ROOT
from tests.helpers_pages import PAGES, PageRunner, needs


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if not needs(page)])
def test_blocks_run(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands and the Python of a page run in order, in a copy of the fixtures."""
    PageRunner(tmp_path, capfd, monkeypatch).run(PAGES[name])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(name for name in PAGES if name != "README.md")])
def test_linked_files_exist(name: str) -> None:
    """The files that a page links to or names exist."""
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if not link.startswith("`")]
    for link in links:
        assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"
    for path in re.findall(r"`((?:tests|fixtures|\.ci)/[\w./]+)`", text):
        assert (ROOT / path).exists(), f"{name} names {path}"
