"""BERT: the names and shapes of transformers' BertForPreTraining and of the original TensorFlow checkpoints."""

from __future__ import annotations

from tests.naming.resnet import Shapes

__all__ = ["hf", "original"]


def hf(
    layers: int = 12,
    width: int = 768,
    inner: int = 3072,
    words: int = 30522,
    positions: int = 512,
    *,
    tied: bool = False,
) -> Shapes:
    """Return ``BertForPreTraining`` as ``save_pretrained`` writes it; with ``tied``, the decoder is included."""
    shapes: Shapes = {
        "bert.embeddings.word_embeddings.weight": (words, width),
        "bert.embeddings.position_embeddings.weight": (positions, width),
        "bert.embeddings.token_type_embeddings.weight": (2, width),
        **_pair("bert.embeddings.LayerNorm", (width,)),
    }
    for layer in range(layers):
        at = f"bert.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            shapes |= _pair(f"{at}.attention.self.{part}", (width, width))
        shapes |= _pair(f"{at}.attention.output.dense", (width, width))
        shapes |= _pair(f"{at}.attention.output.LayerNorm", (width,))
        shapes |= _pair(f"{at}.intermediate.dense", (inner, width))
        shapes |= _pair(f"{at}.output.dense", (width, inner))
        shapes |= _pair(f"{at}.output.LayerNorm", (width,))
    shapes |= _pair("bert.pooler.dense", (width, width))
    shapes |= {"cls.predictions.bias": (words,)}
    shapes |= _pair("cls.predictions.transform.dense", (width, width))
    shapes |= _pair("cls.predictions.transform.LayerNorm", (width,))
    if tied:
        shapes |= _pair("cls.predictions.decoder", (words, width))
    return shapes | _pair("cls.seq_relationship", (2, width))


def _pair(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def original(layers: int = 12, width: int = 768, inner: int = 3072, words: int = 30522, positions: int = 512) -> Shapes:
    """Return the variables of ``modeling.py`` and of the two heads of ``run_pretraining.py``, sorted by name."""
    shapes: Shapes = {
        "bert/embeddings/word_embeddings": (words, width),
        "bert/embeddings/position_embeddings": (positions, width),
        "bert/embeddings/token_type_embeddings": (2, width),
        **_norm("bert/embeddings/LayerNorm", width),
    }
    for layer in range(layers):
        at = f"bert/encoder/layer_{layer}"
        for part in ("query", "key", "value"):
            shapes |= _dense(f"{at}/attention/self/{part}", width, width)
        shapes |= _dense(f"{at}/attention/output/dense", width, width)
        shapes |= _norm(f"{at}/attention/output/LayerNorm", width)
        shapes |= _dense(f"{at}/intermediate/dense", width, inner)
        shapes |= _dense(f"{at}/output/dense", inner, width)
        shapes |= _norm(f"{at}/output/LayerNorm", width)
    shapes |= _dense("bert/pooler/dense", width, width)
    shapes |= {"cls/predictions/output_bias": (words,)}
    shapes |= _dense("cls/predictions/transform/dense", width, width)
    shapes |= _norm("cls/predictions/transform/LayerNorm", width)
    shapes |= {"cls/seq_relationship/output_weights": (2, width), "cls/seq_relationship/output_bias": (2,)}
    return dict(sorted(shapes.items()))


def _dense(name: str, ins: int, outs: int) -> Shapes:
    return {f"{name}/kernel": (ins, outs), f"{name}/bias": (outs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}/gamma": (width,), f"{name}/beta": (width,)}
