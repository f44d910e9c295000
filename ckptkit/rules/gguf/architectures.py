"""What the converters of llama.cpp do to a model of transformers, by ``general.architecture``: names and arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

__all__ = ["ARCHITECTURES", "Architecture", "Experts"]


@dataclass(frozen=True, slots=True)
class Experts:
    """The names of the experts of a layer in a file: the router, and a projection of expert ``{e}``."""

    router: str
    projection: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How GGUF stores an architecture.

    Attributes:
        names: The names of modules in files of transformers, by their names in GGUF, in both with ``{i}`` for the
            number of the layer. Empty where they are not known.
        is_permuted: Whether the rows of query and key are in the order of Meta's files.
        norm_offset: What was added to the weights of norms.
        is_transposed: Whether the matrices in the layers are stored as inputs by outputs in files of transformers.
        experts: The names of experts, if the model can have any.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    is_permuted: bool = False
    norm_offset: int = 0
    is_transposed: bool = False
    experts: Experts | None = None


def _in_layers(names: Mapping[str, str], layers: str = "model.layers") -> dict[str, str]:
    return {f"blk.{{i}}.{name}": f"{layers}.{{i}}.{other}" for name, other in names.items()}


_OUTSIDE: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION: Final = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_MLP: Final = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_HEAD_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_NORMS_AFTER: Final = {
    "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_LLAMA: Final = _OUTSIDE | _in_layers(_ATTENTION | _MLP | _NORMS)
_GEMMA: Final = {name: _LLAMA[name] for name in _LLAMA if name != "output"}
_GEMMA_2: Final = _GEMMA | _in_layers(_NORMS_AFTER | {"ffn_norm": "pre_feedforward_layernorm"})
_OLMO_2: Final = _OUTSIDE | _in_layers(_ATTENTION | _MLP | _HEAD_NORMS | _NORMS_AFTER)
_COHERE: Final = _OUTSIDE | _in_layers(_ATTENTION | _MLP | _HEAD_NORMS | {"attn_norm": "input_layernorm"})
_PHI_2: Final = {
    "token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head",
} | _in_layers(
    _ATTENTION
    | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2", "attn_norm": "input_layernorm"}
)  # fmt: skip
_PHI_3: Final = _OUTSIDE | _in_layers(
    _NORMS
    | {
        "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }
)  # fmt: skip
_STARCODER_2: Final = _OUTSIDE | _in_layers(_ATTENTION | _NORMS | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})
_GPT_2: Final = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head",
} | _in_layers(
    {
        "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    },
    "transformer.h",
)  # fmt: skip
_SHARED_EXPERT: Final = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
_MIXTRAL_EXPERTS: Final = Experts("block_sparse_moe.gate", "block_sparse_moe.experts.{e}", "w1", "w3", "w2")
_EXPERTS: Final = Experts("mlp.gate", "mlp.experts.{e}")

# An architecture has names here only if the tensor mapping of gguf-py gives all of them.
ARCHITECTURES: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "llama": Architecture(_LLAMA, is_permuted=True, experts=_MIXTRAL_EXPERTS),
        "arcee": Architecture(_LLAMA, is_permuted=True),
        "granite": Architecture(_LLAMA, is_permuted=True),
        "smollm3": Architecture(_LLAMA, is_permuted=True),
        "olmo": Architecture(_LLAMA, is_permuted=True),
        "olmo2": Architecture(_OLMO_2),
        "olmoe": Architecture(_LLAMA | _in_layers(_HEAD_NORMS), experts=_EXPERTS),
        "qwen2": Architecture(_LLAMA),
        "qwen2moe": Architecture(_LLAMA | _in_layers(_SHARED_EXPERT), experts=_EXPERTS),
        "qwen3": Architecture(_LLAMA | _in_layers(_HEAD_NORMS)),
        "qwen3moe": Architecture(_LLAMA | _in_layers(_HEAD_NORMS), experts=_EXPERTS),
        "gemma": Architecture(_GEMMA, norm_offset=1),
        "gemma2": Architecture(_GEMMA_2, norm_offset=1),
        "gemma3": Architecture(_GEMMA_2 | _in_layers(_HEAD_NORMS) | {"output": "lm_head"}, norm_offset=1),
        "nemotron": Architecture(_LLAMA, norm_offset=1),
        "command-r": Architecture(_COHERE),
        "cohere2": Architecture(_COHERE),
        "stablelm": Architecture(_LLAMA),
        "phi2": Architecture(_PHI_2),
        "phi3": Architecture(_PHI_3),
        "starcoder2": Architecture(_STARCODER_2),
        "gpt2": Architecture(_GPT_2, is_transposed=True),
        # The arithmetic of these is known, and not their names.
        "baichuan": Architecture(is_permuted=True),
        "granitemoe": Architecture(is_permuted=True),
        "minicpm": Architecture(is_permuted=True),
        "gemma-embedding": Architecture(norm_offset=1),
        "qwen3next": Architecture(norm_offset=1),
        "qwen35": Architecture(norm_offset=1),
        "qwen35moe": Architecture(norm_offset=1),
    }
)
