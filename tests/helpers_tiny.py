"""Tiny random models of transformers: the default configuration of a class, with small numbers."""

from __future__ import annotations

from typing import Any

import torch

from ckptkit.rules.transformers.skeleton import quiet_library

__all__ = ["model_classes", "tiny_model"]

_MOST_ELEMENTS = 20_000_000
_SMALL: dict[str, int] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embed_dim": 32, "hidden_dim": 32, "dim": 32, "projection_dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "mlp_dim": 64,
    "dense_intermediate_size": 64, "ffn_hidden_size": 64, "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "expert_intermediate_size": 16, "expert_hidden_size": 16,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "depth": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "attention_head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "zero_expert_num": 0,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "vocab_size": 96, "unpadded_vocab_size": 90, "type_vocab_size": 2, "max_position_embeddings": 64,
    "out_hidden_size": 32, "image_size": 64, "audio_token_id": 5, "image_token_id": 6, "video_token_id": 7,
    "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_mel_bins": 16,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "codebook_size": 16, "codebook_dim": 8, "num_codebooks": 2, "num_queries": 8, "num_labels": 2,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 64,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "o_lora_rank": 8, "o_groups": 2, "pooler_hidden_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_classes(name: str) -> list[Any]:
    """Return the classes of a model type, the likeliest first, or the class with this name."""
    import transformers
    from transformers.models.auto import modeling_auto

    if name not in transformers.CONFIG_MAPPING:
        found = getattr(transformers, name, None)
        return [] if found is None else [found]
    config_class = transformers.CONFIG_MAPPING[name]
    tables = ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_MAPPING_NAMES"]
    tables += [table for table in vars(modeling_auto) if table.endswith("_MAPPING_NAMES")]
    names: dict[str, None] = {}
    for table in tables:
        entry = getattr(modeling_auto, table, {}).get(name)
        names |= dict.fromkeys([entry] if isinstance(entry, str) else entry or ())
    found = [getattr(transformers, item, None) for item in names]
    # A class that needs a library that is not installed is a stand-in, and not a module.
    models = [item for item in found if isinstance(item, type) and issubclass(item, torch.nn.Module)]
    return [item for item in models if getattr(item, "config_class", None) is config_class]


def tiny_model(model_class: Any, **more: Any) -> Any:
    """Return a random model of a class, with at most 20 million elements.

    Raises the error of the library for the last attempt where no small configuration can be built.
    """
    error: Exception | None = None
    config_class = model_class.config_class
    with quiet_library():
        for left_out in _ATTEMPTS:
            small = {name: value for name, value in _SMALL.items() if name not in left_out}
            try:
                config = _config(config_class, small, more)
                with torch.device("meta"):
                    elements = sum(tensor.numel() for tensor in model_class(config).state_dict().values())
                if elements > _MOST_ELEMENTS:
                    raise ValueError(f"{elements:,} elements")
                torch.manual_seed(0)
                model = model_class(_config(config_class, small, more))
            except Exception as raised:  # noqa: BLE001 - any error of the library means the next attempt
                error = raised
                continue
            return model
    assert error is not None
    raise error


_HEADS = frozenset({"num_attention_heads", "num_key_value_heads", "num_heads", "head_dim"})
_EXPERTS = frozenset({"num_experts", "num_local_experts", "n_routed_experts"})
# What the attempts leave as it is.
_ATTEMPTS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"image_size"}),
    frozenset({"head_dim", "attention_head_dim"}),
    _HEADS,
    _HEADS | {"hidden_size", "embed_dim", "dim", "hidden_dim"},
    frozenset(_SMALL) - {"num_hidden_layers", "num_layers", "vocab_size"} - _EXPERTS,
    frozenset(_SMALL) - {"num_hidden_layers", "vocab_size"},
    frozenset(_SMALL),
)


def _config(config_class: Any, small: dict[str, Any], more: dict[str, Any]) -> Any:
    """Return the configuration of a class with small numbers, in its parts too; ``more`` are values of any kind."""
    default = config_class()
    values: dict[str, Any] = {}
    parts = getattr(config_class, "sub_configs", {})
    attributes = set(getattr(default, "attribute_map", {}) or {}) | set(default.to_dict())
    for name, value in small.items():
        current = getattr(default, name, None)
        if name in attributes and isinstance(current, int) and not isinstance(current, bool) and current:
            values[name] = value
    values |= {name: value for name, value in more.items() if name in attributes or hasattr(default, name)}
    for name in parts:
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            values[name] = _config(type(part), small, more).to_dict()
    return config_class(**values)
