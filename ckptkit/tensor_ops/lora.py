"""Adapters of peft on names and shapes alone: which factors fold into which weight, and that none is left over."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ckptkit.core.text import plural, printable, quoted, shell_word
from ckptkit.core.torch_types import Tensor
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Arithmetic, Flag, Int, Number, Shape, working_dtype

__all__ = ["AdapterPlan", "ExtractLora", "Fold", "FoldLora", "plan_adapter"]


@dataclass(frozen=True, slots=True)
class FoldLora(Arithmetic):
    """``[W, A, B]`` into ``W + scale * B @ A``, as peft merges an adapter, rounded once.

    A is ``[r, in]`` and B ``[out, r]``; for a convolution A is ``[r, in, *kernel]`` and B ``[out, r, 1, ...]``.
    ``fan_in_fan_out`` says that W is ``[in, out]``: a Conv1D as in GPT-2, and every embedding (A ``[r, vocab]``, B
    ``[dim, r]``). Two tensors, ``[bias, lora_bias]``, make ``bias + scale * lora_bias``. The scale is given as such,
    or as ``alpha`` over the rank (over its square root with ``rslora``); ``r`` is checked against A where given.
    """

    scale: Number | None = None
    alpha: Number | None = None
    r: Int | None = None
    rslora: Flag = False
    fan_in_fan_out: Flag = False
    name: ClassVar[str] = "fold_lora"

    def __post_init__(self) -> None:
        """Refuse two ways of giving the scale, and none."""
        if (self.scale is None) == (self.alpha is None):
            raise self.refusal("needs either scale or alpha")
        if self.r is not None and self.r < 1:
            raise self.refusal(f"{self.r} is no rank")

    def factor(self, rank: int) -> float:
        """Return what ``B @ A`` is multiplied by."""
        if self.scale is not None or self.alpha is None:
            return self.scale or 0.0
        return self.alpha / math.sqrt(rank) if self.rslora else self.alpha / rank

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shape of W; raises ``RuleError`` where A and B do not make an update of that shape."""
        if len(inputs) == 2:
            if self.scale is None and self.r is None:
                raise self.refusal("a bias does not tell the rank", "give r, or scale")
            if inputs[0] != inputs[1]:
                raise self.refusal(f"the bias is {list(inputs[0])}, and its update {list(inputs[1])}")
            return (inputs[0],)
        if len(inputs) != 3:
            raise self.refusal(f"takes W, A and B, and there are {len(inputs)}")
        weight, down, up = inputs
        if min(map(len, inputs)) < 2 or up[2:] != (1,) * (len(down) - 2) or up[1] != down[0] or down[0] < 1:
            raise self.refusal(f"A of {list(down)} and B of {list(up)} have no rank in common")
        if self.r not in (None, down[0]):
            raise self.refusal(f"A of {list(down)} has rank {down[0]}, not {self.r}")
        update = (up[0], *down[1:])
        if self.fan_in_fan_out:
            update = tuple(reversed(update))
        if update != weight or (self.fan_in_fan_out and len(weight) != 2):
            raise self.refusal(f"A of {list(down)} and B of {list(up)} make {list(update)}, and W is {list(weight)}")
        return (weight,)

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Multiply, scale, add."""
        if len(tensors) == 2:
            return [tensors[1] * self.factor(self.r or 1) + tensors[0]]
        weight, down, up = tensors
        update = up.flatten(1) @ down.flatten(1)
        update = (update.T if self.fan_in_fan_out else update.reshape(weight.shape)) * self.factor(down.shape[0])
        return [update.add_(weight)]


@dataclass(frozen=True, slots=True)
class ExtractLora(Arithmetic):
    """``[base, tuned]`` into the ``[A, B]`` of rank ``rank`` whose product is nearest to their difference, at scale 1.

    By singular value decomposition; both factors carry the square root of the values, and the largest entry of each
    column of B is positive, so that the signs do not depend on the machine. Convolutions as ``fold_lora`` takes them.
    """

    rank: Int
    fan_in_fan_out: Flag = False
    name: ClassVar[str] = "extract_lora"

    def __post_init__(self) -> None:
        """Refuse what is no rank."""
        if self.rank < 1:
            raise self.refusal(f"{self.rank} is no rank")

    @property
    def outputs(self) -> int:
        """A and B."""
        return 2

    def shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Return the shapes of A and B."""
        if len(inputs) != 2 or inputs[0] != inputs[1]:
            raise self.refusal(
                f"takes two weights of one shape, and here are {', '.join(str(list(s)) for s in inputs)}"
            )
        shape = inputs[0]
        if len(shape) < 2 or (self.fan_in_fan_out and len(shape) != 2):
            raise self.refusal(f"{list(shape)} is no {'matrix' if self.fan_in_fan_out else 'weight'} to decompose")
        out, *ins = reversed(shape) if self.fan_in_fan_out else shape
        if self.rank > min(out, math.prod(ins)):
            raise self.refusal(f"an update of {list(shape)} has no rank above {min(out, math.prod(ins))}")
        return (self.rank, *ins), (out, self.rank, *(1 for _ in ins[1:]))

    def compute(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Decompose the difference."""
        import torch

        update = _difference(tensors, fan_in_fan_out=self.fan_in_fan_out)
        left, values, right = torch.linalg.svd(update.flatten(1), full_matrices=False)
        left, values, right = left[:, : self.rank], values[: self.rank].sqrt(), right[: self.rank]
        signs = torch.gather(left, 0, left.abs().argmax(0, keepdim=True)).sign()
        down = (right * signs.T) * values[:, None]
        up = (left * signs) * values
        return [
            down.reshape(self.rank, *update.shape[1:]),
            up.reshape(*up.shape, *(1 for _ in update.shape[2:])),
        ]

    def residual(self, tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> float:
        """Return how much of the difference ``[A, B]`` leave out: the norm of the rest over that of the whole."""
        wide = working_dtype(tensors)
        update = _difference([tensor.to(wide) for tensor in tensors], fan_in_fan_out=self.fan_in_fan_out).flatten(1)
        down, up = (factor.to(wide).flatten(1) for factor in factors)
        whole = float(update.norm())
        return float((update - up @ down).norm()) / whole if whole else 0.0


def _difference(tensors: Sequence[Tensor], *, fan_in_fan_out: bool) -> Tensor:
    base, tuned = tensors
    return (tuned - base).T if fan_in_fan_out else tuned - base


_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.(?P<name>[^.]+))??(?:\.(?P<leaf>weight|bias))?"
)
_TO_SAVE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?:(?P<name>[^.]+)\.)?(?P<leaf>.+)")
_BASE_LAYER = re.compile(r"(?<![^.])base_layer\.")
# Each of these computes something else than W + scale * B @ A.
_OTHER_MATHS = (
    "use_dora", "use_qalora", "use_bdlora", "layer_replication", "target_parameters", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config", "trainable_token_indices",
)  # fmt: skip
_BASE_AS_IT_WAS = (None, True, False, "gaussian", "eva", "orthogonal")
_MOST_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Fold:
    """One weight of the base and what folds into it: ``operation`` takes the weight, then ``factors`` in order.

    ``replaced_by`` names the tensor of the adapter that takes the weight's place first, where there is one.
    """

    key: str
    factors: tuple[str, ...]
    operation: FoldLora
    replaced_by: str = ""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter does to its base: weights folded, and tensors replaced (base key → adapter key), in order."""

    folds: tuple[Fold, ...]
    replacements: Mapping[str, str] = field(default_factory=dict)


def plan_adapter(adapter: Mapping[str, Shape], config: Mapping[str, object], base: Mapping[str, Shape]) -> AdapterPlan:
    """Return what an adapter with this ``adapter_config.json`` does to ``base``; every tensor of it has its place.

    A replacement may have another shape than what it replaces (a grown vocabulary). Raises ``RuleError`` where a tensor
    has no place in the base, a factor lacks its partner or its rank is not what the config says, and for what is not
    folded by this formula: DoRA and other variants, and initialisations that changed the base.
    """
    _refuse_other_maths(adapter, config)
    parts = _sorted_out(adapter)
    _refuse_strangers(parts, len(adapter), base)
    replacements = dict(parts.replacements)
    scales = _Scales(config)
    shapes = {**base, **{key: adapter[name] for key, name in replacements.items()}}
    oriented = _Orientation(bool(config.get("fan_in_fan_out")))
    folds = []
    for module, sides in parts.factors.items():
        home, (down, up) = f"{module}.weight", _pair(sides)
        operation = FoldLora(scales.scale(module, down, adapter[down]))
        if down.rpartition(".lora_")[2].startswith("embedding_"):
            operation = replace(operation, fan_in_fan_out=True)
        else:
            operation = oriented.turned(operation, home, (shapes[home], adapter[down], adapter[up]))
        folds.append(Fold(home, (down, up), operation, replacements.pop(home, "")))
        if module in parts.biases:
            name, key = parts.biases.pop(module), f"{module}.bias"
            folds.append(Fold(key, (name,), FoldLora(operation.scale), replacements.pop(key, "")))
    if parts.biases:
        raise RuleError(f"{quoted(next(iter(parts.biases.values())))} has no factors beside it")
    oriented.refuse_doubt()
    for fold in folds:
        _check(fold, shapes, adapter)
    return AdapterPlan(tuple(folds), replacements)


def _refuse_strangers(parts: _Parts, count: int, base: Mapping[str, Shape]) -> None:
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
    lost = [name for key, names in places if key not in base for name in names]
    if lost:
        more = f" and {len(lost) - 1} more have" if lost[1:] else " has"
        raise RuleError(
            f"of {plural(count, 'tensor')}, {quoted(lost[0])}{more} no place in the base",
            hint=_renaming([key for key, _ in places], lost[0], base)
            or "is it this base's adapter? Rename the keys of one to those of the other",
        )


def _renaming(places: Sequence[str], name: str, base: Mapping[str, Shape]) -> str | None:
    """Return the way out where one prefix, put before every place or taken off it, makes a key of the base of each."""
    first = next(key for key in places if key not in base)
    head = _PREFIX if name.startswith(_PREFIX) else ""
    longer = (key[: -len(first)] for key in base if key.endswith(f".{first}"))
    shorter = (first[: at + 1] for at, char in enumerate(first) if char == "." and first[at + 1 :] in base)
    for prefix in longer:
        if all(f"{prefix}{key}" in base for key in places):
            return f"every one has after --rename {shell_word(f'{head}*={head}{prefix}*')}"
    for prefix in shorter:
        if all(key.startswith(prefix) and key.removeprefix(prefix) in base for key in places):
            return f"every one has after --rename {shell_word(f'{head}{prefix}*={head}*')}"
    return None


def _check(fold: Fold, shapes: Mapping[str, Shape], adapter: Mapping[str, Shape]) -> None:
    try:
        fold.operation.shapes([shapes[fold.key], *(adapter[name] for name in fold.factors)])
    except RuleError as error:
        raise RuleError(f"{quoted(fold.key)}: {error.reason}", hint=error.hint) from None


def _refuse_other_maths(adapter: Mapping[str, Shape], config: Mapping[str, object]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise RuleError(f"the adapter is of type {printable(str(kind))}, and only LORA is folded")
    dora = next((key for key in adapter if ".lora_magnitude_vector" in key), None)
    if dora is not None:
        raise RuleError(f"{quoted(dora)} belongs to DoRA, which is not folded by this formula", hint="merge with peft")
    named = next((name for name in _OTHER_MATHS if config.get(name)), None)
    if named is not None:
        raise RuleError(f"the adapter uses {named}, which is not folded by this formula", hint="merge with peft")
    start = config.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _BASE_AS_IT_WAS:
        raise RuleError(
            f"init_lora_weights is {quoted(str(start))}, and such an adapter fits the base that its start left behind",
            hint="save it as a plain one: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    factors: dict[str, dict[str, str]]  # module -> side -> adapter key
    biases: dict[str, str]  # module -> adapter key of the update
    replacements: dict[str, str]  # base key -> adapter key


def _sorted_out(adapter: Mapping[str, Shape]) -> _Parts:
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
                raise RuleError(f"{quoted(key)} is no tensor of an adapter")
            table, place, value = parts.biases, found["module"], key
        else:
            table, place, value = parts.factors.setdefault(found["module"], {}), found["side"], key
        if place in table:
            raise RuleError(f"{quoted(table[place])} and {quoted(key)} have one place in the base")
        table[place] = value
    several = sorted(names - {""})
    if len(several) > 1:
        raise RuleError(f"there are {len(several)} adapters ({', '.join(map(quoted, several[:4]))})", hint="keep one")
    if not parts.factors:
        raise RuleError(f"none of {plural(len(adapter), 'tensor')} is a factor lora_A or lora_B")
    return parts


def _pair(sides: Mapping[str, str]) -> tuple[str, str]:
    if len(sides) != 2:
        raise RuleError(f"{quoted(next(iter(sides.values())))} has no partner beside it")
    return sides["A"], sides["B"]


class _Scales:
    """The scale of each module, as the config and its patterns say."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._root = bool(config.get("use_rslora"))
        self._rank = _number(config, "r", config.get("r"))
        self._alpha = _number(config, "lora_alpha", config.get("lora_alpha"))
        self._ranks = _patterns(config, "rank_pattern")
        self._alphas = _patterns(config, "alpha_pattern")

    def scale(self, module: str, key: str, down: Shape) -> float:
        rank = _first_fit(self._ranks, module, self._rank)
        if not down or rank != down[0]:
            raise RuleError(f"{quoted(key)} is {list(down)}, and the config says rank {rank:g}")
        return _first_fit(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._root else rank)


def _number(config: Mapping[str, object], name: str, value: object) -> float:
    if name not in config:
        raise RuleError(f"the config has no {name}", hint="it belongs beside the adapter: adapter_config.json")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
        raise RuleError(f"the config's {name} is {printable(repr(value))}")
    return value


def _patterns(config: Mapping[str, object], name: str) -> Sequence[tuple[re.Pattern[str], float]]:
    table = config.get(name) or {}
    if not isinstance(table, Mapping):
        raise RuleError(f"the config's {name} is no table")
    made = []
    for text, value in table.items():
        # It comes from a file, so it is held to what cannot run for minutes on a name of ordinary length.
        if len(text) > 1000 or re.search(r"\)[*+{]", text) or sum(map(text.count, "*+{")) > _MOST_REPEATS:
            raise RuleError(f"the pattern {quoted(text)} of {name} repeats too much to be tried")
        try:
            made.append((re.compile(rf"(.*\.)?({text})"), _number(config, name, value)))
        except (re.error, RecursionError, OverflowError, ValueError):
            raise RuleError(f"the pattern {quoted(text)} of {name} is no regular expression") from None
    return made


def _first_fit(patterns: Sequence[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)


class _Orientation:
    """Whether weights are stored ``[in, out]``: told by their shapes where these can, else by the config."""

    def __init__(self, configured: bool) -> None:
        self._configured = configured
        self._square = ""
        self._against = ""

    def turned(self, operation: FoldLora, key: str, shapes: Sequence[Shape]) -> FoldLora:
        weight, down, up = shapes
        if len(weight) != 2 or len(down) != 2 or len(up) != 2:
            return operation
        plain, turned = weight == (up[0], down[1]), weight == (down[1], up[0])
        if plain and turned:
            self._square = self._square or key
        elif plain or turned:
            self._against = self._against or (key if turned != self._configured else "")
        return replace(operation, fan_in_fan_out=self._configured if plain == turned else turned)

    def refuse_doubt(self) -> None:
        """Refuse a square weight where another's shape shows that the config does not speak for all."""
        if self._square and self._against:
            raise RuleError(
                f"fan_in_fan_out is {str(self._configured).lower()}, which {quoted(self._against)} belies, "
                f"and {quoted(self._square)} is square: its shape does not tell",
                hint="merge with peft",
            )
