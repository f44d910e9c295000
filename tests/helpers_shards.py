"""A small state in two shards with an index, and how to spoil the index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

STATE = {"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.ones(2, dtype=torch.bfloat16), "c.w": torch.arange(4)}
TOTAL = 24 + 4 + 32
NAMES = {
    "safetensors": (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ),
    "bin": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
}


def save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), path, {"format": "pt"})
    else:
        torch.save(dict(state), path)


def shard(directory: Path, kind: str = "safetensors", total: Any = TOTAL) -> Path:
    """Write the state as two shards; return the path of the index."""
    directory.mkdir(exist_ok=True)
    first, second, index = NAMES[kind]
    save({key: STATE[key] for key in ("a.w", "a.b")}, directory / first)
    save({"c.w": STATE["c.w"]}, directory / second)
    weight_map = {"a.w": first, "a.b": first, "c.w": second}
    (directory / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return directory / index


def edit(index: Path, **weight_map: Any) -> None:
    document = json.loads(index.read_text())
    document["weight_map"] = {key: value for key, value in (document["weight_map"] | weight_map).items() if value != ""}
    index.write_text(json.dumps(document))
