"""The ``adapter_config.json`` of PEFT: the scale of each module, and what cannot be folded."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from ckptkit.adapters.model import Kind
from ckptkit.core.patterns.matching import compile_regex
from ckptkit.core.text import printable, quoted, short_number
from ckptkit.errors import RuleError

__all__ = [
    "KINDS",
    "WITH_PEFT",
    "Scales",
    "adalora_scale",
    "is_feedforward",
    "names_module",
    "peft_type",
    "refuse_unsupported",
    "replaced_rows",
]

# The types of PEFT that are folded, with the kind of their factors; the last two have none.
KINDS: Mapping[str, Kind | None] = {
    "LORA": "lora", "ADALORA": "adalora", "LOHA": "loha", "LOKR": "lokr", "IA3": "ia3", "LN_TUNING": None,
    "TRAINABLE_TOKENS": None,
}  # fmt: skip
_ADD_INPUTS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"}
)
_KEEP_BESIDE = "no weights can have its effect: keep the adapter beside its base"
_BY_INPUT = frozenset({"XLORA", "POLY"})
WITH_PEFT = "merge with peft (merge_and_unload)"
# With one of these options, a LoRA does not compute W + scale * B @ A.
_UNSUPPORTED: Mapping[str, str] = {
    "alora_invocation_tokens": _KEEP_BESIDE, "arrow_config": _KEEP_BESIDE, "use_qalora": _KEEP_BESIDE,
    "use_bdlora": WITH_PEFT, "layer_replication": WITH_PEFT, "kasa_config": WITH_PEFT,
    "monteclora_config": WITH_PEFT,
}  # fmt: skip
_KEEP_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_MAX_REPEATS = 3


def peft_type(config: Mapping[str, object]) -> str:
    """Return the type of an adapter, as text: a configuration in memory has it as a member of an enum."""
    given = config.get("peft_type") or "LORA"
    return str(getattr(given, "value", given))


def refuse_unsupported(config: Mapping[str, object]) -> None:
    """Raise ``RuleError`` for a type or an option with another formula, and for an initialisation of the base."""
    kind = peft_type(config)
    if kind not in KINDS:
        hint = _KEEP_BESIDE if kind in _ADD_INPUTS | _BY_INPUT else WITH_PEFT
        raise RuleError(
            f"the type of the adapter is {printable(kind)}, which cannot be folded; {', '.join(KINDS)} can",
            hint=hint,
        )
    for name, hint in _UNSUPPORTED.items():
        if config.get(name):
            raise RuleError(f"the adapter uses {name}, which cannot be folded", hint=hint)
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _KEEP_BASE:
        raise RuleError(
            f"init_lora_weights is {quoted(str(start))}, which changed the base before training",
            hint="convert it to a plain adapter: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


def replaced_rows(config: Mapping[str, object], module: str, others: Collection[str] = ()) -> tuple[int, ...]:
    """Return the rows of a module that the adapter replaces; raise ``RuleError`` where the config does not say them.

    A module that the config does not name has the rows of ``others``, because PEFT saves the rows of tied modules too.
    """
    name = "token_indices" if peft_type(config) == "TRAINABLE_TOKENS" else "trainable_token_indices"
    given = config.get(name)
    if isinstance(given, Mapping):
        named = [rows for key, rows in given.items() if names_module(str(key), module)]
        tied = [rows for key, rows in given.items() if any(names_module(str(key), other) for other in others)]
        given = next(iter(named), tied[0] if tied and all(rows == tied[0] for rows in tied) else None)
    if not isinstance(given, Sequence) or not all(type(row) is int for row in given):
        raise RuleError(f"the config's {name} does not say which rows of {quoted(module)} are replaced")
    return tuple(given)


def names_module(name: str, module: str) -> bool:
    """Return whether a name of the config is the whole path of a module, or its last names."""
    return module == name or module.endswith(f".{name}")


class Scales:
    """The scale of each module, by the config and its patterns."""

    def __init__(self, config: Mapping[str, object], alpha: str = "lora_alpha") -> None:
        """Read the config; ``alpha`` is the name of its alpha."""
        self._is_rslora = bool(config.get("use_rslora"))
        self._rank = _number(config, "r", config.get("r"))
        self._alpha = _number(config, alpha, config.get(alpha))
        self._ranks = _patterns(config, "rank_pattern")
        self._alphas = _patterns(config, "alpha_pattern")

    def rank(self, module: str) -> float:
        """Return the rank of a module."""
        return _first_match(self._ranks, module, self._rank)

    def check_rank(self, module: str, key: str, shape: Sequence[int], times: int = 1) -> None:
        """Raise ``RuleError`` unless the first size of the factor ``key`` is the rank of its module, or a multiple."""
        rank = self.rank(module)
        if not shape or rank * times != shape[0]:
            raise RuleError(f"{quoted(key)} is {list(shape)}, but the rank in the config is {short_number(rank)}")

    def scale(self, module: str) -> float:
        """Return the scale of a module."""
        rank = self.rank(module)
        return _first_match(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._is_rslora else rank)


def adalora_scale(config: Mapping[str, object]) -> float:
    """Return the scale of AdaLoRA in PEFT, which stays that of the first rank when singular values are cut."""
    alpha = _number(config, "lora_alpha", config.get("lora_alpha"))
    return alpha / (_number(config, "init_r", config.get("init_r")) + 1e-5)


def is_feedforward(config: Mapping[str, object], module: str) -> bool:
    """Return whether IA3 multiplies the inputs of a module, and not its outputs."""
    given = config.get("feedforward_modules")
    if isinstance(given, str):
        return any(pattern.fullmatch(module) for pattern in [_pattern(given, "feedforward_modules")])
    return isinstance(given, Collection) and any(module.endswith(str(name)) for name in given)


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
        patterns.append((_pattern(rf"(.*\.)?({text})", name, text), _number(config, name, value)))
    return patterns


def _pattern(regex: str, name: str, shown: str = "") -> re.Pattern[str]:
    """Return a regular expression of the config, of which ``shown`` is the part in the file."""
    text = shown or regex
    # The pattern is from a file, so patterns that can run for minutes on a short name are refused.
    if len(text) > 1000 or re.search(r"\)[*+{]", text) or sum(map(text.count, "*+{")) > _MAX_REPEATS:
        raise RuleError(f"the pattern {quoted(text)} of {name} has too many repetitions")
    try:
        return compile_regex(regex, 0)
    except (re.error, RecursionError, OverflowError, ValueError):
        raise RuleError(f"the pattern {quoted(text)} of {name} is not a valid regular expression") from None


def _first_match(patterns: Sequence[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)
