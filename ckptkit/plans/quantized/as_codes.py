"""Plans that write linear weights as codes and scales: made as if the output had plain weights, then quantised."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from ckptkit.core.arguments import require_choice
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import PLAIN_FLOATS
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import PlanError
from ckptkit.lazy_patterns import lazy_pattern
from ckptkit.plans.plan import Plan, Step
from ckptkit.plans.quantized import already_quantised
from ckptkit.plans.steps import complete_step, describe_step
from ckptkit.quantized import quantized_weights

if TYPE_CHECKING:
    from ckptkit.tensor_ops.quantize import Quantize

__all__ = ["QUANTIZE", "QuantizeLike", "is_linear_weight", "quantize_outputs"]

QuantizeLike = Literal["fp8-block", "fp8-row", "fp8-tensor", "int8-row"]
QUANTIZE: Final[tuple[QuantizeLike, ...]] = ("fp8-block", "fp8-row", "fp8-tensor", "int8-row")

_WEIGHT = ".weight"
# Modules of a layer that are not linear layers, or that these libraries leave plain: routers, embeddings and norms.
_PLAIN_MODULE = lazy_pattern(
    r"gate|.*_gate|.*router.*|.*embed.*|.*_emb|.*norm.*|.*bias.*|.*lora.*|wte|wpe|ln_\w+|ln\d*", re.IGNORECASE
)
_BY_RULE = "the operation quantize of a rule takes the weights that its pattern matches"


def quantize_outputs(plan: Plan, sources: Mapping[str, Checkpoint], quantize: QuantizeLike | None) -> Plan:
    """Return the plan with codes and scales in place of the weights of linear layers, or as it is for None.

    These are the matrices that ``is_linear_weight`` finds. A weight that would only be cast is quantised from its
    source. Raises ``ArgumentError`` for a form that is not known, and ``PlanError`` if there is no such weight.
    """
    if quantize is None:
        return plan
    require_choice(quantize, QUANTIZE, "quantize")
    from ckptkit.tensor_ops.quantize import Quantize

    form, _, scales = quantize.partition("-")
    operation = Quantize(form, scales)
    steps: list[Step] = []
    plain: list[str] = []
    keys = {step.out.key for step in plan.steps}
    biases = {step.out.key: step.out.shape for step in plan.steps if step.out.key.endswith(".bias")}
    for step in plan.steps:
        if is_linear_weight(step.out) and operation.divides(step.out.shape):
            _refuse_transposed(step.out, biases)
            made = list(_codes_and_scales(step, sources, operation))
            if made[1].out.key in keys:
                raise PlanError(f"{quoted(made[1].out.key)} would be the scales, and is a tensor already")
            steps += made
        else:
            steps.append(step)
            plain += [step.out.key] if len(step.out.shape) > 1 and step.out.dtype in PLAIN_FLOATS else []
    count = len(steps) - len(plan.steps)
    if not count:
        _refuse_quantised(sources, keys)
        sizes = f" with sizes that are multiples of {operation.block}" if operation.scales == "block" else ""
        raise PlanError(
            f"no tensor of the output is a linear weight in a numbered layer{sizes}, as 'layers.0.q.weight' is",
            hint=_BY_RULE,
        )
    note = f"{plural(count, 'weight')} {'is' if count == 1 else 'are'} quantised ({quantize})"
    stay = "stays as it is" if len(plain) == 1 else "stay as they are"
    note += f"; {plural(len(plain), 'matrix', 'matrices')} {stay}: {listed(plain)}" if plain else ""
    return replace(plan, steps=tuple(steps), notes=(*plan.notes, note))


def _refuse_quantised(sources: Mapping[str, Checkpoint], outs: Collection[str]) -> None:
    """Raise ``PlanError`` if the output has codes of a weight that is quantised already."""
    for checkpoint in sources.values():
        for weight in quantized_weights(checkpoint).weights:
            if weight.coded in outs:
                raise already_quantised(weight)


def is_linear_weight(info: TensorInfo) -> bool:
    """Return whether a tensor is a matrix of floats in a numbered layer, and not of an embedding, norm or router."""
    if not info.key.endswith(_WEIGHT) or len(info.shape) != 2 or info.dtype not in PLAIN_FLOATS or not info.elements:
        return False
    segments = info.key.split(".")[:-1]
    is_numbered = any(segment.isdigit() for segment in segments)
    return is_numbered and not any(_PLAIN_MODULE.fullmatch(segment) for segment in segments)


def _codes_and_scales(step: Step, sources: Mapping[str, Checkpoint], operation: Quantize) -> Iterator[Step]:
    from ckptkit.tensor_ops.arithmetic import Cast
    from ckptkit.tensor_ops.recipes import compose

    found = describe_step(step, sources)
    if found.dtype not in PLAIN_FLOATS:
        raise PlanError(f"{quoted(step.out.key)} is {found.dtype}, and cannot be cast and quantised at once")
    suffix = "_scale_inv" if operation.scales == "block" else "_scale"
    dtypes = operation.dtypes([step.out.dtype])
    # Scales in the dtype of the weight are made of its numbers in that dtype.
    is_wide = dtypes != operation.dtypes([found.dtype])
    chain = (Cast(step.out.dtype), operation) if is_wide else (operation,)
    recipes = compose([step.recipe], [len(step.sources)], chain)
    shapes = operation.shapes([step.out.shape])
    for ending, recipe, shape, dtype in zip(("", suffix), recipes, shapes, dtypes, strict=True):
        out = TensorInfo(step.out.key + ending, dtype, shape)
        yield complete_step(Step(out, step.sources, rule=step.rule, recipe=recipe, equals=step.equals), sources)


def _refuse_transposed(info: TensorInfo, biases: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``PlanError`` where the bias shows that the columns of a weight are its outputs, as in GPT-2."""
    bias = biases.get(info.key.removesuffix(_WEIGHT) + ".bias")
    if bias is not None and bias != info.shape[:1] and bias == info.shape[1:]:
        raise PlanError(
            f"{quoted(info.key)} is stored transposed, as in GPT-2: its bias has a number for each column",
            hint=f"{_BY_RULE}; the libraries that read such codes have linear layers only",
        )
