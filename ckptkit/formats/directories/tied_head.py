"""The output weights of a language model that are tied to its embedding, by ``config.json`` and the names of the keys.

A file of transformers has one tensor for both, under the key of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.text import quoted

__all__ = ["TIE_FLAG", "TiedHead", "embeddings_of", "is_head_group", "tied_head"]

TIE_FLAG = "tie_word_embeddings"
_EMBEDDINGS = frozenset(
    {"embed_tokens", "embed_in", "embeddings", "shared", "tok_embeddings", "tokens_embed", "word_embeddings",
     "word_embedding", "wte"}
)  # fmt: skip
_SHARED = "shared"  # the embedding of an encoder and a decoder
_HAS_HEAD = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForPreTraining",
    "DoubleHeadsModel",
)
_TASK_HEADS = frozenset({"score", "classifier", "qa_outputs", "v_head", "regression_head"})
_HEADS: Mapping[str, str] = {  # model_type -> the module of the output weights, where it is not lm_head
    **dict.fromkeys(
        ("bert", "big_bird", "deberta", "deberta-v2", "ernie", "fnet", "layoutlm", "megatron-bert", "mobilebert", "mra",
         "nomic_bert", "nystromformer", "roc_bert", "roformer", "squeezebert", "tapas", "visual_bert", "yoso"),
        "cls.predictions.decoder",
    ),
    **dict.fromkeys(
        ("bert-generation", "camembert", "data2vec-text", "esm", "gte", "ibert", "jina_embeddings_v3",
         "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        "lm_head.decoder",
    ),
    "albert": "predictions.decoder", "biogpt": "output_projection", "convbert": "generator_lm_head",
    "distilbert": "vocab_projector", "electra": "generator_lm_head", "flaubert": "pred_layer.proj", "git": "output",
    "gpt_neox_japanese": "embed_out", "modernbert": "decoder", "modernbert-decoder": "decoder", "rwkv": "head",
    "trocr": "output_projection", "ultrabert": "head.decoder", "whisper": "proj_out",
    "xlm": "pred_layer.proj", "xlnet": "lm_loss",
}  # fmt: skip
_OWN_BIAS = frozenset({"esm"})  # adds the bias beside its output weights by itself
_OLD_PREFIX = "language_model.model."  # of a text model inside another one, before transformers 4.52


@dataclass(frozen=True, slots=True)
class TiedHead:
    """The key of the output weights, and that of the embedding with which they share their values.

    ``reason`` says how this is known. Without ``is_sure`` it is only likely: there is no ``config.json``.
    ``shared`` are the embeddings of an encoder and a decoder, which are tied too; ``is_shared_further`` is true where
    the model has them. ``bias`` is the key of the bias that BERT and its relatives tie to ``head_bias``, or is empty.
    """

    head: str
    embedding: str
    reason: str
    is_sure: bool = True
    is_shared_further: bool = False
    shared: tuple[str, ...] = ()
    bias: str = ""

    @property
    def head_bias(self) -> str:
        """The key of the bias of the output weights."""
        return f"{self.head.removesuffix('.weight')}.bias"


def tied_head(base: Mapping[str, tuple[int, ...]], config: Mapping[str, object] | None) -> TiedHead | None:
    """Return the tie of a model with tensors of these shapes, or None where it has none.

    ``config`` is the content of ``config.json``, or None where there is no such file. A class without output weights
    has no tie, and neither has a model whose configuration says so.
    """
    embedding = _embedding(base, config or {})
    if embedding is None:
        return None
    if config is None:
        return _likely(base, embedding)
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    stated = [section[TIE_FLAG] for section in _sections(config) if isinstance(section.get(TIE_FLAG), bool)]
    if (stated and not stated[0]) or (name and not name.endswith(_HAS_HEAD)):
        return None
    head = _head(embedding, str(config.get("model_type", "")))
    is_absent = head not in base
    if not (stated and stated[0]) and not (name and is_absent):
        return None
    reason = (
        f"config.json says {TIE_FLAG}: true"
        if stated
        else f"config.json names {quoted(name)}, and the file has no {head}"
    )
    if not name and "." not in embedding.removesuffix(".weight"):
        return None  # the keys of a model without its head
    is_shared = bool(config.get("is_encoder_decoder"))
    shared = [key for key in embeddings_of(base) if is_shared and key != embedding and base[key] == base[embedding]]
    bias = _bias(head, base[embedding][0], base) if config.get("model_type") not in _OWN_BIAS else ""
    return TiedHead(head, embedding, reason, is_shared_further=is_shared, shared=tuple(shared), bias=bias)


def is_head_group(keys: Sequence[str]) -> bool:
    """Return whether keys that are one tensor look like an embedding and output weights."""
    return len(embeddings_of(keys)) not in (0, len(keys))


def embeddings_of(keys: Iterable[str]) -> list[str]:
    """Return the keys that are named like the weight of an input embedding."""
    return [key for key in keys if key.endswith(".weight") and key.split(".")[-2] in _EMBEDDINGS]


def _likely(base: Mapping[str, tuple[int, ...]], embedding: str) -> TiedHead | None:
    modules = {key.rpartition(".")[0] for key in base}
    names = {name for module in modules for name in (module, module.rpartition(".")[2])}
    heads = {"lm_head", "output", "head", "embed_out", *_HEADS.values()}
    is_shared = embedding.split(".")[-2] == _SHARED
    if ("." not in embedding.removesuffix(".weight") and not is_shared) or names & (_TASK_HEADS | heads):
        return None
    reason = "the base has no output weights and no config.json"
    return TiedHead(_head(embedding, ""), embedding, reason, is_sure=False, is_shared_further=is_shared)


def _embedding(base: Mapping[str, tuple[int, ...]], config: Mapping[str, object]) -> str | None:
    """Return the key of the only input embedding; of several, the one that all share."""
    found = [key for key in embeddings_of(base) if len(base[key]) == 2]
    sizes = {section.get("vocab_size") for section in _sections(config)}
    found = [key for key in found if base[key][0] in sizes] or found
    shared = [key for key in found if key.split(".")[-2] == _SHARED]
    return next(iter(shared or found)) if len(shared or found) == 1 else None


def _sections(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    yield config
    for key in ("text_config", "decoder", "language_config"):
        section = config.get(key)
        if isinstance(section, Mapping):
            yield section


def _bias(head: str, size: int, base: Mapping[str, tuple[int, ...]]) -> str:
    """Return the key of the bias that a model ties to the bias of its output weights, or the empty string."""
    owner, _, name = head.removesuffix(".weight").rpartition(".")
    key = f"{owner}.bias"
    return key if name == "decoder" and base.get(key) == (size,) else ""


def _head(embedding: str, model_type: str) -> str:
    prefix = "language_model." if embedding.startswith(_OLD_PREFIX) else ""
    return f"{prefix}{_HEADS.get(model_type, 'lm_head')}.weight"
