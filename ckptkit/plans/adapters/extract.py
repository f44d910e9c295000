"""Plans of a LoRA adapter that is extracted from the change of a model, with its configuration."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from ckptkit.core.arguments import require_number
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.patterns import literal
from ckptkit.core.text import quoted, shell_word
from ckptkit.errors import OutputError, PlanError, RuleError
from ckptkit.formats.atomic import Target, output_errors, prepare_target
from ckptkit.formats.directories.adapters import CONFIG
from ckptkit.inputs import CheckpointLike, rules_for
from ckptkit.plans.adapters.inputs import BASE, DONOR, opened_roles
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.quantized import QuantizedInputs, change_reason, check_quantized, refuse_part
from ckptkit.plans.steps import complete_step, dropped_entries
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import RulesLike
from ckptkit.tensor_ops.lora import ExtractLora
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["adapter_config", "adapter_config_target", "plan_extract_lora"]

_PREFIX = "base_model.model."  # peft puts it before the keys of the base
_EXTRACT = "extract-lora"
_WEIGHTS = "adapter_model.safetensors"  # the name under which peft looks for an adapter
_FACTORS = ("lora_A.weight", "lora_B.weight")


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
    with opened_roles(base, tuned) as roles:
        return _plan_extract(roles, rank, rules)


def _plan_extract(roles: Mapping[str, Checkpoint], rank: int, rules: RulesLike | None) -> Plan:
    base, donor = roles.values()
    key_map = apply_rules(rules_for(rules, donor), donor)
    if key_map.copied_or_computed:
        raise PlanError("rules may rename and drop the tensors of the tuned model, not copy or compute them")
    operation = ExtractLora(rank)
    quantized = QuantizedInputs(roles, base, BASE)
    for old, key in key_map.renamed.items():
        refuse_part(quantized.weights[DONOR], old, change_reason(_EXTRACT))
        quantized.refuse_change(key, _EXTRACT)
    steps: list[Step] = []
    dropped = [Dropped(DONOR, key, reason) for key, reason in key_map.dropped.items()]
    for old, key in key_map.renamed.items():
        info = donor[old]
        if key not in base or base[key].shape != info.shape:
            has = f"has it as {list(base[key].shape)}" if key in base else "does not have it"
            raise PlanError(f"{quoted(key)} is {list(info.shape)} in the tuned model, and the base {has}")
        if not key.endswith(".weight") or len(info.shape) < 2:
            dropped.append(Dropped(DONOR, old, "not a weight of two dims or more, which an adapter can change"))
            continue
        sources = Source(BASE, key), Source(DONOR, old)
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
    left_out = (*dropped, *dropped_entries(donor, DONOR))
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
