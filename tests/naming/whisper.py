"""Whisper: the names of OpenAI's model and of transformers' WhisperModel, side by side."""

from __future__ import annotations

__all__ = ["openai_and_hf"]

_Named = list[tuple[str, str, tuple[int, ...]]]


def _pair(old: str, new: str, shape: tuple[int, ...], *, bias: bool = True) -> _Named:
    weight = [(f"{old}.weight", f"{new}.weight", shape)]
    return [*weight, (f"{old}.bias", f"{new}.bias", shape[:1])] if bias else weight


def _attention(old: str, new: str, width: int) -> _Named:
    named = [
        *_pair(f"{old}.query", f"{new}.q_proj", (width, width)),
        *_pair(f"{old}.key", f"{new}.k_proj", (width, width), bias=False),
        *_pair(f"{old}.value", f"{new}.v_proj", (width, width)),
        *_pair(f"{old}.out", f"{new}.out_proj", (width, width)),
    ]
    return named + _pair(f"{old}_ln", f"{new}_layer_norm", (width,))


def openai_and_hf(layers: int = 4, width: int = 384, words: int = 51865) -> _Named:
    """Return both names and the shape of every tensor of the model ``tiny``."""
    named: _Named = _pair("encoder.conv1", "encoder.conv1", (width, 80, 3))
    named += _pair("encoder.conv2", "encoder.conv2", (width, width, 3))
    named += [
        ("encoder.positional_embedding", "encoder.embed_positions.weight", (1500, width)),
        ("decoder.token_embedding.weight", "decoder.embed_tokens.weight", (words, width)),
        ("decoder.positional_embedding", "decoder.embed_positions.weight", (448, width)),
    ]
    for side in ("encoder", "decoder"):
        for layer in range(layers):
            old, new = f"{side}.blocks.{layer}", f"{side}.layers.{layer}"
            named += _attention(f"{old}.attn", f"{new}.self_attn", width)
            if side == "decoder":
                named += _attention(f"{old}.cross_attn", f"{new}.encoder_attn", width)
            named += _pair(f"{old}.mlp.0", f"{new}.fc1", (4 * width, width))
            named += _pair(f"{old}.mlp.2", f"{new}.fc2", (width, 4 * width))
            named += _pair(f"{old}.mlp_ln", f"{new}.final_layer_norm", (width,))
    named += _pair("encoder.ln_post", "encoder.layer_norm", (width,))
    return named + _pair("decoder.ln", "decoder.layer_norm", (width,))
