"""Plans of a base with a LoRA adapter folded into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.adapters.placing import place_adapter
from ckptkit.core.arguments import require_type
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import default_error_path
from ckptkit.core.text import plural, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.errors import PlanError
from ckptkit.inputs import CheckpointLike, rules_for
from ckptkit.plans.adapters.combine import PlacedAdapter, combine
from ckptkit.plans.adapters.inputs import BASE, opened_roles
from ckptkit.plans.adapters.reading import LoraConfigLike, read_adapter
from ckptkit.plans.merge import follow_ties
from ckptkit.plans.metadata import follow_metadata
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.steps import complete_step, dropped_entries, refuse_ambiguous, role_to_edit
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import RulesLike

__all__ = ["LoraConfigLike", "plan_lora"]

_FOLD_ELSEWHERE = "fold into a dequantised base, here or with merge_and_unload of peft; "


def plan_lora(
    base: CheckpointLike,
    adapter: CheckpointLike | Sequence[CheckpointLike],
    lora_config: LoraConfigLike | Sequence[LoraConfigLike | None] | None = None,
    rules: RulesLike | None = None,
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Plan:
    """Return the plan that folds one or several LoRA adapters into ``base``: ``W + scale * B @ A``.

    An adapter is a directory or a file of PEFT, or a file of kohya, LyCORIS or diffusers. The sum is computed in F32
    and rounded once. ``scale`` multiplies the scale of every adapter, and ``weights`` has one more factor for each. The
    output has the keys and dtypes of ``base``. A tensor that an adapter saves whole replaces the base's tensor, in its
    own shape; of several adapters the last counts.

    ``base`` and each adapter are a path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is
    opened here is closed at the end; give the same paths to ``execute``. ``lora_config`` is the path of
    ``adapter_config.json`` or of its directory, its content, or a ``LoraConfig`` of peft; for several adapters it is a
    list of these. The default is what the file of kohya or diffusers says, or the ``adapter_config.json`` in the
    directory of the adapter. ``rules`` are a list of renames, the path of a rule file, its parsed content, or
    ``Rules``; they rename and filter the keys of the adapters first.

    Raises ``RuleError`` for a tensor of an adapter without a matching key in the base. Raises ``PlanError`` where
    an adapter changes a quantised weight, and where two folds would change one tied tensor. It is also raised where
    ``scale`` or a weight is not finite, and where there is no configuration.

    Example:
        >>> import torch
        >>> base = {"fc.weight": torch.zeros(2, 2)}
        >>> adapter = {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)}
        >>> plan_lora(base, adapter, {"r": 1, "lora_alpha": 2}).steps[0].rule
        'lora, scale 2'
    """
    adapters, configs, factors = _several(adapter, lora_config, scale, weights)
    with opened_roles(base, *adapters) as roles:
        return _plan_lora(roles, configs, rules, factors)


def _several(
    adapter: CheckpointLike | Sequence[CheckpointLike],
    lora_config: LoraConfigLike | Sequence[LoraConfigLike | None] | None,
    scale: float,
    weights: Sequence[float] | None,
) -> tuple[list[CheckpointLike], list[LoraConfigLike | None], list[float]]:
    """Return the adapters, and for each its configuration and the factor of its scale."""
    require_type(scale, int | float, "scale", "a number")
    adapters = [adapter] if isinstance(adapter, str) or not isinstance(adapter, Sequence) else list(adapter)
    if not adapters:
        raise PlanError("there is no adapter to fold")
    given = list(lora_config) if isinstance(lora_config, list | tuple) else [lora_config]
    configs: list[Any] = given if lora_config is not None or len(adapters) == 1 else [None] * len(adapters)
    factors = [1.0] * len(adapters) if weights is None else weights
    require_type(factors, list | tuple, "weights", "a list of numbers, one for each adapter")
    for name, values in (("lora_config", configs), ("weights", factors)):
        if len(values) != len(adapters):
            raise PlanError(
                f"{name} has {plural(len(values), 'value')} for {plural(len(adapters), 'adapter')}",
                hint="give a list with one for each adapter",
            )
    for value in factors:
        require_type(value, int | float, "an item of weights", "a number")
    for value in (scale, *factors):
        if not math.isfinite(value):
            raise PlanError(f"{value} is not a valid scale", hint="1 is the adapter as it was trained")
    return adapters, configs, [scale * factor for factor in factors]


def _plan_lora(
    roles: Mapping[str, Checkpoint],
    configs: Sequence[LoraConfigLike | None],
    rules: RulesLike | None,
    factors: Sequence[float],
) -> Plan:
    base = roles[BASE]
    donors = {role: checkpoint for role, checkpoint in roles.items() if role != BASE}
    refuse_ambiguous(base, base)
    quantized = QuantizedInputs(roles, base, BASE)
    dropped = dropped_entries(base, BASE)
    notes: list[str] = []
    placed = []
    for (role, donor), config, factor in zip(donors.items(), configs, factors, strict=True):
        with default_error_path(donor.path if len(donors) > 1 else None):
            adapter, own_notes, own_dropped = _place(role, donor, quantized, config=config, rules=rules, factor=factor)
        placed.append(adapter)
        dropped += own_dropped
        notes += [f"{role}: {note}" if len(donors) > 1 else note for note in own_notes]
    combined = combine(placed, roles)
    _refuse_two_folds(base, combined.steps)
    changed, tie_notes = follow_ties(base, combined.steps)
    steps = [changed.get(key) or complete_step(Step(info, (Source(BASE, key),)), roles) for key, info in base.items()]
    plan = Plan(
        tuple(steps),
        (*dropped, *combined.dropped),
        {},
        (*tie_notes, *combined.notes, *notes),
        base.versions,
        role_to_edit(base, BASE),
        command="merge",
    )
    return check_quantized(follow_metadata(plan, {BASE: base}), quantized)


def _place(
    role: str,
    donor: Checkpoint,
    quantized: QuantizedInputs,
    *,
    config: LoraConfigLike | None,
    rules: RulesLike | None,
    factor: float,
) -> tuple[PlacedAdapter, list[str], list[Dropped]]:
    """Return the changes of one adapter, notes about it, and what of its file is left out."""
    base = quantized.sources[BASE]
    key_map = apply_rules(rules_for(rules, donor), donor)
    if key_map.copied_or_computed:
        raise PlanError("rules may rename and drop the tensors of an adapter, not copy or compute them")
    names = {new: old for old, new in key_map.renamed.items()}
    shapes = {new: donor[old].shape for new, old in names.items()}
    base_shapes = {key: info.shape for key, info in base.items()}
    reading = read_adapter(donor, names, config, base_shapes)
    adapter = reading.adapter.scaled(factor)
    for key in adapter.changed_keys() if quantized else ():
        quantized.refuse_change(key, "lora", _FOLD_ELSEWHERE)
    dropped = [*dropped_entries(donor, role), *(Dropped(role, old, why) for old, why in key_map.dropped.items())]
    plan = place_adapter(adapter, shapes, base_shapes)
    return PlacedAdapter(role, plan, names), [*reading.notes, *key_map.notes], dropped


def _refuse_two_folds(base: Checkpoint, changed: Mapping[str, Step]) -> None:
    for keys in tied_keys(base.values()):
        adapted = [key for key in keys if key in changed]
        if len(adapted) > 1 and any(changed[key].recipe is not None for key in adapted):
            raise PlanError(
                f"{quoted(adapted[0])} and {quoted(adapted[1])} are one tensor in the base, and both are adapted",
                hint="merge with peft",
            )
