"""Adapters of PEFT: what their tensors mean, by keys, shapes and ``adapter_config.json``."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ckptkit.adapters.keys import PEFT_PREFIX
from ckptkit.adapters.model import COMPLETE, AdaptedModule, Adapter, Kind, Orientation, TokenRows
from ckptkit.adapters.peft_config import (
    KINDS,
    WITH_PEFT,
    Scales,
    adalora_scale,
    is_feedforward,
    names_module,
    peft_type,
    refuse_unsupported,
    replaced_rows,
)
from ckptkit.adapters.peft_names import TIED_NAMES
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = ["read_peft"]

_NAME = r"(?:\.(?P<name>[^.]+))??"
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<embedding>embedding_)?(?P<side>[ABE])|lora_(?P<magnitude>magnitude)_vector"
    rf"|(?:hada|lokr)_(?P<part>w[12](?:_[ab])?|t[12])|ia3_(?P<l>l)){_NAME}(?:\.(?P<leaf>weight|bias))?"
)
_ROWS = re.compile(rf"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAME}")
_ORIGINAL = re.compile(r".+\.original_module\..+")
_TO_SAVE = re.compile(r"(?P<module>.+)\.(?:modules_to_save|ln_tuning_layers)\.(?:(?P<name>[^.]+)\.)?(?P<leaf>.+)")
_BASE_LAYER = re.compile(r"(?<![^.])(?:token_adapter\.)?base_layer\.")
_NO_SHAPES: Mapping[str, Shape] = MappingProxyType({})


def read_peft(
    adapter: Mapping[str, Shape], config: Mapping[str, object], base: Mapping[str, Shape] = _NO_SHAPES
) -> Adapter:
    """Return what the tensors of an adapter with this ``adapter_config.json`` mean, from keys and shapes alone.

    ``base`` has the shapes of the base, which tell the parameter that factors of ``target_parameters`` belong to.

    Raises ``RuleError`` where a factor is missing, and where a rank differs from the config. It is also raised for
    adapters with another formula, and for initialisations that changed the base.
    """
    refuse_unsupported(config)
    kind = KINDS[peft_type(config)]
    parts = _parse_keys(adapter, has_factors=kind is not None)
    reader = _Modules(adapter, config, base, kind)
    modules = [reader.module(factors) for factors in parts.factors.values()]
    rows = tuple(
        TokenRows(f"{module}.weight", key, replaced_rows(config, module, parts.rows))
        for module, key in parts.rows.items()
    )
    is_turned = bool(config.get("fan_in_fan_out"))
    made = Adapter(tuple(modules), parts.replacements, is_turned, rows, left_out=parts.left_out)
    return _with_ties(made, config)


def _with_ties(adapter: Adapter, config: Mapping[str, object]) -> Adapter:
    """Return the adapter with the keys whose change also holds for what is tied to them.

    PEFT ties new rows of the same indices. With ``ensure_weight_tying`` it ties everything, but only if one of the
    names that it knows is adapted. A tensor that is saved whole without being in ``modules_to_save`` is a copy of the
    model's, because PEFT saves both embeddings of a resized vocabulary.
    """
    changed = adapter.changed_keys()
    if config.get("ensure_weight_tying") and any(_module_name(key) in TIED_NAMES for key in changed):
        return replace(adapter, follows_ties=frozenset(changed))
    listed = config.get("modules_to_save")
    trained = [str(name) for name in listed] if isinstance(listed, Sequence) and not isinstance(listed, str) else []
    adapted = {module.key for module in adapter.modules}
    is_one_set = len({rows.indices for rows in adapter.rows}) == 1
    copies = [
        key
        for key in adapter.replacements
        if key not in adapted and not any(key.rpartition(".")[0].endswith(name) for name in trained)
    ]
    rows = [each.key for each in adapter.rows] if is_one_set else []
    return replace(adapter, follows_ties=frozenset([*copies, *rows]))


def _module_name(key: str) -> str:
    return key.rpartition(".")[0].rpartition(".")[2]


@dataclass(slots=True)
class _Factors:
    """The tensors of one module; ``depth`` counts the wrappers around the parameter, which PEFT nests."""

    module: str
    depth: int
    is_embedding: bool = False
    by_role: dict[str, str] = field(default_factory=dict)
    bias: str = ""

    @property
    def first(self) -> str:
        return next(iter(self.by_role.values()), self.bias)


@dataclass(frozen=True, slots=True)
class _Parts:
    factors: dict[tuple[str, int], _Factors]
    rows: dict[str, str]  # module -> adapter key
    replacements: dict[str, str]  # base key -> adapter key
    left_out: dict[str, str]  # adapter key -> reason


def _parse_keys(adapter: Collection[str], *, has_factors: bool) -> _Parts:
    parts = _Parts({}, {}, {}, {})
    names: set[str] = set()
    for key in adapter:
        if _ORIGINAL.fullmatch(key):
            parts.left_out[key] = "the values before the training"
            continue
        whole = key.removeprefix(PEFT_PREFIX)
        plain = _BASE_LAYER.sub("", whole)
        found = _FACTOR.fullmatch(plain) or _ROWS.fullmatch(plain) or _TO_SAVE.fullmatch(plain)
        names.add((found["name"] if found is not None else None) or "")
        if found is not None and found.re is _FACTOR:
            _add_factor(parts, key, found, _depth(whole))
            continue
        if found is None:
            table, place = parts.replacements, plain
        elif found.re is _ROWS:
            table, place = parts.rows, found["module"]
        else:
            table, place = parts.replacements, f"{found['module']}.{found['leaf']}"
            if f"{PEFT_PREFIX}{place}" in adapter:  # PEFT can save a trained embedding twice
                parts.left_out[key] = f"saved twice, also as {quoted(PEFT_PREFIX + place)}"
                continue
        if place in table:
            raise RuleError(f"{quoted(table[place])} and {quoted(key)} have the same place in the base")
        table[place] = key
    several = sorted(names - {""})
    if len(several) > 1:
        raise RuleError(f"there are {len(several)} adapters ({', '.join(map(quoted, several[:4]))})", hint="keep one")
    if has_factors and not parts.factors and not parts.rows:
        raise RuleError(
            f"none of {plural(len(adapter), 'tensor')} is a factor of the adapter, such as lora_A or lora_B"
        )
    return parts


def _depth(key: str) -> int:
    """Return the number of wrappers around the wrapper that a factor belongs to."""
    return len(re.findall(r"(?<![^.])base_layer(?=\.)", key))


def _add_factor(parts: _Parts, key: str, found: re.Match[str], depth: int) -> None:
    factors = parts.factors.setdefault((found["module"], depth), _Factors(found["module"], depth))
    if found["leaf"] == "bias":
        if found["side"] != "B":
            raise RuleError(f"{quoted(key)} is not a tensor of an adapter")
        same, factors.bias = factors.bias, key
    else:
        role = found["side"] or found["magnitude"] or found["part"] or found["l"]
        same = factors.by_role.get(role, "")
        factors.by_role[role] = key
        factors.is_embedding |= found["embedding"] is not None
    if same:
        raise RuleError(f"{quoted(same)} and {quoted(key)} have the same place in the base")


class _Modules:
    """Describe each adapted module, by the shapes of its factors and the configuration."""

    def __init__(
        self, adapter: Mapping[str, Shape], config: Mapping[str, object], base: Mapping[str, Shape], kind: Kind | None
    ) -> None:
        self._adapter, self._config, self._base = adapter, config, base
        self._kind: Kind = kind or "lora"
        given = config.get("target_parameters")
        self._parameters = [str(name) for name in given] if isinstance(given, list | tuple | set) else []
        self._taken: set[str] = set()

    @functools.cached_property
    def _scales(self) -> Scales:
        return Scales(self._config, "alpha" if self._kind in ("loha", "lokr") else "lora_alpha")

    def module(self, factors: _Factors) -> AdaptedModule:
        """Return the description of one module; raise ``RuleError`` where its tensors do not fit the config."""
        kind, module, roles = self._kind_of(factors), factors.module, factors.by_role
        _refuse_incomplete(factors, kind)
        if kind == "ia3":
            per_input, shape = is_feedforward(self._config, module), self._adapter[roles["l"]]
            if len(shape) == 2 and shape[int(per_input)] == 1 != shape[int(not per_input)]:
                raise RuleError(
                    f"{quoted(roles['l'])} is {list(shape)}, which feedforward_modules of the config contradicts"
                )
            return AdaptedModule(module, kind, roles, 1.0, per_input=per_input)
        parameter, experts = self._parameter(factors) if self._parameters else ("weight", 1)
        scale = self._scale(factors, kind, experts)
        orientation: Orientation = "transposed" if factors.is_embedding else "by shape"
        return AdaptedModule(module, kind, roles, scale, orientation, factors.bias, parameter)

    def _kind_of(self, factors: _Factors) -> Kind:
        """Return the kind of a module; raise ``RuleError`` for a tensor that the type of the adapter does not have."""
        roles, is_dora = factors.by_role, self._kind == "lora" and bool(self._config.get("use_dora"))
        if "magnitude" in roles and not is_dora:
            raise RuleError(f"{quoted(roles['magnitude'])} belongs to DoRA, and use_dora of the config is not true")
        kind: Kind = "dora" if is_dora else self._kind
        other = next((key for role, key in roles.items() if not any(role in each for each in COMPLETE[kind])), None)
        if other is not None:
            raise RuleError(f"{quoted(other)} is not a factor of {printable(peft_type(self._config))}")
        if kind != "lora" and factors.bias:
            raise RuleError(f"{quoted(factors.bias)} is a bias, and only a plain LoRA has one")
        return kind

    def _scale(self, factors: _Factors, kind: Kind, experts: int) -> float:
        module, roles = factors.module, factors.by_role
        if kind == "adalora":
            return adalora_scale(self._config)
        if kind == "lokr":
            whole = roles.get("w2", "")
            if whole and len(self._adapter[whole]) == 3:
                raise RuleError(
                    f"{quoted(whole)} is the kernel of a Conv1d, which PEFT multiplies in another way than LoKr says",
                    hint=WITH_PEFT,
                )
            return self._scales.scale(module)
        key = roles["w1_b" if kind == "loha" else "A"]
        self._scales.check_rank(module, key, self._adapter[key], experts)
        return self._scales.scale(module)

    def _parameter(self, factors: _Factors) -> tuple[str, int]:
        """Return the parameter of a module that the factors fit, and the number of its experts.

        Raises ``RuleError`` where they fit none of the ``target_parameters``, or more than one.
        """
        module, down, up = factors.module, *(self._adapter[factors.by_role[role]] for role in ("A", "B"))
        owned = [name.rpartition(".") for name in self._parameters]
        named = [parameter for owner, _, parameter in owned if not owner or names_module(owner, module)]
        shapes = {name: self._base[f"{module}.{name}"] for name in named if f"{module}.{name}" in self._base}
        if not shapes:
            is_plain = not named or f"{module}.weight" in self._base
            return ("weight" if is_plain else named[0]), 1
        fitting = {}
        for name, shape in shapes.items():
            experts, sizes = (shape[0] if len(shape) == 3 else 1), sorted(shape[-2:])
            ranks = int(self._scales.rank(module)) * experts
            if down[:1] == up[1:] == (ranks,) and sizes == sorted((*up[:1], *down[1:])) and name not in self._taken:
                fitting[name] = experts
        if len(fitting) != 1:
            fits = "fit more than one" if fitting else "do not fit one"
            found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise RuleError(
                f"{quoted(factors.first)} {list(down)} and its partner {list(up)} {fits} of the target_parameters: "
                f"{found}",
                hint=WITH_PEFT,
            )
        return next(iter(fitting.items()))


def _refuse_incomplete(factors: _Factors, kind: Kind) -> None:
    roles = factors.by_role
    if not roles:
        raise RuleError(f"{quoted(factors.bias)} has no factors lora_A and lora_B")
    if kind == "dora" and "magnitude" not in roles:
        raise RuleError(f"{quoted(factors.first)} belongs to DoRA, and has no lora_magnitude_vector beside it")
    if frozenset(roles) not in COMPLETE[kind]:
        raise RuleError(f"{quoted(factors.first)} has no partner in the adapter")
