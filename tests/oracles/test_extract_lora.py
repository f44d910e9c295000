"""An adapter that is extracted from a tuned model loads in PEFT without a missing key, and gives the tuned weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import extract_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 32}


class Net(nn.Module):
    """Every layer that PEFT adapts, and some that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        self.deep = nn.Conv3d(2, 6, 2)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.inner_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(3))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Embedding(9, 6)
    )


def language_model(name: str, config: str, **settings: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    return model.eval()


MODELS: dict[str, Any] = {
    "llama": lambda: language_model("LlamaForCausalLM", "LlamaConfig", intermediate_size=24, **SMALL),
    "tied llama": lambda: language_model(
        "LlamaForCausalLM", "LlamaConfig", intermediate_size=24, tie_word_embeddings=True, attention_bias=True, **SMALL
    ),
    "bert": lambda: language_model("BertForMaskedLM", "BertConfig", intermediate_size=24, **SMALL),
    "bert without a head": lambda: language_model("BertModel", "BertConfig", intermediate_size=24, **SMALL),
    "gpt2": lambda: language_model("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "opt": lambda: language_model(  # its positions are an embedding with a forward of its own
        "OPTForCausalLM", "OPTConfig", ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, **SMALL
    ),
    "t5": lambda: language_model(
        "T5ForConditionalGeneration", "T5Config", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50
    ),
    "vit": lambda: language_model(
        "ViTModel", "ViTConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    ),
    "convolutions": Net,
    "numbers": sequential,
}  # fmt: skip


LOST = {"convolutions": {"scale"}, "vit": {"embeddings.cls_token", "embeddings.position_embeddings"}}
# save_pretrained leaves out the other embeddings of an encoder and a decoder, so that their names are not known.
MERGED_ONLY = {("t5", "directory")}


def tuned_from(model: nn.Module, rank: int = 2) -> nn.Module:
    """Return a copy with an update of low rank in every weight, and with other biases, norms and buffers."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    tuned = copy.deepcopy(model)
    done: set[int] = set()
    for value in tuned.state_dict().values():
        if not value.is_floating_point() or value.data_ptr() in done:
            continue
        done.add(value.data_ptr())
        flat = value.data.flatten(1) if value.dim() > 1 else None
        change = randn(*value.shape) if flat is None else randn(len(flat), rank) @ randn(rank, flat.shape[1])
        value.data += change.reshape(value.shape).abs() if flat is None else change.reshape(value.shape)
    return tuned


def merged(base: nn.Module, adapter: Path) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """Return the state that PEFT merges from an adapter, and the model with the adapter in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|inconsistency|fan_in_fan_out).*")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter)
        state = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload().state_dict()
    return state, model


@pytest.mark.parametrize("source", ["model", "file", "directory"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_was_extracted(name: str, source: str, tmp_path: Path) -> None:
    """The truth is a live model, a torch file without a configuration, or what ``save_pretrained`` writes."""
    torch.manual_seed(0)
    base = MODELS[name]()
    tuned = tuned_from(base)
    sides: list[Any] = [base, tuned]
    if source == "file":
        sides = [tmp_path / "base.pt", tmp_path / "tuned.pt"]
        for model, path in zip((base, tuned), sides, strict=True):
            torch.save(model.state_dict(), path)
    elif source == "directory":
        if name in ("convolutions", "numbers", "vit"):
            pytest.skip("the model has no save_pretrained, or saves other names than it has")
        sides = [tmp_path / "base", tmp_path / "tuned"]
        for model, path in zip((base, tuned), sides, strict=True):
            model.save_pretrained(path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    asked: Any = {"3.weight": "embedding"} if name == "numbers" else "auto"  # no file tells that
    written = extract_lora(sides[0], sides[1], adapter / "adapter_model.safetensors", 8, as_layer=asked)
    assert written.plan is not None
    lost = {drop.key for drop in written.plan.dropped if drop.reason.startswith("it changed")}
    assert lost == LOST.get(name, set())
    state, model = merged(base, adapter)
    for key, value in tuned.state_dict().items():
        if key not in lost:
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-4)
    if hasattr(base, "config") and name != "vit" and (name, source) not in MERGED_ONLY:
        tokens = torch.arange(10)[None]
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if name == "t5" else {})
        with torch.no_grad():
            found, wanted = model(**inputs)[0], tuned(**inputs)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
