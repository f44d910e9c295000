"""Modules that one naming of a diffusion model holds as one tensor, and another as several: query, key and value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ckptkit.adapters.module_names import COMPONENTS, split_component
from ckptkit.tensor_ops.operation import Shape

__all__ = ["Place", "fused_places"]

_WEIGHT = ".weight"
_OPEN_CLIP = re.compile(r"transformer\.resblocks\.(\d{1,4})\.attn\.in_proj_weight")
_JOINED = re.compile(r"(double|single)_blocks\.(\d{1,4})\.(img_attn\.qkv|txt_attn\.qkv|linear1)\.weight")
_APART = re.compile(r"(single_)?transformer_blocks\.(\d{1,4})\.attn\.(to_q|add_q_proj)\.weight")
_PARTS = {  # of Flux: the joined module, and its parts in diffusers
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """One name of a weight of a base: the component that the name is in, or empty if it is that of the whole key.

    ``rows`` and ``up_rows`` are as in ``AdaptedModule``.
    """

    component: str
    name: str
    module: str
    parameter: str = "weight"
    rows: tuple[int, int] | None = None
    up_rows: tuple[int, int] | None = None


def fused_places(base: Mapping[str, Shape]) -> Iterator[Place]:
    """Yield the names of parts of a weight of ``base``, and of modules that hold several of its weights."""
    for key, shape in base.items():
        if len(shape) != 2:
            continue
        prefix, name = split_component(key)
        component = COMPONENTS.get(prefix, "")
        if found := _OPEN_CLIP.fullmatch(name):
            module = key.removesuffix(".in_proj_weight")
            for part, rows in zip("qkv", _thirds(shape[0]), strict=False):
                layer = f"encoder.layers.{found[1]}.self_attn.{part}_proj"
                for alias in (layer, f"text_model.{layer}"):
                    yield Place(component, alias, module, "in_proj_weight", rows)
        elif found := _JOINED.fullmatch(name):
            stack = "transformer_blocks" if found[1] == "double" else "single_transformer_blocks"
            hidden = shape[1]
            ranges = _thirds(shape[0])
            if found[3] == "linear1":
                ranges = [*_thirds(3 * hidden), (3 * hidden, shape[0])] if shape[0] > 3 * hidden else []
            for part, rows in zip(_PARTS[found[3]], ranges, strict=False):
                yield Place(component, f"{stack}.{found[2]}.{part}", key.removesuffix(_WEIGHT), rows=rows)
        elif found := _APART.fullmatch(name):
            block = key[: key.index(".attn.")]
            joined = "linear1" if found[1] else "img_attn.qkv" if found[3] == "to_q" else "txt_attn.qkv"
            parts = [f"{block}.{part}" for part in _PARTS[joined]]
            if all(f"{part}{_WEIGHT}" in base for part in parts):
                alias = f"{'single' if found[1] else 'double'}_blocks.{found[2]}.{joined}"
                for part, rows in zip(parts, _ranges([base[f"{part}{_WEIGHT}"][0] for part in parts]), strict=True):
                    yield Place(component, alias, part, up_rows=rows)


def _thirds(count: int) -> list[tuple[int, int]]:
    return _ranges([count // 3] * 3) if count % 3 == 0 else []


def _ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(sizes, initial=0)))
