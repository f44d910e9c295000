"""Adapters of kohya and LyCORIS: the scale of each module is its ``.alpha`` over its rank."""

from __future__ import annotations

from collections.abc import Mapping

from ckptkit.adapters.model import AdaptedModule
from ckptkit.adapters.named import ModuleTensors, NamedAdapter, NamedModule, group_tensors, rank_of, split_name
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = ["read_kohya"]


def read_kohya(shapes: Mapping[str, Shape], alphas: Mapping[str, float]) -> NamedAdapter:
    """Return what the tensors of a file of kohya or LyCORIS mean, from keys, shapes, and the value of each alpha.

    Where a module has no alpha, its scale is 1, as the loaders of kohya and of diffusers have it. A note says so.

    Raises ``RuleError`` for a tensor of another kind, and for a module without all its factors.
    """
    groups = group_tensors(shapes)
    modules = []
    without = []
    for stem, group in groups.items():
        prefix, component, name, is_flat = split_name(stem)
        scale = 1.0
        rank = rank_of(group, shapes)
        if group.alpha and rank is not None:
            scale = alphas[group.alpha] / rank
        elif not group.alpha:
            without.append(next(iter(group.factors.values())))
        adapted = _adapted(name, group, scale, shapes)
        modules.append(NamedModule(prefix, component, name, is_flat, adapted))
    notes = (f"no alpha for {plural(len(without), 'module')} ({listed(without)}): the scale is 1 there",)
    return NamedAdapter(tuple(modules), notes if without else ())


def _adapted(name: str, group: ModuleTensors, scale: float, shapes: Mapping[str, Shape]) -> AdaptedModule:
    """Return the description of a module with these tensors.

    Raises ``RuleError`` for a magnitude that is neither one value for each output nor one for each input.
    """
    of_inputs = False
    if group.kind == "dora":
        key = group.factors["magnitude"]
        down, up, magnitude = (shapes[group.factors[role]] for role in ("A", "B", "magnitude"))
        count = max(magnitude, default=0)
        if sum(size != 1 for size in magnitude) > 1 or count not in (up[0], *down[1:2]):
            raise RuleError(f"{quoted(key)} is {list(magnitude)}, which is not one value for each output or input")
        # LyCORIS writes [out, 1] or, in its older versions, [1, in]; PEFT writes [out], or [1, out, 1, 1].
        of_inputs = key.endswith("dora_scale") and len(magnitude) > 1 and magnitude[0] == 1 and count != 1
    return AdaptedModule(name, group.kind, group.factors, scale, bias=group.bias, per_input=of_inputs)
