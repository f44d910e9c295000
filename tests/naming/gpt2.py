"""GPT-2: the names and shapes of transformers' GPT2LMHeadModel and of nanoGPT."""

from __future__ import annotations

from tests.naming.resnet import Shapes

__all__ = ["hf", "nanogpt"]


def _gpt2(layers: int, width: int, words: int, positions: int, *, linear: bool) -> Shapes:
    shapes: Shapes = {"transformer.wte.weight": (words, width), "transformer.wpe.weight": (positions, width)}
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        for name, ins, outs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            norm = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}.get(name)
            if norm:
                shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
            shapes |= {f"{at}.{name}.weight": (outs, ins) if linear else (ins, outs), f"{at}.{name}.bias": (outs,)}
    return shapes | {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}


def hf(layers: int = 12, width: int = 768, words: int = 50257, positions: int = 1024, *, tied: bool = False) -> Shapes:
    """Return ``GPT2LMHeadModel`` as ``save_pretrained`` writes it, or with ``tied`` its state_dict, with the head."""
    head: Shapes = {"lm_head.weight": (words, width)} if tied else {}
    return _gpt2(layers, width, words, positions, linear=False) | head


def nanogpt(layers: int = 12, width: int = 768, words: int = 50257, positions: int = 1024) -> Shapes:
    """Return the state_dict of nanoGPT's ``GPT`` with bias, in its order, with the tied head."""
    return _gpt2(layers, width, words, positions, linear=True) | {"lm_head.weight": (words, width)}
