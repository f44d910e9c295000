"""What presets ask of the model: its own lists, its layers, the widths that it grew by."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.patterns import literal
from ckptkit.core.text import kind_of, listed, plural
from ckptkit.errors import GroupsError
from ckptkit.param_groups.naming import patterns_of
from ckptkit.param_groups.presets.layering import convnext_layers, plain_layers, timm_layers
from ckptkit.param_groups.presets.widths import mup_modifiers
from ckptkit.param_groups.properties import ParameterFacts, Subject

__all__ = ["FROM_MODEL", "Asked"]

_CONV = 3  # dimensions of the smallest convolution


@dataclass(frozen=True, slots=True)
class Asked:
    """A model, what is known of its parameters, and the settings so far."""

    model: Any
    subject: Subject
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """The FQN of each parameter, in model order."""
        return [facts.name for facts in self.subject.parameters]


def _no_weight_decay(asked: Asked) -> list[str]:
    """Return patterns for what the model's own list names, which may hold wildcards of fnmatch."""
    own = getattr(asked.model, "no_weight_decay", None)
    if not callable(own):
        if not hasattr(asked.model, "named_parameters"):
            warnings.warn(
                "what no_weight_decay() lists is known to the live model alone: here it is empty", stacklevel=4
            )
        return []
    return [_as_pattern(str(name)) for name in sorted(own())]


def _as_pattern(name: str) -> str:
    if not any(mark in name for mark in "*?["):
        return literal(name)
    return f"re:{fnmatch.translate(name)}"


def _timm_layers(asked: Asked) -> list[list[str]]:
    matcher = getattr(asked.model, "group_matcher", None)
    if not callable(matcher):
        raise GroupsError(
            "the model has no group_matcher(), by which timm counts layers",
            hint="list them from input to output: layers = [['embed.*'], ['blocks.{i:int}.*'], ['head.*']]",
        )
    return timm_layers(asked.names, matcher(coarse=False))


def _first_conv(asked: Asked) -> list[str]:
    convs = (facts for facts in asked.subject.parameters if facts.shape is not None and len(facts.shape) >= _CONV)
    return [literal(facts.name) for facts in convs if "embedding" not in facts.roles][:1]


def _saved_vectors(asked: Asked) -> list[str]:
    saved = [facts for facts in asked.subject.trainable() if facts.shape is not None and len(facts.shape) == 1]
    found = [facts.name for facts in saved if not facts.roles & {"lora_a", "lora_b"}]
    multiple, ratio = asked.settings["vectors_lr_mult"], asked.settings["lr_ratio"]
    if found and multiple != ratio:
        warnings.warn(
            f"{plural(len(found), 'parameter')} of one dimension outside of LoRA get {multiple} x the base rate, where "
            f"LoRA+ of peft gives {ratio} x: {listed(found)}; vectors_lr_mult sets it",
            stacklevel=4,
        )
    return patterns_of(found, asked.names)


def _body_and_head(asked: Asked) -> list[list[str]]:
    heads = [facts.name for facts in asked.subject.parameters if _is_head(facts)]
    body = [name for name in asked.names if name not in set(heads)]
    return [patterns_of(part, asked.names) for part in (body, heads) if part]


def _is_head(facts: ParameterFacts) -> bool:
    return any("head" in one.roles for one in facts.named())


def _plain_layers(asked: Asked) -> list[list[str]]:
    heads = {facts.name for facts in asked.subject.parameters if _is_head(facts)}
    return plain_layers(asked.names, heads)


def _listed_layers(asked: Asked) -> list[Any]:
    layers = asked.settings["layers"]
    if not isinstance(layers, list | tuple) or not layers:
        raise GroupsError(
            f"layers is {kind_of(layers)}, not a list of patterns", hint="layers = [['body.*'], ['head.*']]"
        )
    return list(layers)


def _slice_groups(asked: Asked) -> list[dict[str, Any]]:
    layers, lo, hi = _listed_layers(asked), asked.settings["lo"], asked.settings["hi"]
    for key, value in (("lo", lo), ("hi", hi)):
        if (value != "" or key == "hi") and (
            isinstance(value, bool) or not isinstance(value, float | int) or value <= 0
        ):
            raise GroupsError(f"{key} is {kind_of(value)}, not a rate above 0", hint=f"{key} = 1e-3")
    count = len(layers)
    if lo == "":
        rates = [hi / 10] * (count - 1) + [hi]
    else:
        step = (hi / lo) ** (1 / max(1, count - 1))
        rates = [lo * step**index for index in range(count)] if count > 1 else [hi]
    return [
        {"name": f"slice {index}", "params": patterns, "lr": rate}
        for index, (patterns, rate) in enumerate(zip(layers, rates, strict=True))
    ]


def _unfrozen_groups(asked: Asked) -> list[dict[str, Any]]:
    layers, phase = _listed_layers(asked), asked.settings["phase"]
    if isinstance(phase, bool) or not isinstance(phase, int) or not 0 <= phase < len(layers):
        raise GroupsError(f"there is no phase {phase!r}", hint=f"the model has the phases 0 to {len(layers) - 1}")
    still = [pattern for level in layers[: len(layers) - 1 - phase] for pattern in _level(level)]
    frozen = [{"name": "frozen", "params": still, "freeze": True}] if still else []
    return [*frozen, {"name": "trained", "rest": True}]


def _level(level: str | Sequence[str]) -> Sequence[str]:
    return [level] if isinstance(level, str) else level


FROM_MODEL: Mapping[str, Callable[[Asked], Any]] = {
    "no_weight_decay": _no_weight_decay,
    "timm_layers": _timm_layers,
    "convnext_layers": lambda asked: convnext_layers(asked.names),
    "first_conv": _first_conv,
    "saved_vectors": _saved_vectors,
    "body_and_head": _body_and_head,
    "plain_layers": _plain_layers,
    "slice_groups": _slice_groups,
    "unfrozen_groups": _unfrozen_groups,
    "mup_modifiers": lambda asked: mup_modifiers(asked.subject, asked.settings),
}
