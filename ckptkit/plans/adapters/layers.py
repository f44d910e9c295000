"""Decide to which kind of layer a weight belongs: by a live model, by the evidence of a file, or by the user's word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import listed
from ckptkit.plans.policies import ALL_OTHERS, Policy, parse_policy
from ckptkit.tensor_ops.operation import Shape

__all__ = ["AS_LAYER", "AsLayer", "Layer", "LayerJudge", "as_layer_policy"]

Layer: TypeAlias = Literal["linear", "embedding", "transposed", "convolution", "whole"]
AsLayerAction: TypeAlias = Literal["auto", "linear", "embedding", "transposed", "whole"]
AS_LAYER: tuple[AsLayerAction, ...] = get_args(AsLayerAction)
AsLayer: TypeAlias = AsLayerAction | Mapping[str, AsLayerAction]

_EMBEDDINGS = frozenset({
    "wte", "wpe", "shared", "embed_in", "embed_tokens", "embed_tokens_per_layer", "relative_attention_bias",
})  # fmt: skip
_EMBEDDING = re.compile(r"(?:.*_)?(?:emb|embed|embeds|embedding|embeddings)(?:_table)?")
_NOT_EMBEDDING = re.compile(r"(?:patch|time|timestep|image|pixel)_.*")
_HEADS = frozenset({"lm_head", "head", "output", "decoder", "embed_out", "proj_out", "score", "classifier"})
_POSITIONS = "embed_positions"  # of OPT, BART and others: its class has a forward of its own, which takes no tokens
_TRANSPOSED_CONVOLUTION = re.compile(r".*(?:transpose|deconv|upconv|convt).*", re.IGNORECASE)
_GPT2 = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})  # the linear layers of GPT-2, which are of class Conv1D


def as_layer_policy(given: object) -> Policy[AsLayerAction]:
    """Return the kinds of layers that the argument ``as_layer`` names; a pattern that is not given means ``auto``."""
    table: object = {ALL_OTHERS: "auto", **given} if isinstance(given, Mapping) else given
    return parse_policy("as_layer", table, AS_LAYER)


@dataclass(slots=True)
class LayerJudge:
    """Decides the kind of layer of each weight, and remembers why.

    ``tied`` has the keys of embeddings that are saved whole because of a tie. ``live`` has the layers of a live model
    by module. ``sizes`` has numbers of rows of embeddings, by the configuration of the model. ``base`` has the shapes
    of the whole model.
    """

    base: Checkpoint
    policy: Policy[AsLayerAction]
    live: Mapping[str, str]
    sizes: Mapping[str, int]
    tied: set[str] = field(default_factory=set)
    _reasons: dict[str, list[str]] = field(default_factory=dict)
    _decided: dict[str, Layer] = field(default_factory=dict)
    _transposed: frozenset[str] | None = None

    def layer(self, key: str, shape: Shape) -> Layer:
        """Return the kind of the layer whose weight is ``key``; ``whole`` is a layer that PEFT cannot adapt."""
        if key not in self._decided:
            self._decided[key] = self._judge(key, shape)
        return self._decided[key]

    def is_like_embedding(self, key: str) -> bool:
        """Return whether a key is that of an embedding, by the live model or by its name."""
        module, _, leaf = key.rpartition(".")
        known = self.live.get(module)
        if known is not None:
            return known == "embedding"
        return leaf == "weight" and self._is_name_of_embedding(module.rpartition(".")[2])

    def is_like_head(self, key: str) -> bool:
        """Return whether a key is that of an output layer, by its name."""
        module, _, leaf = key.rpartition(".")
        return leaf == "weight" and module.rpartition(".")[2] in _HEADS

    @staticmethod
    def _is_name_of_embedding(name: str) -> bool:
        return name in _EMBEDDINGS or (bool(_EMBEDDING.fullmatch(name)) and not _NOT_EMBEDDING.fullmatch(name))

    def _judge(self, key: str, shape: Shape) -> Layer:
        asked = self.policy.action(key)
        if asked != "auto":
            return asked if asked != "linear" or len(shape) == 2 else "convolution"
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or len(shape) < 2 or key in self.tied:
            return "whole"
        known = self.live.get(module)
        if known is not None:
            return self._by_class(key, known)
        return self._two_dims(key, module, shape) if len(shape) == 2 else self._more_dims(key, module, shape)

    def notes(self) -> list[str]:
        """Return a sentence for each kind of decision that another model could contradict."""
        ways = "; --as-layer 'PATTERN=KIND' decides otherwise"
        return [f"{listed(keys, 4)} {reason}{ways}" for reason, keys in self._reasons.items()]

    def _decide(self, key: str, layer: Layer, reason: str) -> Layer:
        verb = {"embedding": "taken for embeddings", "transposed": "taken for Conv1D of GPT-2, [in, out]"}
        self._reasons.setdefault(f"{verb.get(layer, 'saved whole')}: {reason}", []).append(key)
        return layer

    def _by_class(self, key: str, known: str) -> Layer:
        if known == "other":
            return self._decide(key, "whole", "PEFT does not adapt layers of their class")
        layers: dict[str, Layer] = {
            "linear": "linear", "embedding": "embedding", "transposed": "transposed", "convolution": "convolution",
        }  # fmt: skip
        return layers[known]

    def _two_dims(self, key: str, module: str, shape: Shape) -> Layer:
        name = module.rpartition(".")[2]
        bias = self.base.get(f"{module}.bias")
        if name == _POSITIONS:
            return self._decide(key, "whole", "an embedding of positions, which PEFT would call with tokens")
        if bias is None:
            if self._is_name_of_embedding(name):
                return self._decide(key, "embedding", "by their names")
            size = next((size for size, rows in self.sizes.items() if rows == shape[0] != shape[1]), None)
            if size is not None and name not in _HEADS:
                return self._decide(key, "embedding", f"their rows are {size} of config.json")
            return "linear"
        if self._is_transposed(bias.shape, shape):
            return self._decide(key, "transposed", "their biases have the size of the second dim")
        if shape[0] == shape[1] and name in self._transposed_names():
            return self._decide(key, "transposed", "other layers of this name or family are")
        return "linear"

    def _more_dims(self, key: str, module: str, shape: Shape) -> Layer:
        name = module.rpartition(".")[2]
        bias = self.base.get(f"{module}.bias")
        if len(shape) > 5 or _TRANSPOSED_CONVOLUTION.fullmatch(name) or (bias and bias.shape != shape[:1]):
            return self._decide(key, "whole", "not a weight of a convolution that PEFT adapts")
        if shape[1] == 1 < shape[0] and self._has_earlier_output(key, shape[0]):
            return self._decide(key, "whole", "a depthwise convolution, which PEFT does not merge")
        return "convolution"

    def _has_earlier_output(self, key: str, size: int) -> bool:
        for other, info in self.base.items():
            if other == key:
                return False
            if info.shape[:1] == (size,):
                return True
        return False

    @staticmethod
    def _is_transposed(bias: Shape, weight: Shape) -> bool:
        return weight[0] != weight[1] and bias == weight[1:]

    def _transposed_names(self) -> frozenset[str]:
        """Return the names of layers whose weights are ``[in, out]`` wherever their shapes tell."""
        if self._transposed is None:
            found = set(self._names_of_transposed())
            self._transposed = frozenset(found | _GPT2 if found & _GPT2 else found)
        return self._transposed

    def _names_of_transposed(self) -> Iterator[str]:
        for key, info in self.base.items():
            module, _, leaf = key.rpartition(".")
            bias = self.base.get(f"{module}.bias")
            if leaf == "weight" and len(info.shape) == 2 and bias and self._is_transposed(bias.shape, info.shape):
                yield module.rpartition(".")[2]
