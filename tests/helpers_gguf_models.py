"""Small models of transformers, written as GGUF files by gguf-py, as the converters of llama.cpp write them."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

__all__ = ["MODELS", "saved_tensors", "tiny", "write_gguf"]

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# The architecture in GGUF, the class of transformers without ForCausalLM, and its configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LLAMA", "Llama", {"attention_bias": True}),
    "mistral": ("LLAMA", "Mistral", {"head_dim": 32}),
    "mixtral": ("LLAMA", "Mixtral", {"num_local_experts": 4}),
    "arcee": ("ARCEE", "Arcee", {}),
    "granite": ("GRANITE", "Granite", {}),
    "smollm3": ("SMOLLM3", "SmolLM3", {}),
    "olmo": ("OLMO", "Olmo", {}),
    "olmo2": ("OLMO2", "Olmo2", {}),
    "olmoe": ("OLMOE", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("QWEN2", "Qwen2", {}),
    "qwen2moe": ("QWEN2MOE", "Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 96}),
    "qwen3": ("QWEN3", "Qwen3", {"head_dim": 32}),
    "qwen3moe": ("QWEN3MOE", "Qwen3Moe", {**_EXPERTS, "head_dim": 32}),
    "gemma": ("GEMMA", "Gemma", {"head_dim": 32}),
    "gemma2": ("GEMMA2", "Gemma2", {"head_dim": 32}),
    "gemma3": ("GEMMA3", "Gemma3", {"head_dim": 32}),
    "nemotron": ("NEMOTRON", "Nemotron", {}),
    "command-r": ("COMMAND_R", "Cohere", {"use_qk_norm": True}),
    "cohere2": ("COHERE2", "Cohere2", {}),
    "stablelm": ("STABLELM", "StableLm", {"use_qkv_bias": True}),
    "phi2": ("PHI2", "Phi", {}),
    "phi3": ("PHI3", "Phi3", {}),
    "starcoder2": ("STARCODER2", "Starcoder2", {"use_bias": True}),
    "gpt2": ("GPT2", "GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
_PERMUTED = {"LLAMA", "ARCEE", "GRANITE", "SMOLLM3", "OLMO"}
_WITH_OFFSET = {"GEMMA", "GEMMA2", "GEMMA3", "NEMOTRON"}


def tiny(name: str, **other: int) -> Any:
    """Return a small model with random weights that BF16 holds exactly; ``other`` replaces numbers."""
    import transformers

    _, title, more = MODELS[name]
    torch.manual_seed(len(name))
    head = "LMHeadModel" if title == "GPT2" else "ForCausalLM"
    small = {key: value for key, value in SMALL.items() if title != "GPT2" or key.endswith(("_id", "vocab_size"))}
    config = getattr(transformers, f"{title}{'Text' if title == 'Gemma3' else ''}Config")(**small | more | other)
    model = getattr(transformers, f"{title}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) / 8 + (parameter.dim() == 1) / 2).bfloat16().float())
    return model


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors as ``save_pretrained`` writes them, which a converter reads."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_file(Path(directory) / "model.safetensors")


def write_gguf(name: str, model: Any, path: Path, kind: str = "F32") -> None:
    """Write a model: matrices as ``kind``, and the rest as F32."""
    arch = getattr(gguf.MODEL_ARCH, MODELS[name][0])
    config = model.config
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    layers = config.num_hidden_layers
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for at in ("num_local_experts", "num_experts"):
        if getattr(config, at, None):
            writer.add_expert_count(getattr(config, at))
            writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "rms_norm_eps", None):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(arch, layers)
    experts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for key, value in saved_tensors(model).items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)\.weight", key)
        if match:
            experts[f"{match[1]}.{match[3]}.weight"][int(match[2])] = value
            continue
        _add(writer, MODELS[name][0], names, key, value, (heads, kv_heads), kind)
    for key, parts in experts.items():
        stacked = torch.stack([parts[number] for number in range(len(parts))])
        _add(writer, MODELS[name][0], names, key, stacked, (heads, kv_heads), kind)
    if arch == gguf.MODEL_ARCH.LLAMA:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(  # noqa: PLR0917
    writer: Any, arch: str, names: Any, key: str, value: torch.Tensor, heads: tuple[int, int], kind: str
) -> None:
    for part, count in zip(("q_proj", "k_proj"), heads, strict=True):
        if arch in _PERMUTED and f".{part}." in key:
            halves = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
    if arch in _WITH_OFFSET and key.endswith("norm.weight"):
        value = value + 1
    if arch == "GPT2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        value = value.T
    new = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if new is None:
        raise AssertionError(key)
    data = value.squeeze().float().contiguous().numpy()
    dtype = gguf.GGMLQuantizationType[kind if data.ndim > 1 and "norm" not in key else "F32"]
    writer.add_tensor(new, gguf.quants.quantize(data, dtype), raw_dtype=dtype)
