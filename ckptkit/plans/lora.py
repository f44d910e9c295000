"""Plans of a base and a LoRA adapter: the adapter folded into the base, or extracted from a tuned model."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from ckptkit.core.arguments import require_number, require_type
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.config_files import read_settings
from ckptkit.core.patterns import literal
from ckptkit.core.text import quoted, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.errors import OutputError, PlanError, RuleError
from ckptkit.formats.atomic import Target, output_errors, prepare_target
from ckptkit.formats.directories.adapters import CONFIG
from ckptkit.formats.directories.side_files import file_beside
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.plans.merge import follow_ties
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.quantized import QuantizedInputs, change_reason, check_quantized, refuse_part
from ckptkit.plans.steps import complete_step, dropped_entries, refuse_ambiguous, refuse_suspicious, role_to_edit
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import RulesLike
from ckptkit.tensor_ops.lora import AdapterPlan, ExtractLora, adapted_keys, plan_adapter
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["LoraConfigLike", "adapter_config", "adapter_config_target", "plan_extract_lora", "plan_lora"]

_BASE, _DONOR = "base", "donor"
_REPLACED = "saved whole with the adapter"
_PREFIX = "base_model.model."  # peft puts it before the keys of the base
_EXTRACT = "extract-lora"
_FOLD_ELSEWHERE = "fold into a dequantised base, here or with merge_and_unload of peft; "
_WEIGHTS = "adapter_model.safetensors"  # the name under which peft looks for an adapter
_FACTORS = ("lora_A.weight", "lora_B.weight")


class _HasToDict(Protocol):
    """A configuration object of a library, such as ``LoraConfig``."""

    def to_dict(self) -> dict[str, Any]: ...


LoraConfigLike: TypeAlias = str | os.PathLike[str] | Mapping[str, object] | _HasToDict


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
    with _opened_inputs(base, adapter) as roles:
        return _plan_lora(roles, _read_config(lora_config, roles[_DONOR]), rules, scale)


def _read_config(given: LoraConfigLike | None, adapter: Checkpoint) -> Mapping[str, object]:
    """Return the configuration of an adapter, by default from the file in its directory."""
    if given is None:
        found = file_beside(adapter.path, CONFIG) if adapter.files else None
        if found is None:
            raise PlanError(
                f"no {CONFIG} in the directory of the adapter: the scale is unknown",
                hint=f"copy {CONFIG} there, or in Python give it as lora_config"
                if adapter.files
                else "give it as lora_config",
                path=adapter.path,
            )
        return read_settings(found, CONFIG)
    return read_settings(given, CONFIG)


def _plan_lora(
    roles: Mapping[str, Checkpoint], config: Mapping[str, object], rules: RulesLike | None, scale: float
) -> Plan:
    base, donor = roles.values()
    refuse_ambiguous(base, base)
    key_map = apply_rules(rules_for(rules, donor), donor)
    if key_map.copied_or_computed:
        raise PlanError("rules may rename and drop the tensors of an adapter, not copy or compute them")
    names = {new: old for old, new in key_map.renamed.items()}
    quantized = QuantizedInputs(roles, base, _BASE)
    if quantized:
        for key in adapted_keys(names):
            quantized.refuse_change(key, "lora", _FOLD_ELSEWHERE)
    adapter_plan = plan_adapter(
        {new: donor[old].shape for new, old in names.items()}, config, {key: info.shape for key, info in base.items()}
    )
    changed = _changed_steps(adapter_plan, roles, names, scale)
    _refuse_two_folds(base, changed)
    changed, notes = follow_ties(base, changed)
    steps = [changed.get(key) or complete_step(Step(info, (Source(_BASE, key),)), roles) for key, info in base.items()]
    dropped = [*dropped_entries(base, _BASE), *dropped_entries(donor, _DONOR)]
    dropped += [Dropped(_DONOR, key, reason) for key, reason in key_map.dropped.items()]
    all_notes = (*notes, *key_map.notes)
    plan = Plan(
        tuple(steps),
        tuple(dropped),
        base.metadata,
        all_notes,
        base.versions,
        role_to_edit(base, _BASE),
        command="merge",
    )
    return check_quantized(plan, quantized)


@contextlib.contextmanager
def _opened_inputs(base: CheckpointLike, donor: CheckpointLike) -> Iterator[dict[str, Checkpoint]]:
    with opened(base, _BASE) as base_side, opened(donor, _DONOR) as donor_side:
        roles = {_BASE: base_side, _DONOR: donor_side}
        for role, checkpoint in roles.items():
            refuse_suspicious(checkpoint, role)
        yield roles


def _changed_steps(
    adapter_plan: AdapterPlan, roles: Mapping[str, Checkpoint], names: Mapping[str, str], scale: float
) -> dict[str, Step]:
    """Return the steps of the tensors of the base that the adapter changes, by key."""
    steps = {}
    base, donor = roles[_BASE], roles[_DONOR]
    for fold in adapter_plan.folds:
        operation = replace(fold.operation, scale=(fold.operation.scale or 0.0) * scale)
        first = Source(_DONOR, names[fold.replaced_by]) if fold.replaced_by else Source(_BASE, fold.key)
        sources = first, *(Source(_DONOR, names[factor]) for factor in fold.factors)
        out = replace(base[fold.key], shape=roles[first.role][first.key].shape)
        recipe = Recipe(tuple(range(len(sources))), (operation,))
        step = Step(out, sources, "", f"lora, scale {operation.scale:g}", recipe)
        steps[fold.key] = complete_step(step, roles)
    for key, name in adapter_plan.replacements.items():
        out = replace(base[key], shape=donor[names[name]].shape)
        steps[key] = complete_step(Step(out, (Source(_DONOR, names[name]),), "", _REPLACED), roles)
    return steps


def _refuse_two_folds(base: Checkpoint, changed: Mapping[str, Step]) -> None:
    for keys in tied_keys(base.values()):
        adapted = [key for key in keys if key in changed]
        if len(adapted) > 1 and any(changed[key].recipe is not None for key in adapted):
            raise PlanError(
                f"{quoted(adapted[0])} and {quoted(adapted[1])} are one tensor in the base, and both are adapted",
                hint="merge with peft",
            )


def plan_extract_lora(base: CheckpointLike, tuned: CheckpointLike, rank: int, rules: RulesLike | None = None) -> Plan:
    """Return the plan of the LoRA adapter of rank ``rank`` that is nearest to the change from ``base`` to ``tuned``.

    Each weight of a module with two dims or more gives two factors of its change, by singular value decomposition.
    The factors have the keys that peft uses. Every other tensor is listed as dropped, whether it changed or not.

    ``base`` and ``tuned`` are a path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is
    opened here is closed at the end; give the same paths to ``execute``. ``rules`` are a list of renames, the path of a
    rule file, its parsed content, or ``Rules``; they rename and filter the keys of ``tuned`` first.

    Raises ``PlanError`` where the base does not have a key or has it in another shape, where a weight is quantised,
    and where no weight is left. Raises ``RuleError`` where ``rank`` is larger than the rank that a weight can have.

    Example:
        >>> plan = plan_extract_lora("fixtures/lenet_10class.pth", "fixtures/lenet_10class.safetensors", 2)
        >>> plan.steps[0].out.key
        'base_model.model.conv1.lora_A.weight'
    """
    require_number(rank, "rank", "an int of at least 1", at_least=1, whole=True)
    with _opened_inputs(base, tuned) as roles:
        return _plan_extract(roles, rank, rules)


def _plan_extract(roles: Mapping[str, Checkpoint], rank: int, rules: RulesLike | None) -> Plan:
    base, donor = roles.values()
    key_map = apply_rules(rules_for(rules, donor), donor)
    if key_map.copied_or_computed:
        raise PlanError("rules may rename and drop the tensors of the tuned model, not copy or compute them")
    operation = ExtractLora(rank)
    quantized = QuantizedInputs(roles, base, _BASE)
    for old, key in key_map.renamed.items():
        refuse_part(quantized.weights[_DONOR], old, change_reason(_EXTRACT))
        quantized.refuse_change(key, _EXTRACT)
    steps: list[Step] = []
    dropped = [Dropped(_DONOR, key, reason) for key, reason in key_map.dropped.items()]
    for old, key in key_map.renamed.items():
        info = donor[old]
        if key not in base or base[key].shape != info.shape:
            has = f"has it as {list(base[key].shape)}" if key in base else "does not have it"
            raise PlanError(f"{quoted(key)} is {list(info.shape)} in the tuned model, and the base {has}")
        if not key.endswith(".weight") or len(info.shape) < 2:
            dropped.append(Dropped(_DONOR, old, "not a weight of two dims or more, which an adapter can change"))
            continue
        sources = Source(_BASE, key), Source(_DONOR, old)
        try:
            shapes = operation.shapes([info.shape] * 2)
        except RuleError as error:
            drop = f"--drop {shell_word(literal(old))}"
            hint = f"choose a lower rank, or leave the weight out: {drop} (parse_rules(drop=[{old!r}]))"
            raise RuleError(f"{quoted(key)}: {error.reason}", hint=hint) from None
        for part, (factor, shape) in enumerate(zip(_FACTORS, shapes, strict=True)):
            out = TensorInfo(f"{_PREFIX}{key.removesuffix('weight')}{factor}", info.dtype, shape)
            recipe = Recipe((0, 1), (operation,), part)
            steps.append(complete_step(Step(out, sources, "", f"{_EXTRACT}, rank {rank}", recipe), roles))
    if not steps:
        raise PlanError("there is no weight of a module to extract a change from")
    left_out = (*dropped, *dropped_entries(donor, _DONOR))
    plan = Plan(tuple(steps), left_out, {"format": "pt"}, key_map.notes, command="merge")
    return check_quantized(plan, quantized)


@contextlib.contextmanager
def adapter_config_target(output: Output) -> Iterator[Target]:
    """Give the target of ``adapter_config.json`` beside the output of ``plan_extract_lora``.

    A directory that does not exist is made, and removed at the end of the block if nothing was written into it. Raises
    ``OutputError`` where peft would not find the output under its name, and where the configuration exists
    (without ``force``) or cannot be created.
    """
    directory, name = os.path.split(output.path)
    if name != _WEIGHTS:
        raise OutputError(f"PEFT looks for {_WEIGHTS}", hint=f"give -o DIRECTORY/{_WEIGHTS}", path=output.path)
    is_new = False
    with output_errors(directory), contextlib.suppress(FileExistsError, FileNotFoundError):  # prepare_target says more
        os.mkdir(directory)
        is_new = True
    try:
        yield prepare_target(os.path.join(directory, CONFIG), force=output.force)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it has the adapter
                os.rmdir(directory)


def adapter_config(plan: Plan) -> dict[str, object]:
    """Return the ``adapter_config.json`` with which peft loads the output of ``plan_extract_lora``; its scale is 1."""
    rank = plan.steps[0].out.shape[0]
    modules = dict.fromkeys(step.sources[0].key.removesuffix(".weight") for step in plan.steps)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "task_type": None, "base_model_name_or_path": None,
    }  # fmt: skip
