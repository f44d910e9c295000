"""How people spell the parts of a model: names cut into words, and what well-known words stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

__all__ = ["FUSED", "leaf_of", "likeness", "part_of", "words_of"]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\x00-\x7f]+")
_SAME: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attn", "attentions": "attn", "layernorm": "norm", "ln": "norm", "bn": "norm", "batchnorm": "norm",
        "rmsnorm": "norm", "groupnorm": "norm", "gn": "norm", "norms": "norm", "embedding": "embed",
        "embeddings": "embed", "emb": "embed", "tokens": "tok", "token": "tok", "position": "pos", "positions": "pos",
        "positional": "pos", "projection": "proj", "ffn": "mlp", "ff": "mlp", "patches": "patch", "convolution": "conv",
        "classification": "classifier", "downsampling": "downsample",
    }
)  # fmt: skip

# What the last part of a key is of a module; the names of several libraries for one thing.
_LEAVES: Mapping[str, str] = MappingProxyType(
    {
        "weight": "weight", "kernel": "weight", "gamma": "weight", "weights": "weight", "w": "weight", "g": "weight",
        "gain": "weight", "scale": "weight", "embedding": "weight", "bias": "bias", "beta": "bias", "b": "bias",
        "biases": "bias", "offset": "bias", "running_mean": "running_mean", "moving_mean": "running_mean",
        "running_var": "running_var", "moving_variance": "running_var", "moving_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    }
)  # fmt: skip
_JOINED_LEAF = re.compile(r"(.+)_(weights?|kernel|bias)")


def leaf_of(segment: str) -> tuple[str, str] | None:
    """Return what of a key's last segment still names the module, and what the tensor is of it; None: a bare one."""
    if segment in _LEAVES:
        return "", _LEAVES[segment]
    joined = _JOINED_LEAF.fullmatch(segment)
    return (joined[1], _LEAVES[joined[2]]) if joined else None


@lru_cache(maxsize=65536)
def words_of(path: str) -> tuple[str, ...]:
    """Return the words of a path, in small letters, spelled one way where several are common."""
    words = [_SAME.get(word, word) for word in (found[0].lower() for found in _WORD.finditer(path))]
    made: list[str] = []
    for word in words:
        before = made[-1] if made else ""
        if (before, word) == ("layer", "norm"):
            made.pop()
        elif (before, word) == ("encoder", "attn"):  # attention to what the encoder made
            made[-1] = "cross"
        made.append(word)
    return tuple(made)


def _spelled(**parts: str) -> dict[tuple[str, ...], str]:
    return {tuple(text.split()): part for part, texts in parts.items() for text in texts.split(", ")}


# The end of a module's path inside a layer. Where one is the end of another, the longer decides.
_IN_LAYERS = _spelled(
    query="q proj, q, query, wq, q lin, to q, linear q, query proj",
    key="k proj, k, key, wk, k lin, to k, linear k, key proj",
    value="v proj, v, value, wv, v lin, to v, linear v, value proj",
    qkv="qkv, qkv proj, wqkv, in proj, c attn, to qkv",
    query_key_value="query key value, linear qkv",
    attn_out="o proj, wo, out proj, attn proj, attn output dense, attn c proj, attn dense, out lin, attn out",
    gate="gate proj, w 1",
    up="up proj, w 3",
    down="down proj, w 2",
    gate_up="gate up proj, gate up",
    fc1="fc 1, c fc, intermediate dense, linear 1, lin 1",
    fc2="fc 2, mlp c proj, output dense, linear 2, lin 2",
    norm1="norm 1, input norm, attn norm, norm before",
    norm2="norm 2, post attn norm, mlp norm, norm after",
)
# The end of a path outside of layers, behind any name.
_EMBEDDINGS = _spelled(
    word_embedding="tok embed, embed tok, wte, word embed",
    position_embedding="pos embed, embed pos, wpe",
    type_embedding="type embed",
)
# The whole of a path outside of layers, behind at most one other word: the model's name.
_ENDS = _spelled(
    head="lm head, head, classifier, fc, linear, output, score",
    final_norm="norm, norm f, final norm, norm final",
)
# What a fused projection holds, in the order in which its name says so, or in which everybody has it.
FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType({"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")})


@lru_cache(maxsize=65536)
def part_of(path: str, *, in_layer: bool) -> tuple[str, tuple[str, ...]]:
    """Return which part of a model a module is by the spelling of its path, and the words in front of that spelling.

    Where no spelling is known the part is empty, and the words are all of them.
    """
    words = words_of(path)
    tables = (_IN_LAYERS,) if in_layer else (_EMBEDDINGS, _ENDS)
    for table in tables:
        for start in range(len(words)):
            if words[start:] in table and (table is not _ENDS or start <= 1):
                return table[words[start:]], words[:start]
    return "", words


def likeness(one: Iterable[str], other: Iterable[str]) -> float:
    """Return the share of words that two names have in common, between 0 and 1."""
    left, right = set(one), set(other)
    return len(left & right) / len(left | right) if left or right else 1.0
