"""The script of DeepSpeed makes the weights that are read from a ZeRO checkpoint."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptkit.formats import open_checkpoint
from tests.formats.test_zero import save_stage2, save_stage3


@pytest.mark.parametrize("save", [save_stage2, save_stage3])
def test_the_script_of_deepspeed_agrees(tmp_path: Path, save: Callable[[Path], Path]) -> None:
    """Where DeepSpeed is installed, its script makes the same weights, cast to F32."""
    script = pytest.importorskip("deepspeed.utils.zero_to_fp32")
    directory = save(tmp_path / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        converted = script.get_fp32_state_dict_from_zero_checkpoint(str(directory))
    with open_checkpoint(directory) as checkpoint:
        assert set(checkpoint) == set(converted)
        for key, tensor in converted.items():
            assert torch.equal(checkpoint.read(key).to(tensor.dtype), tensor), key
