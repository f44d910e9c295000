"""Adapters of PEFT: the weights must agree with the configuration file, which gives their scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit.formats import open_checkpoint
from tests.helpers_formats import assert_same, refusal

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0,
    "base_model_name_or_path": "some/base", "rank_pattern": {}, "alpha_pattern": {"v_proj": 16}, "bias": "none",
    "task_type": None, "target_parameters": None,
}  # fmt: skip
OUTER = "base_model.model.model"
BASE = "this is an adapter: the file does not contain the weights of the base model 'some/base' (hf:some/base)"


def lora(module: str, rank: int) -> dict[str, torch.Tensor]:
    """Return the two factors of one module, with the keys of PEFT."""
    if module.endswith("tokens"):
        return {f"{OUTER}.{module}.lora_embedding_A": torch.ones(rank, 50),
                f"{OUTER}.{module}.lora_embedding_B": torch.ones(16, rank)}  # fmt: skip
    end = (1, 1) if "conv" in module else ()
    return {f"{OUTER}.{module}.lora_A.weight": torch.ones(rank, 16, *end),
            f"{OUTER}.{module}.lora_B.weight": torch.ones(16, rank, *end)}  # fmt: skip


def save(directory: Path, state: Mapping[str, torch.Tensor], **config: Any) -> Path:
    save_file(dict(state), directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return directory


Q = lora("layers.0.self_attn.q_proj", 4)
V = lora("layers.0.self_attn.v_proj", 2)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_has_weights_and_a_configuration(tmp_path: Path, kind: str) -> None:
    save(tmp_path, Q)
    if kind == "bin":
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save(Q, tmp_path / "adapter_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, Q)
        assert checkpoint.warnings == (BASE,)
        (entry,) = checkpoint.entries
    assert (entry.path, entry.type, entry.is_outside) == ("adapter_config.json", "json", True)
    assert entry.value == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "some/base", "rank_pattern": {}, "alpha_pattern": {"v_proj": 16},
        "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip


RANKS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]] = {
    "as r says": (Q, {}, []),
    "an embedding": (lora("embed_tokens", 4), {}, []),
    "a convolution": (lora("conv", 4), {}, []),
    "another": (V, {}, ["v_proj.lora_A.weight' has rank 2, but adapter_config.json gives 4", "v_proj.lora_B.weight'"]),
    "another embedding": (
        lora("embed_tokens", 3),
        {},
        ["embedding_A' has rank 3", "embedding_B' has rank 3"],
    ),
    "as the pattern says": (Q | V, {"rank_pattern": {"v_proj": 2}}, []),
    "as a longer pattern says": (Q | V, {"rank_pattern": {"self_attn.v_proj": 2}}, []),
    "as the whole name says": (Q | V, {"rank_pattern": {"^model.layers.0.self_attn.v_proj": 2}}, []),
    "not as the pattern says": (
        Q,
        {"rank_pattern": {"q_proj": 2}},
        ["q_proj.lora_A.weight' has rank", "q_proj.lora_B"],
    ),
    "the first pattern wins": (V, {"rank_pattern": {"v_proj": 2, "self_attn.v_proj": 8}}, []),
    "half a name is none": (V, {"r": 2, "rank_pattern": {"proj": 9, "^v_proj": 9}}, []),
    "regular expressions are not evaluated": (V, {"rank_pattern": {"(a|aa)+$": 9}}, []),
    "parameters have ranks of their own": (V, {"target_parameters": ["experts.gate"]}, []),
    "another method": (V, {"peft_type": "IA3"}, []),
    "no rank": (V, {"r": None}, []),
    "a rank of another kind": (V, {"r": "4", "rank_pattern": [1]}, []),
}


@pytest.mark.parametrize("case", RANKS)
def test_a_tensor_of_another_rank_than_the_configuration_is_named(tmp_path: Path, case: str) -> None:
    state, config, expected = RANKS[case]
    with open_checkpoint(save(tmp_path, state, **config)) as checkpoint:
        first, *others = checkpoint.warnings
        assert first == BASE
        assert len(others) == len(expected)
        assert all(part in text for part, text in zip(expected, others, strict=True)), others


def test_many_wrong_ranks_are_counted(tmp_path: Path) -> None:
    state = {key: tensor for n in range(50) for key, tensor in lora(f"layers.{n}.v_proj", 2).items()}
    with open_checkpoint(save(tmp_path, state)) as checkpoint:
        assert len(checkpoint.warnings) == 6
        assert checkpoint.warnings[-1] == "96 more tensors of another rank than in adapter_config.json"


def test_without_its_configuration_the_scale_is_unknown(tmp_path: Path) -> None:
    """Row H16 of the table of hostile input."""
    save(tmp_path, Q)
    (tmp_path / "adapter_config.json").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.warnings == (
            "no adapter_config.json in the directory of the weights: the scale (lora_alpha / r) is unknown",
        )


def test_a_broken_configuration_gets_one_warning(tmp_path: Path) -> None:
    save(tmp_path, Q)
    (tmp_path / "adapter_config.json").write_text("{")
    with open_checkpoint(tmp_path) as checkpoint:
        assert [
            text.startswith("adapter_config.json cannot be read: the file is not JSON") for text in checkpoint.warnings
        ] == [True]


def test_a_configuration_without_weights_is_refused(tmp_path: Path) -> None:
    """H16: a failed download can leave only the configuration."""
    save(tmp_path, Q)
    (tmp_path / "adapter_model.safetensors").unlink()
    error = refusal(str(tmp_path))
    assert error.reason == "holds adapter_config.json, but not the weights of the adapter"
    assert error.hint == "the file of weights must be called adapter_model.safetensors or adapter_model.bin"
