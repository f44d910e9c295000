"""The plan that makes a checkpoint of its base and of a patch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.checkpoint.provenance import way_to_apply
from ckptkit.core.config_files import default_error_path
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import quoted
from ckptkit.deltas.patch import Patch, packed_key
from ckptkit.deltas.patch_file import is_patch, read_patch
from ckptkit.errors import FormatError
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.deltas.base import BASE, BaseOfPatch, has_headers, other_base
from ckptkit.plans.deltas.operation import Patched
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.steps import dropped_entries, refuse_suspicious
from ckptkit.tensor_ops.recipes import Recipe
from ckptkit.values.delta.coding import require_decompression

__all__ = ["BASE", "PATCH", "patched_steps", "plan_apply_delta", "plan_of_patch", "refuse_patch"]

PATCH = "patch"  # its role; that of the base is BASE
_NOT_WANTED = "not in the checkpoint that the patch makes"


def plan_apply_delta(base: CheckpointLike, patch: CheckpointLike) -> Plan:
    """Return the plan that makes a checkpoint of ``base`` and of the ``patch`` that ``make_delta`` wrote.

    ``base`` is a path, a Checkpoint, a Module or a mapping of tensors, in any format. ``patch`` is a path, or an open
    Checkpoint. Only headers are read here: ``execute``, ``Plan.tensors`` and ``Plan.materialize`` compare each tensor
    with the digest that the patch has of it. Give them ``{"base": base, "patch": patch}``.

    Raises:
        PathError: A path cannot be read.
        FormatError: ``patch`` is not a patch, is damaged, or is of a later version; or ``base`` is a patch.
        PlanError: ``base`` has other names, dtypes or shapes than the checkpoint that the patch was made from. While
            the tensors are made: a tensor of ``base`` has other values.

    Example:
        >>> import ckptkit, os, tempfile, torch
        >>> base, new = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     patch = os.path.join(directory, "patch.safetensors")
        ...     delta = ckptkit.make_delta(base, new, patch)
        ...     plan = ckptkit.plan_apply_delta(base, patch)
        ...     plan.materialize({"base": base, "patch": patch})
        {'w': tensor([1., 1., 1., 1.])}
    """
    with opened(base, BASE) as checkpoint, opened(patch, PATCH) as packed:
        return plan_of_patch(checkpoint, packed)


def plan_of_patch(base: Checkpoint, packed: Checkpoint) -> Plan:
    """Return the plan for open checkpoints, as ``plan_apply_delta`` says."""
    if is_patch(base) and not is_patch(packed):
        raise FormatError(
            "is the patch, and comes second", hint="its base comes first: ckpt apply BASE PATCH -o OUT", path=base.path
        )
    refuse_patch(base)
    patch = read_patch(packed)
    refuse_suspicious(base, BASE)
    with default_error_path(packed.path):
        require_decompression(patch.compression)
    _refuse_other_headers(base, patch)
    with pause_gc():
        steps = tuple(patched_steps(patch))
    kept = {*patch.result.infos, *patch.renamed.values()}
    dropped = [Dropped(BASE, key, _NOT_WANTED) for key in patch.base.infos if key not in kept]
    dropped += dropped_entries(base, BASE)
    return Plan(
        steps,
        tuple(dropped),
        dict(patch.metadata),
        versions=dict(patch.versions),
        command="apply",
        patched_base=_base_of(patch, steps),
    )


def _base_of(patch: Patch, steps: Iterable[Step]) -> BaseOfPatch:
    """Return the tensors of the base that no step copies, and so none compares."""
    copied = {step.sources[0].key for step in steps if len(step.sources) == 1 and step.sources[0].role == BASE}
    digests = {key: digits for key, digits in patch.base.digests.items() if key not in copied}
    return BaseOfPatch(patch.base_name, digests)


def refuse_patch(checkpoint: Checkpoint) -> None:
    """Raise ``FormatError`` where an input that must have weights is a patch."""
    if is_patch(checkpoint):
        raise FormatError(
            "is a patch, and its tensors are not weights",
            hint=way_to_apply("PATCH"),
            path=checkpoint.path,
        )


def _refuse_other_headers(base: Checkpoint, patch: Patch) -> None:
    reason = next(_other_headers(base, patch.base.infos), None)
    if reason is not None:
        compared = "names, dtypes and shapes" if has_headers(base, patch.result.infos) else ""
        raise other_base(base, reason, patch.base_name, compared)


def _other_headers(base: Checkpoint, wanted: Mapping[str, TensorInfo]) -> Iterator[str]:
    for key, info in wanted.items():
        found = base.get(key)
        if found is None:
            yield f"{quoted(key)} is missing"
        elif (found.dtype, found.shape) != (info.dtype, info.shape):
            yield f"{quoted(key)} is {found}, and not {info}"
    for key, info in base.items():
        if info.kind == "dense" and key not in wanted:
            yield f"it has {quoted(key)} too"


def patched_steps(patch: Patch) -> Iterator[Step]:
    """Yield the step of each tensor of the result, in its order."""
    first_of_tie = {key: keys[0] for keys in patch.ties for key in keys[1:]}
    for key, info in patch.result.infos.items():
        made = first_of_tie.get(key, key)
        in_base, in_patch = Source(BASE, patch.renamed.get(made, made)), Source(PATCH, packed_key(made))
        sources: tuple[Source, ...]
        if made in patch.changed:
            kind, sources = "changed", (in_base, in_patch)
        elif made in patch.whole:
            kind, sources = "whole", (in_patch,)
        else:
            kind, sources = "equal", (in_base,)
        operation = Patched(
            kind,
            info.dtype,
            info.shape,
            patch.result.digests[key],
            patch.base_name,
        )
        recipe = Recipe(tuple(range(len(sources))), (operation,))
        yield Step(TensorInfo(key, info.dtype, info.shape), sources, recipe.outline(), recipe=recipe)
