"""The pages of the documentation that need foreign libraries run, and print what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers_pages import PAGES, PageRunner, needs


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if needs(page)])
def test_blocks_run(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands and the Python of a page run in order, in a copy of the fixtures."""
    for module in needs(PAGES[name]):
        pytest.importorskip(module)
    assert PageRunner(tmp_path, capfd, monkeypatch).run(PAGES[name]) > 0
