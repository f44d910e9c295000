"""Plans of a base with a LoRA adapter folded into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ckptkit.adapters.model import AdapterPlan
from ckptkit.adapters.placing import place_adapter
from ckptkit.core.arguments import require_type
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.text import quoted
from ckptkit.core.ties import tied_keys
from ckptkit.errors import PlanError
from ckptkit.inputs import CheckpointLike, rules_for
from ckptkit.plans.adapters.inputs import BASE, DONOR, opened_roles
from ckptkit.plans.adapters.reading import LoraConfigLike, read_adapter
from ckptkit.plans.merge import follow_ties
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.steps import complete_step, dropped_entries, refuse_ambiguous, role_to_edit
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import RulesLike
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["LoraConfigLike", "plan_lora"]

_REPLACED = "saved whole with the adapter"
_FOLD_ELSEWHERE = "fold into a dequantised base, here or with merge_and_unload of peft; "


def plan_lora(
    base: CheckpointLike,
    adapter: CheckpointLike,
    lora_config: LoraConfigLike | None = None,
    rules: RulesLike | None = None,
    *,
    scale: float = 1.0,
) -> Plan:
    """Return the plan that folds a LoRA adapter of peft into ``base``: ``W + scale * B @ A``.

    The sum is computed in F32 and rounded once. ``scale`` multiplies the scale of the configuration. The output has the
    keys and dtypes of ``base``. A tensor that the adapter saves whole replaces the base's tensor, in its own shape.

    ``base`` and ``adapter`` are a path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is
    opened here is closed at the end; give the same paths to ``execute``. ``lora_config`` is the path of
    ``adapter_config.json`` or of its directory, its content, or a ``LoraConfig`` of peft. The default is the
    ``adapter_config.json`` in the directory of the adapter. ``rules`` are a list of renames, the path of a rule file,
    its parsed content, or ``Rules``; they rename and filter the keys of the adapter first.

    Raises ``RuleError`` for a tensor of the adapter without a matching key in the base. Raises ``PlanError`` where
    the adapter changes a quantised weight, and where two folds would change one tied tensor. It is also raised where
    ``scale`` is not finite, and where there is no configuration.

    Example:
        >>> import torch
        >>> base = {"fc.weight": torch.zeros(2, 2)}
        >>> adapter = {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)}
        >>> plan_lora(base, adapter, {"r": 1, "lora_alpha": 2}).steps[0].rule
        'lora, scale 2'
    """
    require_type(scale, int | float, "scale", "a number")
    if not math.isfinite(scale):
        raise PlanError(f"{scale} is not a valid scale", hint="1 is the adapter as it was trained")
    with opened_roles(base, adapter) as roles:
        return _plan_lora(roles, lora_config, rules, scale)


def _plan_lora(
    roles: Mapping[str, Checkpoint], config: LoraConfigLike | None, rules: RulesLike | None, scale: float
) -> Plan:
    base, donor = roles.values()
    refuse_ambiguous(base, base)
    key_map = apply_rules(rules_for(rules, donor), donor)
    if key_map.copied_or_computed:
        raise PlanError("rules may rename and drop the tensors of an adapter, not copy or compute them")
    names = {new: old for old, new in key_map.renamed.items()}
    shapes = {new: donor[old].shape for new, old in names.items()}
    base_shapes = {key: info.shape for key, info in base.items()}
    reading = read_adapter(donor, names, config, base_shapes)
    adapter = reading.adapter.scaled(scale)
    quantized = QuantizedInputs(roles, base, BASE)
    for key in adapter.changed_keys() if quantized else ():
        quantized.refuse_change(key, "lora", _FOLD_ELSEWHERE)
    adapter_plan = place_adapter(adapter, shapes, base_shapes)
    changed = _changed_steps(adapter_plan, roles, names)
    _refuse_two_folds(base, changed)
    changed, notes = follow_ties(base, changed)
    steps = [changed.get(key) or complete_step(Step(info, (Source(BASE, key),)), roles) for key, info in base.items()]
    dropped = [*dropped_entries(base, BASE), *dropped_entries(donor, DONOR)]
    dropped += [Dropped(DONOR, key, reason) for key, reason in key_map.dropped.items()]
    all_notes = (*notes, *reading.notes, *key_map.notes)
    plan = Plan(
        tuple(steps),
        tuple(dropped),
        base.metadata,
        all_notes,
        base.versions,
        role_to_edit(base, BASE),
        command="merge",
    )
    return check_quantized(plan, quantized)


def _changed_steps(
    adapter_plan: AdapterPlan, roles: Mapping[str, Checkpoint], names: Mapping[str, str]
) -> dict[str, Step]:
    """Return the steps of the tensors of the base that the adapter changes, by key."""
    steps = {}
    base, donor = roles[BASE], roles[DONOR]
    for fold in adapter_plan.folds:
        first = Source(DONOR, names[fold.replaced_by]) if fold.replaced_by else Source(BASE, fold.key)
        sources = first, *(Source(DONOR, names[factor]) for factor in fold.factors)
        out = replace(base[fold.key], shape=roles[first.role][first.key].shape)
        recipe = Recipe(tuple(range(len(sources))), (fold.operation,))
        step = Step(out, sources, "", fold.label, recipe)
        steps[fold.key] = complete_step(step, roles)
    for key, name in adapter_plan.replacements.items():
        out = replace(base[key], shape=donor[names[name]].shape)
        steps[key] = complete_step(Step(out, (Source(DONOR, names[name]),), "", _REPLACED), roles)
    return steps


def _refuse_two_folds(base: Checkpoint, changed: Mapping[str, Step]) -> None:
    for keys in tied_keys(base.values()):
        adapted = [key for key in keys if key in changed]
        if len(adapted) > 1 and any(changed[key].recipe is not None for key in adapted):
            raise PlanError(
                f"{quoted(adapted[0])} and {quoted(adapted[1])} are one tensor in the base, and both are adapted",
                hint="merge with peft",
            )
