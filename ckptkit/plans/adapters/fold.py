"""Plans of a base with a LoRA adapter folded into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.adapters.model import Adapter
from ckptkit.adapters.placing import place_adapter
from ckptkit.core.arguments import require_type
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import default_error_path
from ckptkit.core.coverage import measure_coverage
from ckptkit.core.coverage.requirements import parse_requirements
from ckptkit.core.files.places import name_of
from ckptkit.core.findings import ReaderWarning
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import PlanError
from ckptkit.formats import codes
from ckptkit.formats.directories.beside import unread_beside
from ckptkit.formats.directories.listing import ADAPTER_NAMES
from ckptkit.formats.directories.model_files import MODEL_CONFIG
from ckptkit.formats.directories.tied_head import TiedHead
from ckptkit.inputs import CheckpointLike, rules_for
from ckptkit.plans.adapters.combine import PlacedAdapter, combine
from ckptkit.plans.adapters.inputs import BASE, opened_roles
from ckptkit.plans.adapters.reading import LoraConfigLike, read_adapter
from ckptkit.plans.adapters.requirements import refuse_unmet
from ckptkit.plans.adapters.ties import head_of, resolve_ties
from ckptkit.plans.metadata import follow_metadata
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.policies import UNEXPECTED_ACTIONS, OnUnexpected, Policy, UnexpectedAction, parse_policy
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.quantized.as_codes import QuantizeLike, quantize_outputs
from ckptkit.plans.quantized.as_numbers import DequantizedInputs
from ckptkit.plans.steps import complete_step, dropped_entries, refuse_ambiguous, role_to_edit
from ckptkit.quantized.view import DequantizeLike
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import RulesLike
from ckptkit.tensor_ops.operation import Shape

__all__ = ["LoraConfigLike", "plan_folds", "plan_lora"]

_NO_PLACE = "the base does not have it"
_FOLD_ELSEWHERE = "fold into a dequantised base, here or with merge_and_unload of peft; "


def plan_lora(
    base: CheckpointLike,
    adapter: CheckpointLike | Sequence[CheckpointLike],
    lora_config: LoraConfigLike | Sequence[LoraConfigLike | None] | None = None,
    rules: RulesLike | None = None,
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    on_unexpected: OnUnexpected = "error",
    dequantize: DequantizeLike = False,
    quantize: QuantizeLike | None = None,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
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

    ``on_unexpected`` is for a tensor of an adapter without a matching key in the base, as in ``plan_merge``: an action,
    or a mapping of patterns to actions. ``add`` writes a tensor that is saved whole, such as a task head, under its key
    in the model. ``skip`` leaves a tensor out.

    With ``dequantize``, quantised weights of the base are numbers, as in ``plan_remap``, and adapters fold into them.
    With ``quantize``, the output has codes of linear weights, as in ``plan_remap``.

    ``require`` is a pattern or a list of patterns: an adapter must have values for every matching key of the base.
    ``min_coverage`` is the least share of the base's elements that are in such tensors, between 0 and 1. The plan has
    this share as ``coverage``. No value is read, so factors of zeros count too.

    Where the adapter changes only one of several tied tensors, the others keep the values of the base, as in the model
    with the adapter, and the output has both. New rows of an embedding, and all changes of an adapter with
    ``ensure_weight_tying``, hold for what is tied to it. Output weights that the file of the base leaves to their tie
    are known by the ``config.json`` beside it.

    Raises ``RuleError`` for a tensor of an adapter without a matching key in the base. Raises ``PlanError`` where
    an adapter changes a quantised weight, and where nothing says whether an adapted embedding is tied. It is also
    raised where ``scale`` or a weight is not finite, where there is no configuration, and where ``require`` or
    ``min_coverage`` is not met.

    Example:
        >>> import torch
        >>> base = {"fc.weight": torch.zeros(2, 2)}
        >>> adapter = {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)}
        >>> plan_lora(base, adapter, {"r": 1, "lora_alpha": 2}).steps[0].rule
        'lora, scale 2'
    """
    policy = parse_policy("on_unexpected", on_unexpected, UNEXPECTED_ACTIONS)
    requirements = parse_requirements(require, min_coverage)
    adapters, configs, factors = _several(adapter, lora_config, scale, weights)
    with opened_roles(base, *adapters) as roles:
        inputs = DequantizedInputs(roles, dequantize)
        plan = inputs.finish(plan_folds(inputs.checkpoints, configs, rules, factors, policy))
        changed = frozenset(() if plan.covered is None else plan.covered.filled)
        first = next(donor for role, donor in roles.items() if role != BASE)
        refuse_unmet(
            requirements,
            roles[BASE],
            changed,
            source="the adapter" if len(adapters) == 1 else "the adapters",
            hint=f"see which layers it has: ckpt show {CheckpointSummary.of(first, ()).argument or 'DONOR'}",
            call="see which layers it has with open_checkpoint",
        )
        return quantize_outputs(plan, roles, quantize)


def _several(
    adapter: CheckpointLike | Sequence[CheckpointLike],
    lora_config: LoraConfigLike | Sequence[LoraConfigLike | None] | None,
    scale: float,
    weights: Sequence[float] | None,
) -> tuple[list[CheckpointLike], list[LoraConfigLike | None], list[float]]:
    """Return the adapters, and for each its configuration and the factor of its scale."""
    require_type(scale, int | float, "scale", "a number")
    is_one = isinstance(adapter, str) or not isinstance(adapter, Sequence)
    adapters: list[Any] = [adapter] if is_one else list(adapter)  # type: ignore[arg-type]
    if not adapters:
        raise PlanError("there is no adapter to fold")
    given = list(lora_config) if not is_one and isinstance(lora_config, list | tuple) else [lora_config]
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


def plan_folds(
    roles: Mapping[str, Checkpoint],
    configs: Sequence[LoraConfigLike | None],
    rules: RulesLike | None,
    factors: Sequence[float],
    policy: Policy[UnexpectedAction],
) -> Plan:
    """Return the plan of ``plan_lora`` for opened inputs: the base and the adapters by role.

    ``factors`` multiply the scales. Raises as ``plan_lora``.
    """
    base = roles[BASE]
    donors = {role: checkpoint for role, checkpoint in roles.items() if role != BASE}
    refuse_ambiguous(base, base)
    context = _Context(QuantizedInputs(roles, base, BASE), head_of(base), rules, policy)
    dropped = dropped_entries(base, BASE)
    notes: list[str] = []
    placed = []
    added: dict[str, Step] = {}
    for (role, donor), config, factor in zip(donors.items(), configs, factors, strict=True):
        with default_error_path(donor.path if len(donors) > 1 else None):
            one = _place(role, donor, context, config=config, factor=factor)
        placed.append(one.adapter)
        dropped += one.dropped
        dropped += [
            Dropped(step.sources[0].role, step.sources[0].key, f"{role} adds it too", key)
            for key, step in added.items()
            if key in one.added
        ]
        added |= one.added
        notes += [f"{role}: {note}" if len(donors) > 1 else note for note in one.notes]
    head = context.head
    absent = {} if head is None else {head.head: head.embedding, **({head.head_bias: head.bias} if head.bias else {})}
    combined = combine(placed, roles, absent)
    ends_ties = {key for each in placed for key in each.ends_ties}
    ties = resolve_ties(roles, combined.steps, combined.steps.keys() - ends_ties, head)
    made = ties.steps
    steps = [made.get(key) or complete_step(Step(info, (Source(BASE, key),)), roles) for key, info in base.items()]
    steps += [step for key, step in made.items() if key not in base]
    plan = Plan(
        (*steps, *added.values()),
        (*dropped, *combined.dropped, *ties.dropped),
        base.metadata,
        (*ties.notes, *combined.notes, *notes),
        base.versions,
        role_to_edit(base, BASE),
        command="merge",
        covered=measure_coverage(base, {step.out.key for step in steps if any(s.role != BASE for s in step.sources)}),
    )
    return check_quantized(follow_metadata(plan, {BASE: base}), context.quantized)


@dataclass(frozen=True, slots=True)
class _Context:
    """What every adapter is placed with."""

    quantized: QuantizedInputs
    head: TiedHead | None
    rules: RulesLike | None
    policy: Policy[UnexpectedAction]


@dataclass(frozen=True, slots=True)
class _Placed:
    """The changes of one adapter, the steps of the tensors that it adds, notes, and what is left out of its file."""

    adapter: PlacedAdapter
    added: Mapping[str, Step]
    notes: Sequence[str]
    dropped: Sequence[Dropped]


def _place(role: str, donor: Checkpoint, context: _Context, *, config: LoraConfigLike | None, factor: float) -> _Placed:
    base, policy = context.quantized.sources[BASE], context.policy
    rules = rules_for(context.rules, donor)
    key_map = apply_rules(rules, donor)
    if key_map.copied_or_computed:
        raise PlanError("rules may rename and drop the tensors of an adapter, not copy or compute them")
    notes = policy.unused(donor, f"the {role}", allow_unused=rules.allow_unused)
    notes += _notes_about_files(donor)
    names = {new: old for old, new in key_map.renamed.items()}
    shapes = {new: donor[old].shape for new, old in names.items()}
    reading = read_adapter(donor, names, config, {key: info.shape for key, info in base.items()})
    adapter = reading.adapter.scaled(factor)
    for key in adapter.changed_keys() if context.quantized else ():
        context.quantized.refuse_change(key, "lora", _FOLD_ELSEWHERE)
    actions = {name: policy.action(old) for name, old in names.items()}
    whole = set(adapter.replacements.values())
    optional = {name for name, action in actions.items() if action == "skip" or (action == "add" and name in whole)}
    plan = place_adapter(adapter, shapes, _model_shapes(base, context.head, adapter), optional)
    left_out = {**adapter.left_out, **dict.fromkeys(plan.left_out, _NO_PLACE)}
    added = {}
    for key, name in plan.unplaced.items():
        if actions[name] == "add":
            old = names[name]
            step = Step(replace(donor[old], key=key), (Source(role, old),), "", policy.rule(old))
            added[key] = complete_step(step, {role: donor})
        else:
            left_out[name] = _NO_PLACE
    if added:
        notes.append(
            f"{listed(added)} {'is' if len(added) == 1 else 'are'} added from the {role}: {MODEL_CONFIG} must describe "
            "the model with it, such as architectures and num_labels"
        )
    replacing = [*adapter.replacements.values(), *(rows.name for rows in adapter.rows)]
    unscaled = [names[name] for name in replacing if name not in left_out]
    if factor != 1 and unscaled:
        verb = "replaces" if len(unscaled) == 1 else "replace"
        notes.append(
            f"{listed(unscaled, 2)} {verb} values of the base as a whole, which no scale and no weight changes"
        )
    dropped = [*dropped_entries(donor, role), *(Dropped(role, old, why) for old, why in key_map.dropped.items())]
    dropped += [Dropped(role, names[name], why) for name, why in left_out.items()]
    placed = PlacedAdapter(role, plan, names, frozenset(adapter.changed_keys()) - adapter.follows_ties)
    return _Placed(placed, added, [*notes, *reading.notes, *key_map.notes], dropped)


def _notes_about_files(donor: Checkpoint) -> Iterator[str]:
    """Yield a note about weights beside an adapter of PEFT, which a training script can save in a file of its own."""
    is_peft = any(name_of(file) in ADAPTER_NAMES for file in donor.files)
    is_said = any(isinstance(each, ReaderWarning) and each.code == codes.UNREAD_WEIGHTS for each in donor.warnings)
    for file in unread_beside(donor.files) if is_peft and not is_said else ():
        yield (
            f"{quoted(name_of(file))} beside the adapter has weights too, which are not folded: if they were "
            "trained with it, add them to the output with a second ckpt merge"
        )


def _model_shapes(base: Checkpoint, head: TiedHead | None, adapter: Adapter) -> dict[str, Shape]:
    """Return the shapes of the base, with output weights and their bias that its file leaves to their tie."""
    shapes = {key: info.shape for key, info in base.items()}
    if head is not None and (head.is_sure or head.head in adapter.replacements):
        shapes.setdefault(head.head, shapes[head.embedding])
    if head is not None and head.bias:
        shapes.setdefault(head.head_bias, shapes[head.bias])
    return shapes
