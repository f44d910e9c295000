"""Adapters of peft: what their tensors mean, by keys, shapes and ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.adapters.model import AdaptedModule, Adapter
from ckptkit.core.patterns.matching import compile_regex
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = ["read_peft"]

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.(?P<name>[^.]+))??(?:\.(?P<leaf>weight|bias))?"
)
_TO_SAVE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?:(?P<name>[^.]+)\.)?(?P<leaf>.+)")
_BASE_LAYER = re.compile(r"(?<![^.])base_layer\.")
# An adapter with one of these options does not compute W + scale * B @ A.
_UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config", "trainable_token_indices",
)  # fmt: skip
_KEEP_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_MAX_REPEATS = 3


def read_peft(adapter: Mapping[str, Shape], config: Mapping[str, object]) -> Adapter:
    """Return what the tensors of an adapter with this ``adapter_config.json`` mean, from keys and shapes alone.

    Raises ``RuleError`` where lora_A or lora_B is missing, and where a rank differs from the config. It is also raised
    for adapters with another formula (such as DoRA), and for initialisations that changed the base.
    """
    _refuse_unsupported(adapter, config)
    parts = _parse_keys(adapter)
    scales = _Scales(config)
    modules = []
    for module, sides in parts.factors.items():
        down, up = _pair(sides)
        scale = scales.scale(module, down, adapter[down])
        is_embedding = down.rpartition(".lora_")[2].startswith("embedding_")
        modules.append(
            AdaptedModule(
                module,
                "lora",
                {"A": down, "B": up},
                scale,
                "adapter_config.json",
                "transposed" if is_embedding else "by shape",
                parts.biases.pop(module, ""),
            )
        )
    if parts.biases:
        raise RuleError(f"{quoted(next(iter(parts.biases.values())))} has no factors lora_A and lora_B")
    return Adapter("peft", tuple(modules), parts.replacements, bool(config.get("fan_in_fan_out")))


def _refuse_unsupported(adapter: Mapping[str, Shape], config: Mapping[str, object]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise RuleError(f"the type of the adapter is {printable(str(kind))}, and only LORA can be folded")
    dora = next((key for key in adapter if ".lora_magnitude_vector" in key), None)
    if dora is not None:
        raise RuleError(f"{quoted(dora)} belongs to DoRA, which cannot be folded", hint="merge with peft")
    named = next((name for name in _UNSUPPORTED if config.get(name)), None)
    if named is not None:
        raise RuleError(f"the adapter uses {named}, which cannot be folded", hint="merge with peft")
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _KEEP_BASE:
        raise RuleError(
            f"init_lora_weights is {quoted(str(start))}, which changed the base before training",
            hint="convert it to a plain adapter: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    factors: dict[str, dict[str, str]]  # module -> A or B -> adapter key
    biases: dict[str, str]  # module -> adapter key of the update
    replacements: dict[str, str]  # base key -> adapter key


def _parse_keys(adapter: Collection[str]) -> _Parts:
    parts = _Parts({}, {}, {})
    names: set[str] = set()
    for key in adapter:
        plain = _BASE_LAYER.sub("", key.removeprefix(_PREFIX))
        found = _FACTOR.fullmatch(plain) or _TO_SAVE.fullmatch(plain)
        names.add((found["name"] if found is not None else None) or "")
        if found is None:
            table, place, value = parts.replacements, plain, key
        elif found.re is _TO_SAVE:
            table, place, value = parts.replacements, f"{found['module']}.{found['leaf']}", key
        elif found["leaf"] == "bias":
            if found["side"] == "A":
                raise RuleError(f"{quoted(key)} is not a tensor of an adapter")
            table, place, value = parts.biases, found["module"], key
        else:
            table, place, value = parts.factors.setdefault(found["module"], {}), found["side"], key
        if place in table:
            raise RuleError(f"{quoted(table[place])} and {quoted(key)} have the same place in the base")
        table[place] = value
    several = sorted(names - {""})
    if len(several) > 1:
        raise RuleError(f"there are {len(several)} adapters ({', '.join(map(quoted, several[:4]))})", hint="keep one")
    if not parts.factors:
        raise RuleError(f"none of {plural(len(adapter), 'tensor')} is a factor lora_A or lora_B")
    return parts


def _pair(sides: Mapping[str, str]) -> tuple[str, str]:
    if len(sides) != 2:
        raise RuleError(f"{quoted(next(iter(sides.values())))} has no partner in the adapter")
    return sides["A"], sides["B"]


class _Scales:
    """The scale of each module, by the config and its patterns."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._is_rslora = bool(config.get("use_rslora"))
        self._rank = _number(config, "r", config.get("r"))
        self._alpha = _number(config, "lora_alpha", config.get("lora_alpha"))
        self._ranks = _patterns(config, "rank_pattern")
        self._alphas = _patterns(config, "alpha_pattern")

    def scale(self, module: str, key: str, down: Shape) -> float:
        rank = _first_match(self._ranks, module, self._rank)
        if not down or rank != down[0]:
            raise RuleError(f"{quoted(key)} is {list(down)}, but the rank in the config is {rank:g}")
        return _first_match(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._is_rslora else rank)


def _number(config: Mapping[str, object], name: str, value: object) -> float:
    if name not in config:
        raise RuleError(f"the config has no {name}", hint="give the content of the adapter's adapter_config.json")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
        raise RuleError(f"the config's {name} is {printable(repr(value))}")
    return value


def _patterns(config: Mapping[str, object], name: str) -> Sequence[tuple[re.Pattern[str], float]]:
    table = config.get(name) or {}
    if not isinstance(table, Mapping):
        raise RuleError(f"the config's {name} is not a table")
    patterns = []
    for text, value in table.items():
        # The pattern is from a file, so patterns that can run for minutes on a short name are refused.
        if len(text) > 1000 or re.search(r"\)[*+{]", text) or sum(map(text.count, "*+{")) > _MAX_REPEATS:
            raise RuleError(f"the pattern {quoted(text)} of {name} has too many repetitions")
        try:
            patterns.append((compile_regex(rf"(.*\.)?({text})", 0), _number(config, name, value)))
        except (re.error, RecursionError, OverflowError, ValueError):
            raise RuleError(f"the pattern {quoted(text)} of {name} is not a valid regular expression") from None
    return patterns


def _first_match(patterns: Sequence[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)
