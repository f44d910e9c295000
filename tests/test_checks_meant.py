"""Checks and preflight judge tensors of zeros or of one number by one list."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptkit import run_checks, stats
from ckptkit.checks.fresh import judge_values
from ckptkit.core.checkpoint import TensorInfo

ZEROS = {
    "B of LoRA": ("q.lora_B.weight", True),
    "B of LoRA in a live model": ("q.lora_B.default.weight", True),
    "up of kohya": ("lora_unet_q.lora_up.weight", True),
    "A of an embedding": ("e.lora_embedding_A", True),
    "OFT": ("q.oft_R.default", True),
    "LoHa": ("q.hada_w2_a", True),
    "MiSS": ("q.miss_block", True),
    "a table of positions": ("relative_position_bias_table", True),
    "a mask token": ("mask_token", True),
    "a convolution of a ControlNet": ("zero_convs.0.0.weight", True),
    "a zero of a quantizer": ("layers.0.meta.zero", True),
    "a name with capitals": ("block.zeroConv.weight", True),
    "embeddings of positions": ("decoder.embed_positions.weight", True),
    "zero in another word": ("zerox.weight", False),
    "zero at the end of another word": ("nonzero.weight", False),
    "position in another word": ("decomposition.weight", False),
    "A of LoRA": ("q.lora_A.weight", False),
    "a weight": ("q.weight", False),
}


@pytest.mark.parametrize(("key", "is_meant"), ZEROS.values(), ids=ZEROS.keys())
def test_zeros_are_judged_alike(key: str, *, is_meant: bool) -> None:
    state = {key: torch.zeros(8, 8)}
    found = {finding.code for finding in run_checks(state).findings}
    assert ("all-zero" in found) == (not is_meant)
    numbers = stats(state).tensors[key].numbers
    assert numbers is not None
    judgement = judge_values(TensorInfo(key, "F32", (8, 8)), numbers, nn.Module())
    assert (judgement.kind == "zero") == (not is_meant)
