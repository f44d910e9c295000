"""torchao's own loader reads what ckptkit renames, filters, shards and merges of its flattened files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ckptkit import convert, execute, merge, parse_rules, plan_remap

torchao = pytest.importorskip("torchao")
support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
quantization = pytest.importorskip("torchao.quantization")

CONFIGS: dict[str, Callable[[], Any]] = {
    name: getattr(quantization, name)
    for name in ("Float8WeightOnlyConfig", "Int8WeightOnlyConfig", "IntxWeightOnlyConfig")
    if hasattr(quantization, name)
}


def flattened(path: Path, config: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a quantised model in torchao's layout, and return its dequantised tensors."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "head": nn.Linear(64, 32)})
    quantization.quantize_(model["body"], CONFIGS[config]())
    state = {key: getattr(value, "data", value) for key, value in model.state_dict().items()}
    try:
        tensors, metadata = support.flatten_tensor_state_dict(state)
    except ValueError as error:
        pytest.skip(f"torchao does not flatten it: {error}")
    save_file(tensors, path, metadata)
    return {key: plain(value) for key, value in state.items()}


def plain(tensor: Any) -> torch.Tensor:
    return tensor.dequantize() if type(tensor) is not torch.Tensor else tensor


def unflattened(*paths: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what torchao reads, dequantised, and what it leaves over."""
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata |= dict(file.metadata())
    found, left = support.unflatten_tensor_state_dict(tensors, metadata)
    return {key: plain(value) for key, value in found.items()}, left


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("config", CONFIGS)
def test_renamed_filtered_and_sharded_files_load(config: str, tmp_path: Path) -> None:
    """Every tensor has the value that it had, under its new name, and nothing is left over."""
    source = tmp_path / "ao.safetensors"
    wanted = flattened(source, config)
    out = tmp_path / "out.safetensors"
    execute(plan_remap(source, ["body.*=model.layers.*"]), source, out, verify=True)
    found, left = unflattened(out)
    assert not left
    assert_same(found, {key.replace("body.", "model.layers."): value for key, value in wanted.items()})
    kept = tmp_path / "kept.safetensors"
    execute(plan_remap(source, parse_rules(drop=["body.1.*"])), source, kept)
    assert_same(unflattened(kept)[0], {key: value for key, value in wanted.items() if not key.startswith("body.1.")})
    convert(out, tmp_path / "shards", format="safetensors", max_shard_size=6000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert unflattened(*shards)[0].keys() == found.keys()


@pytest.mark.parametrize("config", CONFIGS)
def test_merged_files_load(config: str, tmp_path: Path) -> None:
    """The base gets the quantised tensors of a donor under its own names, with the donor's values."""
    base, donor, out = (tmp_path / f"{name}.safetensors" for name in ("base", "donor", "out"))
    flattened(base, config, seed=0)
    wanted = flattened(donor, config, seed=1)
    renamed = tmp_path / "renamed.safetensors"
    execute(plan_remap(donor, ["*=wrapped.*"]), donor, renamed)
    merge(base, renamed, out, ["wrapped.*=*"])
    found, left = unflattened(out)
    assert not left
    assert_same(found, wanted)
