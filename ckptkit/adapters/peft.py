"""Adapters of peft: the changes to a base, from the keys and shapes of the adapter and its ``adapter_config.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.adapters.model import AdapterPlan, Fold
from ckptkit.core.patterns.matching import compile_regex
from ckptkit.core.text import listed, plural, printable, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.lora import FoldLora
from ckptkit.tensor_ops.operation import Shape

__all__ = ["adapted_keys", "plan_adapter"]

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


def plan_adapter(adapter: Mapping[str, Shape], config: Mapping[str, object], base: Mapping[str, Shape]) -> AdapterPlan:
    """Return the changes of an adapter with this ``adapter_config.json`` to ``base``, from keys and shapes alone.

    A replacement may have another shape than the tensor that it replaces, such as a larger vocabulary.

    Raises ``RuleError`` where a tensor of the adapter has no matching key in the base, and where lora_A or lora_B is
    missing. It is also raised where a rank differs from the config, for adapters with another formula (such as DoRA),
    and for initialisations that changed the base.
    """
    _refuse_unsupported(adapter, config)
    parts = _parse_keys(adapter)
    _refuse_unplaced(parts, len(adapter), base)
    replacements = dict(parts.replacements)
    scales = _Scales(config)
    shapes = {**base, **{key: adapter[name] for key, name in replacements.items()}}
    orientation = _Orientation(bool(config.get("fan_in_fan_out")))
    folds = []
    for module, sides in parts.factors.items():
        weight, (down, up) = f"{module}.weight", _pair(sides)
        operation = FoldLora(scales.scale(module, down, adapter[down]))
        if down.rpartition(".lora_")[2].startswith("embedding_"):
            operation = replace(operation, fan_in_fan_out=True)
        else:
            operation = orientation.orient(operation, weight, (shapes[weight], adapter[down], adapter[up]))
        folds.append(Fold(weight, (down, up), operation, replacements.pop(weight, "")))
        if module in parts.biases:
            name, key = parts.biases.pop(module), f"{module}.bias"
            folds.append(Fold(key, (name,), FoldLora(operation.scale), replacements.pop(key, "")))
    if parts.biases:
        raise RuleError(f"{quoted(next(iter(parts.biases.values())))} has no factors lora_A and lora_B")
    orientation.refuse_contradiction()
    for fold in folds:
        _check(fold, shapes, adapter)
    return AdapterPlan(tuple(folds), replacements)


def adapted_keys(adapter: Collection[str]) -> tuple[str, ...]:
    """Return the keys of the base that an adapter with these keys changes; raise ``RuleError`` for other keys."""
    parts = _parse_keys(adapter)
    weights = [f"{module}.weight" for module in parts.factors]
    return (*parts.replacements, *weights, *(f"{module}.bias" for module in parts.biases))


def _refuse_unplaced(parts: _Parts, count: int, base: Mapping[str, Shape]) -> None:
    places = [(key, [name]) for key, name in parts.replacements.items()]
    places += [(f"{module}.bias", [name]) for module, name in parts.biases.items()]
    for module, sides in parts.factors.items():
        if f"{module}.in_proj_weight" in base:
            first = next(iter(sides.values()))
            raise RuleError(
                f"{quoted(first)} adapts an attention block, where peft adds the update of out_proj twice",
                hint="merge with peft",
            )
        places.append((f"{module}.weight", list(sides.values())))
    unplaced = [name for key, names in places if key not in base for name in names]
    if unplaced:
        has = "have" if len(unplaced) > 1 else "has"
        raise RuleError(
            f"of {plural(count, 'tensor')}, {listed(unplaced, 1)} {has} no matching key in the base",
            hint=_renaming([key for key, _ in places], unplaced[0], base)
            or "check that the adapter belongs to this base, or rename its keys to the keys of the base",
        )


def _renaming(places: Sequence[str], name: str, base: Mapping[str, Shape]) -> str | None:
    """Return a hint with a rename if adding or removing one prefix turns every place into a key of the base."""
    first = next(key for key in places if key not in base)
    head = _PREFIX if name.startswith(_PREFIX) else ""
    longer = (key[: -len(first)] for key in base if key.endswith(f".{first}"))
    shorter = (first[: at + 1] for at, char in enumerate(first) if char == "." and first[at + 1 :] in base)
    for prefix in longer:
        if all(f"{prefix}{key}" in base for key in places):
            return f"every tensor has a matching key after --rename {shell_word(f'{head}*={head}{prefix}*')}"
    for prefix in shorter:
        if all(key.startswith(prefix) and key.removeprefix(prefix) in base for key in places):
            return f"every tensor has a matching key after --rename {shell_word(f'{head}{prefix}*={head}*')}"
    return None


def _check(fold: Fold, shapes: Mapping[str, Shape], adapter: Mapping[str, Shape]) -> None:
    try:
        fold.operation.shapes([shapes[fold.key], *(adapter[name] for name in fold.factors)])
    except RuleError as error:
        raise RuleError(f"{quoted(fold.key)}: {error.reason}", hint=error.hint) from None


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


class _Orientation:
    """Decide whether weights are stored as ``[in, out]``, by their shapes, or by the config for square weights."""

    def __init__(self, configured: bool) -> None:
        self._configured = configured
        self._square = ""
        self._contradicting = ""

    def orient(self, operation: FoldLora, key: str, shapes: Sequence[Shape]) -> FoldLora:
        weight, down, up = shapes
        if len(weight) != 2 or len(down) != 2 or len(up) != 2:
            return operation
        plain, transposed = weight == (up[0], down[1]), weight == (down[1], up[0])
        if plain and transposed:
            self._square = self._square or key
        elif plain or transposed:
            self._contradicting = self._contradicting or (key if transposed != self._configured else "")
        return replace(operation, fan_in_fan_out=self._configured if plain == transposed else transposed)

    def refuse_contradiction(self) -> None:
        """Raise ``RuleError`` where a weight is square, and the shape of another weight contradicts the config."""
        if self._square and self._contradicting:
            raise RuleError(
                f"fan_in_fan_out is {str(self._configured).lower()}, which the shape of {quoted(self._contradicting)} "
                f"contradicts; {quoted(self._square)} is square and cannot tell",
                hint="merge with peft",
            )
