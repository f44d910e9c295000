"""Plans of an adapter in the format of another library: PEFT, kohya or diffusers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ckptkit.adapters.base_modules import find_modules
from ckptkit.adapters.diffusers import METADATA
from ckptkit.adapters.model import AdaptedModule
from ckptkit.adapters.module_names import layers_per_block, split_component
from ckptkit.adapters.named import NamedAdapter, NamedModule
from ckptkit.adapters.outputs import (
    FOLD_CALL,
    FOLD_IT,
    OutputModule,
    alpha_of,
    lora_fields,
    output_modules,
    refuse_replacements,
)
from ckptkit.adapters.peft import read_peft
from ckptkit.adapters.peft_names import modules_of
from ckptkit.core.arguments import require_choice
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import quoted, short_number
from ckptkit.errors import RuleError
from ckptkit.formats.directories.adapters import CONFIG
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.adapters.adapter_formats import ADAPTER_FORMATS, AdapterFormat
from ckptkit.plans.adapters.reading import LoraConfigLike, read_config, read_named
from ckptkit.plans.plan import Plan, Source, Step
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.steps import complete_step, dropped_entries, refuse_suspicious, refuse_unread
from ckptkit.tensor_ops.lora import LoraAlpha
from ckptkit.tensor_ops.moving import Reshape
from ckptkit.tensor_ops.operation import Shape
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["Conversion", "plan_conversion", "plan_convert_adapter"]

_SOURCE = "source"
_LAYERS = 2  # of a block of the U-Net of Stable Diffusion, for names without a base
_FROM_SOURCE = ("base_model_name_or_path", "task_type", "revision")


@dataclass(frozen=True, slots=True)
class Conversion:
    """The plan of a conversion, and the content of the ``adapter_config.json`` beside the output, for PEFT."""

    plan: Plan
    config: Mapping[str, object] | None


def plan_convert_adapter(
    source: CheckpointLike,
    adapter: AdapterFormat,
    *,
    base: CheckpointLike | None = None,
    lora_config: LoraConfigLike | None = None,
) -> Plan:
    """Return the plan of an adapter in the format ``adapter``, with the bytes of every factor unchanged.

    ``source`` is an adapter of PEFT, kohya or diffusers: a path, a Checkpoint, or a mapping of tensors or of
    ``TensorInfo``. ``adapter`` is ``peft``, ``kohya`` or ``diffusers``. ``base`` is the checkpoint that the adapter
    belongs to. It is needed for a file of kohya, whose names have ``_`` for ``.``, and gives the modules their names in
    the output. ``lora_config`` is as in ``plan_lora``. The output of ``peft`` needs an ``adapter_config.json`` beside
    it, which ``convert_adapter`` writes.

    Raises ``RuleError`` for an adapter of another kind than LoRA and DoRA, for a name that the format cannot hold, and
    for a tensor without a place in the base. Raises ``PlanError`` where the scale of the adapter is unknown.

    Example:
        >>> import torch
        >>> down, up = torch.ones(1, 2), torch.ones(2, 1)
        >>> source = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
        >>> [step.out.key for step in plan_convert_adapter(source, "kohya").steps]
        ['lora_unet_conv_in.lora_down.weight', 'lora_unet_conv_in.lora_up.weight', 'lora_unet_conv_in.alpha']
    """
    require_choice(adapter, ADAPTER_FORMATS, "adapter")
    with contextlib.ExitStack() as stack:
        opened_source = stack.enter_context(opened(source, _SOURCE))
        opened_base = None if base is None else stack.enter_context(opened(base, "base"))
        return plan_conversion(opened_source, adapter, opened_base, lora_config).plan


def plan_conversion(
    source: Checkpoint, to: AdapterFormat, base: Checkpoint | None, lora_config: LoraConfigLike | None
) -> Conversion:
    """Return the plan of ``plan_convert_adapter`` for opened inputs, with the configuration that belongs to it."""
    refuse_suspicious(source, _SOURCE)
    named, config = _read(source, to, lora_config)
    base_shapes = None if base is None else {key: info.shape for key, info in base.items()}
    layers = _LAYERS
    others: set[str] = set()
    if base_shapes is None:
        modules = {_path(module): module for module in named.modules}
    else:
        modules = _whole_modules(find_modules(named, base_shapes))
        others = modules_of(base_shapes) | modules_of(split_component(key)[1] for key in base_shapes)
        layers = layers_per_block([split_component(path)[1] for path in modules])
    outputs = output_modules(modules, to, layers, is_placed=base is not None)
    steps = [step for output in outputs for step in _steps(output, to, source)]
    metadata = {key: text for key, text in source.metadata.items() if key != METADATA} | {"format": "pt"}
    shapes = {key: info.shape for key, info in source.items()}
    fields = None
    if to == "diffusers":
        metadata[METADATA] = _metadata(outputs, shapes, others, fan_in_fan_out=named.fan_in_fan_out)
    elif to == "peft":
        kept = {name: config[name] for name in _FROM_SOURCE if isinstance(config.get(name), str)}
        own = lora_fields(outputs, shapes, others, fan_in_fan_out=named.fan_in_fan_out)
        fields = {**own, "inference_mode": True, "task_type": None, "base_model_name_or_path": None, **kept}
    dropped = [drop for drop in dropped_entries(source, _SOURCE) if drop.key != CONFIG]
    plan = Plan(tuple(steps), tuple(dropped), metadata, named.notes, command="convert")
    return Conversion(check_quantized(plan, QuantizedInputs({_SOURCE: source})), fields)


def _whole_modules(found: list[tuple[AdaptedModule, NamedModule]]) -> dict[str, NamedModule]:
    """Return the modules by their path in the base; raise ``RuleError`` for one that is a part of a tensor there."""
    for adapted, _ in found:
        if adapted.rows is not None or adapted.up_rows is not None:
            key = next(iter(adapted.factors.values()))
            raise RuleError(
                f"{quoted(key)} and {quoted(adapted.key)} of the base are not one module, so the adapter can only be "
                "folded",
                hint=FOLD_IT,
                call=FOLD_CALL,
            )
    return {adapted.module: module for adapted, module in found}


def _path(module: NamedModule) -> str:
    return module.name if module.is_flat else f"{module.prefix}{module.name}"


def _read(
    source: Checkpoint, to: AdapterFormat, lora_config: LoraConfigLike | None
) -> tuple[NamedAdapter, Mapping[str, object]]:
    """Return the adapter under the names of its file, and the configuration of one of PEFT."""
    named = None if lora_config is not None else read_named(source, {key: key for key in source})
    if named is not None:
        return named, {}
    config = read_config(lora_config, source)
    adapter = read_peft({key: info.shape for key, info in source.items()}, config)
    if to == "peft":
        raise RuleError("the adapter is one of PEFT already", hint="copy it: ckpt convert ADAPTER -o OUT --carry")
    refuse_replacements([*adapter.replacements.values(), *(rows.name for rows in adapter.rows)], to)
    modules = tuple(NamedModule("", "", each.module, False, each) for each in adapter.modules)
    return NamedAdapter(modules, fan_in_fan_out=adapter.fan_in_fan_out), config


def _steps(output: OutputModule, to: AdapterFormat, source: Checkpoint) -> list[Step]:
    """Return the steps of the tensors of one module."""
    adapted = output.adapted
    keys = {**adapted.factors, **({"bias": adapted.bias} if adapted.bias else {})}
    refuse_unread(keys.values(), source)
    steps = []
    for role, key in keys.items():
        shape = _shape_of(role, source[key].shape, source[adapted.factors["A"]].shape, to)
        recipe = None if shape == source[key].shape else Recipe((0,), (Reshape(shape),))
        out = TensorInfo(output.keys[role], source[key].dtype, shape)
        steps.append(Step(out, (Source(_SOURCE, key),), "", _label(adapted), recipe))
    if output.alpha:
        down = adapted.factors["A"]
        operation = LoraAlpha(alpha_of(adapted.scale, source[down].shape[0]))
        out = TensorInfo(output.alpha, operation.dtypes([])[0], ())
        steps.append(Step(out, (Source(_SOURCE, down),), "", _label(adapted), Recipe((0,), (operation,))))
    return [complete_step(step, {_SOURCE: source}) for step in steps]


def _label(adapted: AdaptedModule) -> str:
    return f"{adapted.kind}, scale {short_number(adapted.scale)}"


def _shape_of(role: str, shape: Shape, down: Shape, to: AdapterFormat) -> Shape:
    """Return the shape of a factor in the output; only that of a magnitude depends on the format."""
    if role != "magnitude":
        return shape
    count = max(shape, default=1)
    ones = (1,) * (len(down) - 2)
    if to == "kohya":
        return (count, 1, *ones)
    return (1, count, *ones) if ones else (count,)


def _metadata(
    outputs: list[OutputModule], shapes: Mapping[str, Shape], others: Collection[str], *, fan_in_fan_out: bool
) -> str:
    """Return the metadata of diffusers: the configuration of each model, with its name before each field."""
    fields: dict[str, object] = {}
    for model in dict.fromkeys(output.model for output in outputs):
        own = [output for output in outputs if output.model == model]
        table = lora_fields(own, shapes, others, fan_in_fan_out=fan_in_fan_out)
        fields |= {f"{model}.{name}": value for name, value in table.items()}
    return json.dumps(fields, indent=2, sort_keys=True)
