"""Modules of the libraries that quantise take the parts that the library wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptkit import load_into, open_checkpoint
from ckptkit.errors import CkptkitError
from tests.helpers_outputs import same_state


def bitsandbytes_int8(seed: int) -> nn.Module:
    """Return a linear layer that bitsandbytes quantised in eight bits."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(seed)
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False).to("cpu")
    return nn.ModuleDict({"a": layer})


def compressed(kind: str) -> Callable[[int], nn.Module]:
    """Return a function that makes a linear layer, compressed by compressed-tensors."""

    def made(seed: int) -> nn.Module:
        quantization = pytest.importorskip("compressed_tensors.quantization")
        compressors = pytest.importorskip("compressed_tensors.compressors")
        torch.manual_seed(seed)
        model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False)})
        options: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel"}
        if kind == "pack-quantized":
            options = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        weights = quantization.QuantizationArgs(symmetric=True, **options)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
        config = quantization.QuantizationConfig(config_groups={"g": scheme}, format=kind, quantization_status="frozen")
        quantization.apply_quantization_config(model, config)
        scales = model.get_parameter("a.weight_scale")
        with torch.no_grad():
            scales.copy_(model.get_parameter("a.weight").abs().reshape(*scales.shape, -1).amax(-1) / 7)
        compressors.ModelCompressor(quantization_config=config).compress_model(model)
        return model

    return made


LIBRARIES: dict[str, Callable[[int], nn.Module]] = {
    "bitsandbytes int8": bitsandbytes_int8,
    "compressed-tensors fp8": compressed("float-quantized"),
    "compressed-tensors int4": compressed("pack-quantized"),
}


@pytest.mark.parametrize("made", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_modules_of_libraries_take_their_own_parts(made: Callable[[int], nn.Module], tmp_path: Path) -> None:
    """A module of the library that wrote the parts gets them all, and a plain layer of the same shape refuses them."""
    model, donor = made(0), made(1).state_dict()
    save_file({key: value.contiguous() for key, value in donor.items()}, tmp_path / "q.safetensors")
    with open_checkpoint(tmp_path / "q.safetensors") as checkpoint:
        assert load_into(model, checkpoint).coverage == 1
        assert same_state(model.state_dict(), donor)
        plain = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False)})
        with pytest.raises(CkptkitError, match="the base has"):
            load_into(plain, checkpoint, on_mismatch="skip")
