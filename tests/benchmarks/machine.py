"""The machine and the versions, in plain words."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["busy", "describe"]


def describe() -> str:
    """Return the day, the processor, the memory, the system and the versions, in one sentence."""
    now = datetime.now(UTC)
    processor = _first(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.machine()
    memory = int(_first(Path("/proc/meminfo"), r"MemTotal:\s*(\d+)") or 0) / 1e6
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "safetensors", "numpy", "click"))
    return (
        f"{now.day} {now:%B %Y}, {os.cpu_count()} cores ({processor.strip()}), {memory:.0f} GB of memory, "
        f"{platform.system()}, Python {platform.python_version()}, {versions}"
    )


def busy() -> float:
    """Return how many processes were ready to run, on average of the last minute."""
    return os.getloadavg()[0]


def _first(path: Path, pattern: str) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(missing)"
