"""Running the command line inside the test process, from the root of the checkout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ckptkit.cli import main

__all__ = ["ROOT", "Ran", "run_ckpt"]

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def run_ckpt(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """Run ``ckpt`` with these arguments and return what came of it."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return Ran(code, said.out, said.err)
