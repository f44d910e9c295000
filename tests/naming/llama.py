"""Llama: the names and shapes of Meta's consolidated checkpoints and of transformers' LlamaForCausalLM."""

from __future__ import annotations

from tests.naming.resnet import Shapes

__all__ = ["hf", "meta"]


def meta(
    layers: int = 32, width: int = 4096, inner: int = 14336, words: int = 128256, kv: int = 1024, *, freqs: int = 0
) -> Shapes:
    """Return ``Transformer`` of ``llama/model.py`` (by default Llama 3 8B), with ``rope.freqs`` if wanted."""
    shapes: Shapes = {"tok_embeddings.weight": (words, width)}
    if freqs:
        shapes |= {"rope.freqs": (freqs,)}
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {
            f"{at}.attention.wq.weight": (width, width),
            f"{at}.attention.wk.weight": (kv, width),
            f"{at}.attention.wv.weight": (kv, width),
            f"{at}.attention.wo.weight": (width, width),
            f"{at}.feed_forward.w1.weight": (inner, width),
            f"{at}.feed_forward.w2.weight": (width, inner),
            f"{at}.feed_forward.w3.weight": (inner, width),
            f"{at}.attention_norm.weight": (width,),
            f"{at}.ffn_norm.weight": (width,),
        }
    return shapes | {"norm.weight": (width,), "output.weight": (words, width)}


def hf(layers: int = 32, width: int = 4096, inner: int = 14336, words: int = 128256, kv: int = 1024) -> Shapes:
    """Return ``LlamaForCausalLM`` (by default Llama 3 8B), in the order of its state_dict."""
    shapes: Shapes = {"model.embed_tokens.weight": (words, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (width, width),
            f"{at}.self_attn.k_proj.weight": (kv, width),
            f"{at}.self_attn.v_proj.weight": (kv, width),
            f"{at}.self_attn.o_proj.weight": (width, width),
            f"{at}.mlp.gate_proj.weight": (inner, width),
            f"{at}.mlp.up_proj.weight": (inner, width),
            f"{at}.mlp.down_proj.weight": (width, inner),
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
