"""Plans of one input: its tensors renamed, filtered and cast."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ckptkit.core.arguments import require_flags, takes_rules
from ckptkit.core.checkpoint import Checkpoint, TensorInfo, under_key
from ckptkit.core.dtypes import is_float
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.torch_types import DType
from ckptkit.errors import PlanError, RuleError
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.plans.metadata import follow_metadata
from ckptkit.plans.metadata.edits import edit_metadata
from ckptkit.plans.metadata.moves import Rename, renamed_alike
from ckptkit.plans.plan import Dropped, Plan
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.quantized.as_codes import QuantizeLike, quantize_outputs
from ckptkit.plans.quantized.as_numbers import DequantizedInputs
from ckptkit.plans.steps import (
    dropped_entries,
    dropped_sources,
    make_steps,
    moved_modules,
    refuse_suspicious,
    refuse_unread,
    role_to_edit,
    without_unread,
)
from ckptkit.quantized.view import DequantizeLike
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import KeyMap, Rules, RulesLike
from ckptkit.values.casting import float_dtype
from ckptkit.wrappers.positions import find_positions

__all__ = ["plan_remap"]

_NOT_WANTED = "not a key of the checkpoint given as like"


@takes_rules
def plan_remap(
    source: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    dtype: str | DType | None = None,
    like: CheckpointLike | None = None,
    dequantize: DequantizeLike = False,
    quantize: QuantizeLike | None = None,
    skip_unread: bool = False,
    metadata: Mapping[str, str] | None = None,
    drop_metadata: str | Sequence[str] = (),
) -> Plan:
    """Return the plan that renames and filters the tensors of ``source``, and casts floats to ``dtype`` if given.

    ``source`` and ``like`` are a path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is
    opened here is closed at the end; give the same path to ``execute``. ``rules`` are a list of renames, the path of a
    rule file, its parsed content, or ``Rules``.

    ``dtype`` is a torch dtype, torch's name for one, or a safetensors code (``torch.bfloat16``, ``bfloat16``,
    ``BF16``); integers and booleans keep their dtype. With ``like``, the output has the keys of ``like`` in the same
    order, with the same shapes and dtypes. All other tensors of ``source`` are left out.

    A tensor that is listed without its values, such as a sparse tensor, cannot be copied. ``skip_unread`` leaves all
    such tensors out, and ``dropped`` of the plan names each.

    The metadata of ``source`` is kept, and what it says about tensors follows their new names. ``drop_metadata`` is a
    pattern or several: items whose names match are left out. ``metadata`` has further items. Only a safetensors output
    holds metadata.

    The parts of a quantised weight can only be copied, and only together. With ``dequantize``, the output has numbers
    in place of every quantised weight, under the key of the weight. Their dtype is ``dtype``, else the one that
    ``config.json`` names, else the one that the scheme records, else F32; ``notes`` of the plan say which.
    ``dequantize`` may also be a dtype. In ``rules``, the operation ``dequantize`` is for weights with names that match.

    ``quantize`` is ``"fp8-block"``, ``"fp8-row"``, ``"fp8-tensor"`` or ``"int8-row"``: the output has codes and scales
    in place of the weights of linear layers. These are the matrices in numbered layers, as in ``layers.0.q.weight``,
    without embeddings, norms and routers. ``notes`` name the other matrices. To choose, use the operation ``quantize``.

    Raises ``RuleError`` where rules collide or match nothing. Raises ``PlanError`` where keys of ``like`` cannot be
    filled, where no tensor would be left, and where a tensor cannot be copied. It is also raised where a quantised
    weight would be cast, changed or taken apart, and for a weight that ckptkit cannot dequantise. A file that refers to
    code that looks malicious is refused too.

    Example:
        >>> plan = plan_remap("fixtures/lenet_ddp.pt", ["module.*=*"], dtype="bfloat16")
        >>> str(plan.steps[0].out)
        'BF16 [6, 3, 5, 5]'
    """
    require_flags(skip_unread=skip_unread)
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(opened(source, "source"))
        expected = None if like is None else stack.enter_context(opened(like, "like"))
        to_dtype = None if dtype is None else float_dtype(dtype)
        chosen = rules_for(rules, checkpoint, expected)
        with pause_gc():
            inputs = DequantizedInputs(
                {"source": checkpoint}, dequantize, rules=chosen, by_rules=["source"], dtype=to_dtype
            )
            plan = inputs.finish(
                _plan(inputs.checkpoints["source"], inputs.rules or chosen, expected, to_dtype, skip_unread=skip_unread)
            )
            plan = quantize_outputs(plan, inputs.stored, quantize)
        return edit_metadata(plan, metadata, drop_metadata)


def _plan(
    checkpoint: Checkpoint, rules: Rules, expected: Checkpoint | None, to_dtype: str | None, *, skip_unread: bool
) -> Plan:
    refuse_suspicious(checkpoint, "source")
    checkpoint, skipped = without_unread(checkpoint, "source") if skip_unread else (checkpoint, [])
    quantized = QuantizedInputs({"source": checkpoint}, expected, where="like")
    quantized.refuse_quantizing("source", rules)
    key_map = apply_rules(rules, checkpoint, expected)
    outputs = key_map.outputs()
    quantized.refuse_operations("source", outputs)
    if to_dtype is not None:
        quantized.refuse_cast("source", outputs, to_dtype)
    quantized.refuse_overlay("source", outputs)
    outs = {
        new: under_key(info, new, to_dtype if to_dtype and is_float(info.dtype) else info.dtype)
        for new, info in key_map.describe(checkpoint).items()
    }
    surplus: list[Dropped] = []
    if expected is not None:
        outs = _outputs_like(expected, outs, _hint_for(checkpoint))
        for key, derivation in outputs.items():
            surplus += [] if key in outs else dropped_sources("source", key, derivation, _NOT_WANTED)
    refuse_unread((old for key in outs for old in outputs[key].sources), checkpoint)
    steps = make_steps(outs, outputs, "source", checkpoint)
    if not steps:
        raise PlanError(f"the output would have none of {plural(len(checkpoint), 'tensor')}")
    dropped = [Dropped("source", key, reason) for key, reason in key_map.dropped.items()]
    dropped += [*skipped, *surplus, *dropped_entries(checkpoint, "source")]
    moved = moved_modules(checkpoint.versions, key_map.renamed)
    versions = {new: checkpoint.versions[old] for old, new in moved.items()}
    edited_role = role_to_edit(checkpoint, "source")
    plan = Plan(tuple(steps), tuple(dropped), {}, key_map.notes, versions, edited_role)
    plan = follow_metadata(plan, {"source": checkpoint}, _renamer(checkpoint, rules, key_map))
    return check_quantized(plan, quantized)


def _renamer(checkpoint: Checkpoint, rules: Rules, key_map: KeyMap) -> Rename | None:
    """Return the function that gives further names the new names that the rules give them."""

    def rename(names: Collection[str]) -> Mapping[str, str]:
        try:
            renamed = apply_rules(replace(rules, allow_unused=True), [*checkpoint, *names]).renamed
        except RuleError:  # such as an operation that the further names would be inputs of
            return renamed_alike(names, key_map.renamed)
        return {name: renamed[name] for name in names if name in renamed}

    return rename if rules.stages else None


def _hint_for(checkpoint: Checkpoint) -> str:
    """Return the hint for outputs that cannot be filled from a checkpoint."""
    numbered = find_positions({key: info.shape for key, info in checkpoint.items()})
    if numbered is not None and numbered.is_certain:
        path = CheckpointSummary.of(checkpoint).argument or "SOURCE"
        return f"{numbered.name} has no buffers: ckpt merge WEIGHTS {path} -o OUT takes them from the trained weights"
    return "rename or reshape the tensors with rules, or merge them into a model: ckpt merge MODEL PATH -o OUT"


def _outputs_like(wanted: Checkpoint, outs: Mapping[str, TensorInfo], hint: str) -> dict[str, TensorInfo]:
    """Return the outputs with the keys, order and dtypes of ``wanted``; raise ``PlanError`` for missing outputs.

    The error lists every key that is missing or has another shape.
    """
    problems = [f"{quoted(key)} is missing" for key in wanted if key not in outs]
    problems += [
        f"{quoted(key)} is {list(outs[key].shape)} and should be {list(info.shape)}"
        for key, info in wanted.items()
        if key in outs and outs[key].shape != info.shape
    ]
    if problems:
        raise PlanError(
            f"{len(problems):,} of {plural(len(wanted), 'tensor')} cannot be filled: "
            f"{listed(problems, show=str, separator='; ')}",
            hint=hint,
        )
    return {key: under_key(outs[key], key, info.dtype) for key, info in wanted.items()}
