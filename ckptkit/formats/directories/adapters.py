"""Compare the tensors of an adapter with the configuration of the adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ckptkit.adapters.keys import PEFT_PREFIX
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.files.hub_prefix import HUB_PREFIX
from ckptkit.core.files.places import kind_at
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.text import plural, quoted
from ckptkit.formats import codes

__all__ = ["CONFIG", "adapter_warnings"]

CONFIG = "adapter_config.json"
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!lora_)\w+)?(?:\.weight)?")
_LITERAL = re.compile(r"\^?[\w.]+")  # a module name; any other key is a regular expression, which is never evaluated
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_MOST_NAMED = 4
_DEEPEST = 64


def adapter_warnings(infos: Mapping[str, TensorInfo], config: Mapping[str, object] | None) -> list[ReaderWarning]:
    """Return warnings about an adapter. ``config`` is the configuration of the adapter, or None if there is none.

    For LoRA, there is a warning for each tensor of another rank than ``r`` or ``rank_pattern`` of the configuration.
    """
    if config is None:
        return [
            ReaderWarning(
                f"no {CONFIG} in the directory of the weights: the scale (lora_alpha / r) is unknown",
                codes.ADAPTER_CONFIG,
            )
        ]
    base = config.get("base_model_name_or_path")
    base_model = f"the base model {quoted(base)}" if isinstance(base, str) and base else "its base model"
    if isinstance(base, str) and _REPOSITORY.fullmatch(base) and not kind_at(base):
        base_model += f" ({HUB_PREFIX}{base})"
    warnings = [
        ReaderWarning(f"this is an adapter: the file does not contain the weights of {base_model}", codes.ADAPTER_BASE)
    ]
    if config.get("peft_type") == "LORA" and not config.get("target_parameters"):
        wrong = list(_other_ranks(infos, config))
        warnings += [ReaderWarning(text, codes.ADAPTER_RANK) for text in wrong[:_MOST_NAMED]]
        if len(wrong) > _MOST_NAMED:
            text = f"{plural(len(wrong) - _MOST_NAMED, 'more tensor')} of another rank than in {CONFIG}"
            warnings.append(ReaderWarning(text, codes.ADAPTER_RANK))
    return warnings


def _other_ranks(infos: Mapping[str, TensorInfo], config: Mapping[str, object]) -> Iterator[str]:
    pattern = config.get("rank_pattern")
    pattern = pattern if isinstance(pattern, Mapping) else {}
    if not all(_LITERAL.fullmatch(key) for key in pattern):
        return
    positions = {key: position for position, key in enumerate(pattern)}
    for key, info in infos.items():
        match = _LOW_RANK.fullmatch(key)
        if match is None or len(info.shape) < 2:
            continue
        expected = _rank_of(match["module"].removeprefix(PEFT_PREFIX), config.get("r"), pattern, positions)
        found = info.shape[0] if match["side"] == "A" else info.shape[1]
        if type(expected) is int and found != expected:
            yield f"{quoted(key)} has rank {found:,}, but {CONFIG} gives {expected}"


def _rank_of(module: str, default: object, pattern: Mapping[str, object], positions: Mapping[str, int]) -> object:
    # A key matches the last segments of a module's name, or with "^" the whole name. The first key that matches wins.
    parts = module.split(".")
    ends = [".".join(parts[first:]) for first in range(len(parts))] if len(parts) <= _DEEPEST else [module]
    matches = [end for end in (f"^{module}", *ends) if end in positions]
    return pattern[min(matches, key=positions.__getitem__)] if matches else default
