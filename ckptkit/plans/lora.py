"""Plans of a base and an adapter: folded into the weights that it adapts, or found from what tuning changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import quoted
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.errors import PlanError
from ckptkit.plans.merge import follow_ties
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.steps import complete_step, dropped_entries, refuse_ambiguous, refuse_suspicious, role_to_edit
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import as_rules
from ckptkit.tensor_ops.lora import AdapterPlan, ExtractLora, account_for_adapter
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["adapter_config", "plan_extract_lora", "plan_lora"]

_BASE, _DONOR = "base", "donor"
_WHOLE = "saved whole with the adapter"
_PREFIX = "base_model.model."  # how peft calls what it wraps
_FACTORS = ("lora_A.weight", "lora_B.weight")


def plan_lora(
    base: StateDictLike,
    adapter: StateDictLike,
    config: Mapping[str, object],
    rules: Rules | list[str] | None = None,
    *,
    scale: float = 1.0,
) -> Plan:
    """Return the plan that folds an adapter of peft into ``base``: ``W + scale * B @ A``, in F32, rounded once.

    ``config`` is the content of its ``adapter_config.json``, ``rules`` rename and filter its keys first, and ``scale``
    multiplies what the config says. The output has the keys and dtypes of ``base``; what the adapter saves whole takes
    the place of what the base has, in its own shape. Every tensor of the adapter has its place, or ``RuleError`` names
    one that has none; ``PlanError`` where two folds would meet in one tied tensor, or the scale is no number.
    """
    if not math.isfinite(scale):
        raise PlanError(f"{scale} is no scale", hint="1 is the adapter as it was trained")
    roles = _inputs(base, adapter)
    base, donor = roles.values()
    refuse_ambiguous(base, base)
    key_map = apply_rules(as_rules(rules), donor)
    if key_map.derived:
        raise PlanError("an adapter is folded as it is: rules may rename and drop its tensors, not copy or make others")
    names = {new: old for old, new in key_map.renamed.items()}
    account = account_for_adapter(
        {new: donor[old].shape for new, old in names.items()}, config, {key: info.shape for key, info in base.items()}
    )
    taken = _changed(account, roles, names, scale)
    _refuse_two_folds(base, taken)
    taken, notes = follow_ties(base, taken)
    steps = [taken.get(key) or complete_step(Step(info, (Source(_BASE, key),)), roles) for key, info in base.items()]
    dropped = [*dropped_entries(base, _BASE), *dropped_entries(donor, _DONOR)]
    dropped += [Dropped(_DONOR, key, reason) for key, reason in key_map.dropped.items()]
    edited_role = role_to_edit(base, _BASE)
    return Plan(tuple(steps), tuple(dropped), base.metadata, (*notes, *key_map.notes), base.versions, edited_role)


def _inputs(base: StateDictLike, donor: StateDictLike) -> dict[str, Checkpoint]:
    roles = {_BASE: as_checkpoint(base, _BASE), _DONOR: as_checkpoint(donor, _DONOR)}
    for role, checkpoint in roles.items():
        refuse_suspicious(checkpoint, role)
    return roles


def _changed(
    account: AdapterPlan, roles: Mapping[str, Checkpoint], names: Mapping[str, str], scale: float
) -> dict[str, Step]:
    made = {}
    base, donor = roles[_BASE], roles[_DONOR]
    for fold in account.folds:
        operation = replace(fold.operation, scale=(fold.operation.scale or 0.0) * scale)
        first = Source(_DONOR, names[fold.replaced_by]) if fold.replaced_by else Source(_BASE, fold.key)
        sources = first, *(Source(_DONOR, names[factor]) for factor in fold.factors)
        out = replace(base[fold.key], shape=roles[first.role][first.key].shape)
        recipe = Recipe(tuple(range(len(sources))), (operation,))
        step = Step(out, sources, "", f"lora, scale {operation.scale:g}", recipe)
        made[fold.key] = complete_step(step, roles)
    for key, name in account.replacements.items():
        out = replace(base[key], shape=donor[names[name]].shape)
        made[key] = complete_step(Step(out, (Source(_DONOR, names[name]),), "", _WHOLE), roles)
    return made


def _refuse_two_folds(base: Checkpoint, taken: Mapping[str, Step]) -> None:
    for keys in tied_keys(base.values()):
        changed = [key for key in keys if key in taken]
        if len(changed) > 1 and any(taken[key].recipe is not None for key in changed):
            raise PlanError(
                f"{quoted(changed[0])} and {quoted(changed[1])} are one tensor in the base, and both are adapted",
                hint="merge with peft",
            )


def plan_extract_lora(
    base: StateDictLike, tuned: StateDictLike, rank: int, rules: Rules | list[str] | None = None
) -> Plan:
    """Return the plan of the adapter of rank ``rank`` that is nearest to what tuning changed, under peft's names.

    Each weight of a module, of two dims or more, becomes the two factors of its change, by singular value
    decomposition; ``rules`` rename and filter the keys of ``tuned`` first. What is no such weight is listed as dropped,
    whether it changed or not. Raises ``PlanError`` where the base has no such key or another shape, and where no
    weight is left, ``RuleError`` where the rank is larger than a weight has.
    """
    roles = _inputs(base, tuned)
    base, donor = roles.values()
    key_map = apply_rules(as_rules(rules), donor)
    if key_map.derived:
        raise PlanError("a change is found in tensors as they are: rules may rename and drop them, not make others")
    operation = ExtractLora(rank)
    steps: list[Step] = []
    dropped = [Dropped(_DONOR, key, reason) for key, reason in key_map.dropped.items()]
    for old, key in key_map.renamed.items():
        info = donor[old]
        if key not in base or base[key].shape != info.shape:
            has = f"has it as {list(base[key].shape)}" if key in base else "does not have it"
            raise PlanError(f"{quoted(key)} is {list(info.shape)} in the tuned one, and the base {has}")
        if not key.endswith(".weight") or len(info.shape) < 2:
            dropped.append(Dropped(_DONOR, old, "no weight of two dims or more: an adapter has no factors for it"))
            continue
        sources = Source(_BASE, key), Source(_DONOR, old)
        for part, (factor, shape) in enumerate(zip(_FACTORS, operation.shapes([info.shape] * 2), strict=True)):
            out = TensorInfo(f"{_PREFIX}{key.removesuffix('weight')}{factor}", info.dtype, shape)
            recipe = Recipe((0, 1), (operation,), part)
            steps.append(complete_step(Step(out, sources, "", f"extract-lora, rank {rank}", recipe), roles))
    if not steps:
        raise PlanError("no weight of a module is left to find a change in")
    return Plan(tuple(steps), (*dropped, *dropped_entries(donor, _DONOR)), {"format": "pt"}, key_map.notes)


def adapter_config(plan: Plan) -> dict[str, object]:
    """Return the ``adapter_config.json`` by which peft loads what such a plan writes; the scale is 1."""
    rank = plan.steps[0].out.shape[0]
    modules = dict.fromkeys(step.sources[0].key.removesuffix(".weight") for step in plan.steps)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "task_type": None, "base_model_name_or_path": None,
    }  # fmt: skip
