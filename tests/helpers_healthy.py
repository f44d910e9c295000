"""A set-up that trains correctly, real steps with it, and the findings above a note that it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckptkit import assert_param_groups, preflight, validate_param_groups
from ckptkit.errors import GroupsError

__all__ = ["Setup", "language_model", "loud_findings", "split_by_decay"]

# The sizes of a tiny language model, by each name that a config of transformers may have for them.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "max_seq_len"), 32),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 16
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "ffn_hidden_size"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "attention_window"), 4),
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
TOKENS: dict[str, int] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Setup:
    """A model, what trains it, and the loss of one batch. ``step`` replaces the usual step where a set-up has its own.

    ``loss`` is None where no dry step can be made on a copy of the model. ``ignore`` lists findings that are right.
    """

    model: nn.Module
    optimizers: Any
    loss: Callable[[Any], Any] | None
    schedulers: Any = None
    step: Callable[[], object] | None = None
    ignore: tuple[str, ...] = ()

    def train(self, steps: int = 2) -> None:
        for _ in range(steps):
            if self.step is None:
                self._usual_step()
            else:
                self.step()

    def _usual_step(self) -> None:
        assert self.loss is not None
        optimizers: Sequence[Any] = self.optimizers if isinstance(self.optimizers, list) else [self.optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.loss(self.model).backward()
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in self.schedulers if isinstance(self.schedulers, list) else [self.schedulers]:
            if scheduler is not None:
                scheduler.step()


def loud_findings(setup: Setup) -> list[str]:
    """Return what the three functions report above a note, before the first step and after two real steps."""
    before = _loud(setup, "before the first step")
    setup.train()
    return before + _loud(setup, "after two steps")


def _loud(setup: Setup, when: str) -> list[str]:
    report = validate_param_groups(setup.model, setup.optimizers, schedulers=setup.schedulers)
    lines = [f"{when}: {finding}" for finding in report.findings if finding.severity != "note"]
    try:
        assert_param_groups(setup.model, setup.optimizers, schedulers=setup.schedulers, strict=True)
    except GroupsError as error:
        lines.append(f"{when}: strict: {error}")
    result = preflight(
        setup.model,
        optimizer=setup.optimizers,
        schedulers=setup.schedulers,
        dry_step=setup.loss,
        ignore=setup.ignore,
    )
    lines += [f"{when}: preflight: {finding}" for finding in result.findings if finding.severity != "note"]
    if result.verdict != "ready":
        lines.append(f"{when}: the verdict of preflight is {result.verdict}")
    return lines


def split_by_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Return the usual two groups: vectors without weight decay, and the other parameters with it."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [pair for pair in trained if pair[1].ndim > 1]
    vectors = [pair for pair in trained if pair[1].ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def language_model(kind: Any, largest: int = 10**6) -> Setup:
    """Return a tiny model of a class of transformers with a language model head, and AdamW.

    Raise ``ValueError`` if it has more than ``largest`` numbers, before they are made.
    """
    config = kind.config_class
    default = config()
    read_only = {name for name in SIZES if isinstance(getattr(config, name, None), property)}
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name) and name not in read_only}
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in kind(config(**sizes, **TOKENS)).parameters())
    if numbers > largest:
        raise ValueError(f"{numbers} numbers are too many")
    model = kind(config(**sizes, **TOKENS)).train()
    ids = torch.randint(3, 30, (2, 8))

    def loss(model: Any) -> Any:
        return model(input_ids=ids, labels=ids).loss

    return Setup(model, torch.optim.AdamW(split_by_decay(model), lr=0.01), loss)
