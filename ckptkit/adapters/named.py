"""Adapters of kohya, LyCORIS and diffusers: the tensors of each module, under the name that the file gives to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ckptkit.adapters.keys import ENDING, PEFT_PREFIX
from ckptkit.adapters.model import COMPLETE, AdaptedModule, Kind
from ckptkit.adapters.module_names import COMPONENTS, DENOISER, split_component
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = [
    "FLAT_COMPONENTS",
    "ModuleTensors",
    "NamedAdapter",
    "NamedModule",
    "group_tensors",
    "peft_key",
    "rank_of",
    "split_name",
]

# kohya writes "_" for "." in the name of a module, after one of these.
FLAT_COMPONENTS: Mapping[str, str] = {
    "lora_unet_": DENOISER, "lora_transformer_": DENOISER, "lora_prior_unet_": DENOISER,
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "lycoris_": "",
}  # fmt: skip
_SIDES = {"down": "A", "up": "B", "mid": "mid", "A": "A", "B": "B"}
_OTHER = re.compile(
    r".+\.(?P<what>diff|diff_b|w_norm|b_norm|oft_blocks|oft_diag|boft_blocks|on_input|a1\.weight|b1\.weight|scalar"
    r"|set_weight|reshape_weight)"
)
# Attention of an older diffusers: the processor has the factors, with names of its own.
_PROCESSOR = re.compile(r"\.processor(?=\.|$)")
_OLD_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(slots=True)
class ModuleTensors:
    """The keys of the tensors of one module by role, the key of its alpha, and of an update of its bias."""

    kind: Kind = "lora"
    factors: dict[str, str] = field(default_factory=dict)
    alpha: str = ""
    bias: str = ""


@dataclass(frozen=True, slots=True)
class NamedModule:
    """One module of an adapter as its file names it, with ``adapted`` for what the factors mean.

    ``prefix`` is the beginning of the keys that says which model of a pipeline it is, and ``component`` is that model.
    ``name`` is the path of the module, in which a flat name has ``_`` for ``.``.
    """

    prefix: str
    component: str
    name: str
    is_flat: bool
    adapted: AdaptedModule


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter whose modules have the names of its file.

    ``notes`` are about scales that the file does not say. ``fan_in_fan_out`` is as in ``Adapter``.
    """

    modules: tuple[NamedModule, ...]
    notes: tuple[str, ...] = ()
    fan_in_fan_out: bool = False


def group_tensors(keys: Collection[str]) -> dict[str, ModuleTensors]:
    """Return the tensors of each module, by the beginning of their keys.

    Raises ``RuleError`` for a tensor that is not a factor of a known kind, and where two have the same role.
    """
    groups: dict[str, ModuleTensors] = {}
    other = []
    for key in keys:
        found = ENDING.fullmatch(key)
        if found is None:
            other.append(key)
            continue
        stem = _stem(found["stem"], found["diffusers"] or "")
        group = groups.setdefault(stem, ModuleTensors())
        kind, role = _meaning(found)
        if kind != "lora":
            group.kind = kind
        same = {"alpha": group.alpha, "bias": group.bias}.get(role, group.factors.get(role, ""))
        if same:
            raise RuleError(f"{quoted(same)} and {quoted(key)} have the same place in the base")
        if role == "alpha":
            group.alpha = key
        elif role == "bias":
            group.bias = key
        else:
            group.factors[role] = key
    if other:
        _refuse_others(other, len(keys))
    for group in groups.values():
        _refuse_incomplete(group)
    return groups


def _meaning(found: re.Match[str]) -> tuple[Kind, str]:
    """Return the kind of adapter that a key belongs to, and the role of its tensor."""
    if found["alpha"]:
        return "lora", "alpha"
    if found["magnitude"]:
        return "dora", "magnitude"
    if found["lycoris"]:
        return ("loha" if found["lycoris"] == "hada" else "lokr"), found["part"]
    if found["leaf"] == "bias":
        return "lora", "bias"
    return "lora", _SIDES[found["kohya"] or found["peft"] or found["diffusers"] or found["linear"]]


def _stem(stem: str, old: str) -> str:
    """Return the beginning of a key without the names that an older diffusers put into it."""
    stem = _PROCESSOR.sub("", stem)
    if not old:
        return stem
    module, _, last = stem.rpartition(".")
    if module.endswith("self_attn"):
        return f"{module}.{_OLD_PROJECTIONS.get(last, last)}"
    return f"{stem}.0" if last == "to_out" else stem


def peft_key(key: str) -> str:
    """Return the key that PEFT gives to a factor; any other key is unchanged."""
    found = ENDING.fullmatch(key)
    if found is None or found["alpha"] or found["kohya"] == "mid":
        return key
    kind, role = _meaning(found)
    ending = {
        "A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector",
    }.get(role) or f"{_LYCORIS[kind]}_{role}"  # fmt: skip
    return f"{_stem(found['stem'], found['diffusers'] or '')}.{ending}"


_LYCORIS = {"loha": "hada", "lokr": "lokr"}


def _refuse_others(keys: list[str], count: int) -> None:
    first = keys[0]
    found = _OTHER.fullmatch(first)
    what = f"holds {found['what']}, which cannot be folded" if found else "is not a factor of a LoRA that is known here"
    raise RuleError(
        f"of {plural(count, 'tensor')}, {listed(keys, 1)}: {quoted(first)} {what}",
        hint=f"leave it out: --drop {shell_word(first if found is None else '*.' + found['what'])}",
    )


def _refuse_incomplete(group: ModuleTensors) -> None:
    factors = group.factors
    if not factors:
        raise RuleError(f"{quoted(group.alpha or group.bias)} has no factors beside it")
    others = factors.keys() - {"A", "B", "magnitude"}
    if "magnitude" in factors and others:
        raise RuleError(f"{quoted(factors[min(others)])} and a magnitude cannot be folded together")
    if frozenset(factors) not in COMPLETE[group.kind]:
        raise RuleError(f"{quoted(next(iter(factors.values())))} has no partner in the adapter")


def rank_of(group: ModuleTensors, shapes: Mapping[str, Shape]) -> int | None:
    """Return the rank by the shapes of the factors, or None where LyCORIS uses no rank: whole factors of LoKr.

    Raises ``RuleError`` for a factor without dims or of rank 0.
    """
    role = {"lora": "A", "dora": "A", "loha": "w1_b"}.get(group.kind) or _lokr_role(group)
    if role is None:
        return None
    key = group.factors[role]
    if len(shapes[key]) < 2 or shapes[key][0] < 1:
        raise RuleError(f"{quoted(key)} is {list(shapes[key])}, which is not a factor of a low rank")
    return shapes[key][0]


def _lokr_role(group: ModuleTensors) -> str | None:
    return next((role for role in ("w2_b", "w1_b") if role in group.factors), None)


def split_name(stem: str) -> tuple[str, str, str, bool]:
    """Return the prefix of a group's name, the component, the name of the module, and whether that name is flat."""
    flat = next((head for head in FLAT_COMPONENTS if stem.startswith(head)), None)
    if flat is not None and "." not in stem:
        return flat, FLAT_COMPONENTS[flat], stem.removeprefix(flat), True
    prefix, name = split_component(stem.removeprefix(PEFT_PREFIX))
    return (f"{prefix}." if prefix else ""), COMPONENTS.get(prefix, ""), name, False
