"""Merges of tensors that are larger than the memory that they may take, as processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

NAMES = ("a", "b", "c")
MOST = 200_000_000  # bytes, of which the interpreter, numpy and ckptkit are a fourth
MERGE = """
import ckptkit
plan = ckptkit.plan_recipe("recipe.toml")
ckptkit.execute(plan, plan.paths, "out.safetensors")
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make three files with one tensor of 160 MB each."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    for name in NAMES:
        rows = rng.standard_normal((100, 4096), dtype=np.float32)
        save_file({"w": np.tile(rows, (100, 1))}, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("method = 'linear'", NAMES),
        ("method = 'slerp'\nt = 0.3", NAMES[:2]),
        ("method = 'karcher'", NAMES),
        ("method = 'ties'\nbase = 'a'\ndensity = 0.2\nweight = 1", NAMES),
        ("method = 'della'\nbase = 'a'\ndensity = 0.5\nweight = 1", NAMES),
    ],
)
def test_one_large_tensor_is_merged_in_bounded_memory(method: str, names: tuple[str, ...], folder: Path) -> None:
    inputs = "".join(f"\n[[input]]\nname = '{name}'\npath = '{name}.safetensors'" for name in names)
    (folder / "recipe.toml").write_text(f"version = 1\n{method}\n{inputs}\n")
    (folder / "out.safetensors").unlink(missing_ok=True)
    run = subprocess.run([sys.executable, "-c", MERGE], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * 1024 < MOST
