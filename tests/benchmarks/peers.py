"""The peers, and a virtual environment for each: found in a folder, or made there."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.reasons import last_error

__all__ = ["PEERS", "Peer", "prepare"]

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@dataclass(frozen=True)
class Peer:
    """What to install from the package index, how the report calls it, and what it is for."""

    requirement: str
    does: str
    label: str = ""
    beside: tuple[str, ...] = ()  # what the script of its rows needs, too

    @property
    def name(self) -> str:
        """The name of its distribution, and of the folder of its environment."""
        return re.split(r"[\[=]", self.requirement)[0]

    @property
    def title(self) -> str:
        """Its name and version for the report."""
        return f"{self.label or self.name} {self.requirement.rpartition('=')[2]}"


PEERS = (
    Peer("sft-cli[torch]==0.2.2", "inspects and edits safetensors files"),
    Peer("mergekit==0.1.5", "merges the values of models"),
    Peer("ckptkit[all]==0.3.0", "another project of the same name: inspects and compares", "ckptkit of the index"),
    Peer("weightscope==0.4.3", "compares the values of models"),
    Peer("reminis==0.34.0", "keeps models and their deltas in databases"),
    Peer("tensortracker==0.1.0", "writes patches of safetensors files"),
    Peer("ptloader==0.3.0", "reads torch files as numpy arrays, without torch"),
    Peer("bitsandbytes==0.50.2", "quantises and dequantises weights", beside=("safetensors",)),
)


def prepare(folder: Path, one: Peer) -> str:
    """Make the environment of a peer unless it is there, and return the reason where that fails, else nothing."""
    environment = folder / one.name
    done = environment / "installed.txt"
    if done.exists() and done.read_text(encoding="utf-8") == one.requirement:
        return ""
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(environment)],
        [
            str(environment / "bin" / "pip"),
            "install",
            "--no-input",
            "-c",
            str(CONSTRAINTS),
            one.requirement,
            *one.beside,
        ],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            return last_error(ran.stderr)
    done.write_text(one.requirement, encoding="utf-8")
    return ""
