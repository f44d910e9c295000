"""Codes and companions are recognised as one quantised weight, and ordinary tensors never are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.quantized import Quantized, quantized_weights


def found_in(tensors: dict[str, Tensor]) -> Quantized:
    """Return the quantised weights in a state_dict."""
    return quantized_weights(as_checkpoint(tensors, "found"))


F8 = torch.float8_e4m3fn
WEIGHT = torch.zeros(8, 8)
SCALE = torch.ones(2, 2)

QUANTIZED = {
    "fp8, blocks": ("fp8", {"weight": WEIGHT.to(F8), "weight_scale_inv": SCALE}),
    "fp8, one scale": ("fp8", {"weight": WEIGHT.to(F8), "weight_scale": torch.ones(1), "input_scale": torch.ones(1)}),
    "fp8 of ComfyUI": ("fp8", {"weight": WEIGHT.to(F8), "scale_weight": torch.ones(())}),
    "bitsandbytes int8": ("bitsandbytes int8", {"weight": WEIGHT.to(torch.int8), "SCB": torch.ones(8)}),
}


@pytest.mark.parametrize(("scheme", "parts"), QUANTIZED.values(), ids=QUANTIZED)
def test_parts_are_one_weight(scheme: str, parts: dict[str, Tensor]) -> None:
    """The parts of a scheme are one weight, and other tensors are not part of the weight."""
    state = {"norm.weight": torch.ones(8)} | {f"layers.0.q.{name}": tensor for name, tensor in parts.items()}
    (weight,) = found_in(state).weights
    assert (weight.key, weight.scheme) == ("layers.0.q.weight", scheme)
    assert weight.parts == tuple(key for key in state if key != "norm.weight")
    assert weight.coded in weight.parts


ORDINARY = {
    "a parameter named like a scale": {"weight": WEIGHT, "weight_scale": torch.ones(1)},
    "fp8 without scales": {"weight": WEIGHT.to(F8), "bias": torch.ones(8)},
}


@pytest.mark.parametrize("state", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_tensors_are_not_quantised(state: dict[str, Tensor]) -> None:
    """A name alone makes no companion, and a dtype alone makes no codes."""
    assert not found_in({f"layers.0.q.{name}": tensor for name, tensor in state.items()})
