"""Write into ``config.json`` which weights a plan quantises, and which it leaves plain."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import PlanError
from ckptkit.formats.directories.model_files import MODEL_CONFIG
from ckptkit.formats.directories.tied_head import tied_head
from ckptkit.plans.carried import Adapted
from ckptkit.plans.plan import Plan, Step
from ckptkit.quantized.configuration import configuration_of
from ckptkit.quantized.known import weights_of_groups

if TYPE_CHECKING:
    from ckptkit.tensor_ops.quantize import Quantize

__all__ = ["add_quantization", "is_quantised", "leave_plain"]

_STATEMENT = "quantization_config"
_WEIGHT = ".weight"
# The list of modules that stay plain, by the method of transformers that reads it for stored codes too.
_PLAIN_LISTS = {
    "awq": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules", "compressed-tensors": "ignore",
    "fp8": "modules_to_not_convert", "torchao": "modules_to_not_convert",
}  # fmt: skip
_HEAD = "lm_head"
_MOST_NAMED = 4


def add_quantization(config: dict[str, object], plan: Plan) -> Iterator[Adapted | str]:
    """Add the quantisation of the weights that a plan quantises; yield the change, and a sentence about odd sizes.

    Nothing is changed where the plan quantises nothing, or in several ways. Where the configuration has a quantisation
    already, the weights are taken from its list of plain modules; a sentence says what to edit where it is another one.
    Raises ``PlanError`` where scales have another name than the one that is read with these codes.
    """
    made = {
        step.out.key: operation
        for step in plan.steps
        if (operation := _quantize(step)) is not None and step.recipe is not None and not step.recipe.part
    }
    if not made:
        return
    operation = next(iter(made.values()))
    if _STATEMENT in config:
        is_one = len(set(made.values())) == 1
        if is_one:
            _refuse_other_scales(plan, operation, made)
        yield from _quantise_more(config, {key.removesuffix(_WEIGHT) for key in made}, operation if is_one else None)
        return
    if len(set(made.values())) > 1:
        return
    _refuse_other_scales(plan, operation, made)
    modules = {key.removesuffix(_WEIGHT) for key in made}
    # These libraries quantise every linear layer and stack of experts that is not listed, with what is below a name.
    matrices = [step.out.key for step in plan.steps if len(step.out.shape) > 1 and not is_quantised(step)]
    above = {module[:end] for module in modules for end in range(len(module)) if module[end] == "."} | {""}
    plain = sorted({key.rpartition(".")[0] for key in matrices} - modules - above)
    plain += _tied_heads(config, plan)
    found = _fp8_blocks(operation, plain) if operation.scales == "block" else _compressed(operation, plain)
    config[_STATEMENT] = found
    yield Adapted(MODEL_CONFIG, _STATEMENT, None, found)
    odd = [step.out.key for step in plan.steps if step.out.key in made and not operation.divides(step.out.shape)]
    if odd:
        yield (
            f"transformers does not read blocks of {listed(odd, _MOST_NAMED)}: a size is above {operation.block} and "
            f"not a multiple of it"
        )


def _tied_heads(config: Mapping[str, object], plan: Plan) -> list[str]:
    """Return the head that is tied to the embedding: it has no tensor of its own, and must not get codes.

    ``lm_head`` is returned where nothing says that a head is not tied.
    """
    found = tied_head({step.out.key: step.out.shape for step in plan.steps}, config)
    if found is None and config.get("tie_word_embeddings") is False:
        return []
    head = _HEAD if found is None else found.head.removesuffix(_WEIGHT)
    return [] if any(step.out.key.endswith(f"{head}{_WEIGHT}") for step in plan.steps) else [head]


def _quantise_more(
    config: dict[str, object], modules: Collection[str], operation: Quantize | None
) -> Iterator[Adapted | str]:
    """Take the modules of weights that a plan quantises out of the list of those that stay plain.

    ``operation`` is None where they are quantised in several ways.
    """
    section = config[_STATEMENT]
    count = f"{plural(len(modules), 'weight')} {'is' if len(modules) == 1 else 'are'} quantised"
    if operation is None or not isinstance(section, dict) or not _is_same_form(section, operation):
        yield f"{count}, in another way than the configuration says: edit it, or dequantise all weights"
        return
    name = _PLAIN_LISTS[str(section["quant_method"])]
    found = section.get(name)
    listed_names = found if isinstance(found, list) else []
    left = [one for one in listed_names if one not in modules]
    kept_plain = configuration_of({**section, name: left}).leaves_plain
    odd = sorted(module for module in modules if kept_plain(module))
    if odd:
        yield f"{count}, and {name} of the configuration leaves {listed(odd, _MOST_NAMED)} plain: edit it"
    if left != listed_names:
        config[_STATEMENT] = {**section, name: left}
        yield Adapted(MODEL_CONFIG, f"{_STATEMENT}.{name}", found, left)


def _is_same_form(section: Mapping[str, object], operation: Quantize) -> bool:
    """Return whether a configuration describes the codes and scales that an operation makes."""
    made = _fp8_blocks(operation, []) if operation.scales == "block" else _compressed(operation, [])
    if section.get("quant_method") != made["quant_method"]:
        return False
    if operation.scales == "block":
        return section.get("weight_block_size") == made["weight_block_size"]
    (wanted,) = weights_of_groups(made)
    names = ("num_bits", "type", "symmetric", "strategy")
    return section.get("format") == made["format"] and all(
        [weights.get(name) for name in names] == [wanted[name] for name in names]
        for weights in weights_of_groups(section)
    )


def _refuse_other_scales(plan: Plan, operation: Quantize, made: Collection[str]) -> None:
    """Raise ``PlanError`` where a library would not find the scales of codes under their names, and draw others."""
    suffix = "_scale_inv" if operation.scales == "block" else "_scale"
    for step in plan.steps:
        if step.recipe is not None and step.recipe.part and _quantize(step) == operation:
            codes = next((one for one in plan.steps if one.out.key in made and one.sources == step.sources), None)
            if codes is not None and step.out.key != codes.out.key + suffix:
                raise PlanError(
                    f"{quoted(step.out.key)} has the scales of {quoted(codes.out.key)}, which the library that reads "
                    f"such codes expects as {quoted(codes.out.key + suffix)}",
                    hint="change the second name of the rule, or leave out --carry",
                )


def leave_plain(
    config: dict[str, object], plan: Plan, keys: Collection[str], coded: Collection[str]
) -> Iterator[Adapted | str]:
    """List the modules of the weights ``keys``, which are plain in the output, as those that are not quantised.

    ``coded`` are the keys of the output that hold codes. Yields the change, or a sentence that says what to edit where
    the method has no list that is known here.
    """
    section = config.get(_STATEMENT)
    method = section.get("quant_method") if isinstance(section, dict) else None
    name = _PLAIN_LISTS.get(str(method))
    found = section.get(name) if isinstance(section, dict) and name is not None else None
    if not isinstance(section, dict) or name is None or not isinstance(found, list | None):
        yield (
            f"{plural(len(keys), 'weight')} {'is' if len(keys) == 1 else 'are'} plain in the output, and the "
            f"configuration still calls {'it' if len(keys) == 1 else 'them'} quantised: edit it, or dequantise all "
            "weights"
        )
        return
    modules = {key.removesuffix(_WEIGHT) for key in keys}
    if found is None:  # a list takes the place of the one that the library makes itself, of heads and tied weights
        plain = {step.out.key for step in plan.steps if len(step.out.shape) == 2 and not is_quantised(step)}
        modules |= {key.removesuffix(_WEIGHT) for key in plain.difference(coded) if key.endswith(_WEIGHT)}
        modules |= {*_tied_heads(config, plan)}
    section = {**section, name: [*(found or ()), *sorted(modules.difference(found or ()))]}
    if section[name] != found:
        config[_STATEMENT] = section
        yield Adapted(MODEL_CONFIG, f"{_STATEMENT}.{name}", found, section[name])


def is_quantised(step: Step) -> bool:
    """Return whether a step makes codes or scales of a weight."""
    return _quantize(step) is not None


def _quantize(step: Step) -> Quantize | None:
    """Return the operation of a step that makes codes or scales of a weight."""
    if step.recipe is None:
        return None
    from ckptkit.tensor_ops.quantize import Quantize

    last = step.recipe.operations[-1]
    return last if isinstance(last, Quantize) else None


def _fp8_blocks(operation: Quantize, plain: list[str]) -> dict[str, object]:
    """Return the configuration of transformers for fp8 in blocks."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [operation.block, operation.block],
        "modules_to_not_convert": plain,
    }


def _compressed(operation: Quantize, plain: list[str]) -> dict[str, object]:
    """Return the configuration of compressed-tensors for codes with a scale for the tensor or for each row."""
    is_float = operation.form == "fp8"
    weights = {
        "num_bits": 8,
        "type": "float" if is_float else "int",
        "symmetric": True,
        "strategy": "tensor" if operation.scales == "tensor" else "channel",
        "dynamic": False,
    }
    name = "float-quantized" if is_float else "int-quantized"
    # Without a format of the group, the library expects packed codes where inputs are not quantised.
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": name}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": plain,
        "config_groups": {"group_0": group},
    }
