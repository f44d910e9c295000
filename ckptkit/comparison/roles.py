"""What the words of a key say: the role of its module, such as ``query``, in the spelling of several libraries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

__all__ = ["FUSED_ROLES", "are_opposite", "role_of", "split_leaf", "split_words", "word_overlap"]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\x00-\x7f]+")
_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attn", "attentions": "attn", "layernorm": "norm", "ln": "norm", "bn": "norm", "batchnorm": "norm",
        "rmsnorm": "norm", "groupnorm": "norm", "gn": "norm", "norms": "norm", "embedding": "embed",
        "embeddings": "embed", "emb": "embed", "tokens": "tok", "token": "tok", "position": "pos", "positions": "pos",
        "positional": "pos", "projection": "proj", "ffn": "mlp", "ff": "mlp", "patches": "patch", "convolution": "conv",
        "classification": "classifier", "downsampling": "downsample", "lstm": "rnn", "gru": "rnn",
    }
)  # fmt: skip

# The last part of a key, in the spelling of several libraries, and the name that torch uses for the tensor.
_LEAVES: Mapping[str, str] = MappingProxyType(
    {
        "weight": "weight", "kernel": "weight", "gamma": "weight", "weights": "weight", "w": "weight", "g": "weight",
        "gain": "weight", "scale": "weight", "embedding": "weight", "bias": "bias", "beta": "bias", "b": "bias",
        "biases": "bias", "offset": "bias", "running_mean": "running_mean", "moving_mean": "running_mean",
        "running_var": "running_var", "moving_variance": "running_var", "moving_var": "running_var",
        "num_batches_tracked": "num_batches_tracked",
    }
)  # fmt: skip
_LEAF_AFTER_UNDERSCORE = re.compile(r"(.+)_(weights?|kernel|bias)")
# Tensors of recurrent modules. The first layer of an LSTM has those of an LSTMCell.
_RECURRENT_LEAF = re.compile(r"((?:weight|bias)_(?:ih|hh|hr))(_l[0-9]+(?:_reverse)?)?")


def _spelled(**roles: str) -> dict[tuple[str, ...], str]:
    return {tuple(text.split()): role for role, texts in roles.items() for text in texts.split(", ")}


# The end of a module's path inside a layer. The longest match decides.
_ROLES_IN_LAYERS = _spelled(
    query="q proj, q, query, wq, q lin, to q, linear q, query proj",
    key="k proj, k, key, wk, k lin, to k, linear k, key proj",
    value="v proj, v, value, wv, v lin, to v, linear v, value proj",
    qkv="qkv, qkv proj, wqkv, in proj, c attn, to qkv",
    query_key_value="query key value, linear qkv",
    kv="kv, kv proj, wkv, to kv",
    attn_out="o proj, wo, out proj, attn proj, attn output dense, attn c proj, attn dense, out lin, attn out",
    gate="gate proj, w 1",
    up="up proj, w 3",
    down="down proj, w 2",
    gate_up="gate up proj, gate up, w 13",
    fc1="fc 1, c fc, intermediate dense, linear 1, lin 1",
    fc2="fc 2, mlp c proj, output dense, linear 2, lin 2",
    norm1="norm 1, input norm, attn norm, norm before",
    norm2="norm 2, post attn norm, mlp norm, norm after",
)
# The end of a path outside of layers, after any other words.
_EMBEDDING_ROLES = _spelled(
    word_embedding="tok embed, embed tok, wte, word embed",
    position_embedding="pos embed, embed pos, wpe",
    type_embedding="type embed",
)
# The whole path outside of layers, after at most one other word, the name of the model.
_OUTPUT_ROLES = _spelled(
    head="lm head, head, classifier, fc, linear, output, score",
    pair_head="seq relationship, cls seq relationship, nsp",  # of two classes: whether a sentence follows another
    final_norm="norm, norm f, final norm, norm final",
)
_MOST_WORDS = max(len(words) for table in (_ROLES_IN_LAYERS, _EMBEDDING_ROLES, _OUTPUT_ROLES) for words in table)
# The roles of the parts of a fused projection, in the order of its name.
FUSED_ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv": ("query", "key", "value"), "kv": ("key", "value"), "gate_up": ("gate", "up")}
)


# Words of which a name has one or the other; tensors with different ones are not the same tensor.
_OPPOSITES: tuple[tuple[str, ...], ...] = tuple(
    tuple(text.split(", "))
    for text in (
        "encoder, decoder", "enc, dec", "student, teacher", "actor, critic", "policy, value", "left, right", "in, out",
        "input, output", "src, tgt", "source, target", "online, target", "mean, var, variance, std, logvar",
        "mu, sigma, logvar", "gate, up, down", "query, key, value", "q, k, v", "lora a, lora b", "text, vision, audio",
        "text, image, audio", "generator, discriminator", "gen, disc", "first, last", "min, max", "scale, shift",
        "positive, negative", "forward, backward", "row, col", "user, item", "start, end", "question, passage, context",
        "query, doc, document, passage", "anchor, positive", "high, low", "coarse, fine", "local, global", "real, imag",
        "prior, posterior", "temporal, spatial", "fw, bw", "fwd, bwd", "cls, reg, bbox",
    )
)  # fmt: skip


_ALL_OPPOSITES = frozenset(word.rpartition(" ")[2] for words in _OPPOSITES for word in words)


def are_opposite(left: Sequence[str], right: Sequence[str]) -> bool:
    """Return whether two names have different words of one list of opposites, such as ``encoder`` and ``decoder``.

    Example:
        >>> are_opposite(split_words("mlp.gate_proj"), split_words("ffn.up_proj"))
        True
    """
    if _ALL_OPPOSITES.isdisjoint(left) or _ALL_OPPOSITES.isdisjoint(right):
        return False
    texts = [f" {' '.join(words)} " for words in (left, right)]
    for words in _OPPOSITES:
        ours, theirs = ({word for word in words if f" {word} " in text} for text in texts)
        if ours and theirs and ours.isdisjoint(theirs):
            return True
    return False


def split_leaf(segment: str) -> tuple[str, str] | None:
    """Split the last segment of a key into a rest that belongs to the module's name, and torch's name for the tensor.

    Return None if the segment names no tensor of a module, as ``cls_token`` does.
    """
    if segment in _LEAVES:
        return "", _LEAVES[segment]
    match = _LEAF_AFTER_UNDERSCORE.fullmatch(segment)
    if match:
        return match[1], _LEAVES[match[2]]
    match = _RECURRENT_LEAF.fullmatch(segment)
    return ("", match[1] if match[2] == "_l0" else segment) if match else None


@lru_cache(maxsize=65536)
def split_words(path: str) -> tuple[str, ...]:
    """Return the words of a path in lower case, with one spelling for common synonyms."""
    words: list[str] = []
    for word in (_SYNONYMS.get(found[0].lower(), found[0].lower()) for found in _WORD.finditer(path)):
        before = words[-1] if words else ""
        if (before, word) == ("layer", "norm"):
            words.pop()
        elif (before, word) == ("encoder", "attn"):  # cross-attention
            words[-1] = "cross"
        words.append(word)
    return tuple(words)


@lru_cache(maxsize=65536)
def role_of(path: str, *, in_layer: bool) -> tuple[str, tuple[str, ...]]:
    """Return the role that the spelling of a module's path gives it, such as ``query``, and the words before it.

    If no spelling is known, return an empty role and all words.
    """
    words = split_words(path)
    tables = (_ROLES_IN_LAYERS,) if in_layer else (_EMBEDDING_ROLES, _OUTPUT_ROLES)
    for table in tables:
        for start in range(max(0, len(words) - _MOST_WORDS), len(words)):
            if words[start:] in table and (table is not _OUTPUT_ROLES or start <= 1):
                return table[words[start:]], words[:start]
    return "", words


def word_overlap(left: Iterable[str], right: Iterable[str]) -> float:
    """Return the share of words that two names have in common, between 0 and 1."""
    lefts, rights = set(left), set(right)
    return len(lefts & rights) / len(lefts | rights) if lefts or rights else 1.0
