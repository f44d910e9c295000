"""What two processes save with torch, once for all tests and workers of a run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.helpers_dcp import save_by_ranks


@pytest.fixture(scope="session")
def saved_by_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that ``save_by_ranks`` wrote. Tests only read it, or damage a copy."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers of one run share it
    directory = root / "saved-by-ranks"
    with (root / "saved-by-ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            directory.mkdir()
            save_by_ranks(directory)
            (directory / "done").touch()
    return directory
