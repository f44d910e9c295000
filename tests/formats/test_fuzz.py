"""Thousands of damaged files give a CkptkitError or the tensors that other libraries read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.features import needs_module
from tests.formats.mutate import run

SEED = 20


@pytest.mark.parametrize(
    ("kind", "count", "agreed"),
    [
        ("safetensors", 1000, 50),
        ("zip", 900, 60),
        ("legacy", 700, 40),
        ("tar", 600, 0),
        ("index", 400, 0),
        ("gguf", 600, 60),
        pytest.param("pt2", 500, 0, marks=needs_module("torch.export.pt2_archive")),
        ("npy", 500, 60),
        ("npz", 500, 60),
        ("dcp", 600, 3),
        ("torchscript", 300, 0),
        ("delta", 120, 2),
        ("ranks", 200, 0),
        ("shards", 150, 0),
        ("llama", 150, 0),
        ("universal", 150, 0),
    ],
)
def test_damaged_files_are_refused_or_read_as_other_libraries_do(
    tmp_path: Path, kind: str, count: int, agreed: int
) -> None:
    """``run`` compares; the counts prove that enough damaged files were compared, and enough refused."""
    ends = run(kind, count, SEED, tmp_path)
    assert ends["accepted"] + ends["refused"] == count
    assert ends["refused"] > count // 4
    assert ends["accepted"] > count // 60
    assert ends["agreed"] >= agreed
