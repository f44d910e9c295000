"""``load_into``: load a checkpoint into a live model, and check the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from ckptkit.core.arguments import has_no_argument, require_flags, takes_rules
from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint import Access, Checkpoint, Description, View, row_major
from ckptkit.core.coverage.requirements import parse_requirements
from ckptkit.core.gc_pause import rare_gc
from ckptkit.core.text import kind_of
from ckptkit.core.torch_bridge import as_checkpoint, code_of, is_dtensor, is_extra_state
from ckptkit.core.torch_types import Module
from ckptkit.errors import ModelError
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.loading.decision import (
    Handing,
    refuse_overflow,
    uncast,
)
from ckptkit.loading.one_load import Loading
from ckptkit.loading.report import Asked, LoadReport, report_load
from ckptkit.loading.snapshot import Snapshot
from ckptkit.loading.watch import named_tensors
from ckptkit.plans.merge import plan_loading
from ckptkit.plans.plan import Step
from ckptkit.plans.policies import (
    MISMATCH_ACTIONS,
    MISSING_ACTIONS,
    UNEXPECTED_ACTIONS,
    OnMismatch,
    OnMissing,
    OnUnexpected,
    parse_policy,
)
from ckptkit.plans.produce import Producer
from ckptkit.quantized.view import DequantizeLike, as_numbers
from ckptkit.rules.model import RulesLike

__all__ = ["load_into"]


@has_no_argument(
    strict='strict=True of torch is on_missing="error" and on_unexpected="error", and the default reports such keys',
    device="each tensor is copied into the memory of the model, so move the model to the device",
    map_location="each tensor is copied into the memory of the model, whatever its device",
)
@takes_rules
def load_into(
    model: Module,
    checkpoint: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    on_missing: OnMissing | None = None,
    on_unexpected: OnUnexpected = "skip",
    on_mismatch: OnMismatch = "error",
    dequantize: DequantizeLike = False,
    skip_unread: bool = False,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    allow_overflow: bool = False,
    assign: bool = False,
    rollback: bool = False,
) -> LoadReport:
    """Load the tensors of ``checkpoint`` that match into ``model``, in place, and check that nothing else changed.

    Everything is decided before the first change: shapes, dtypes, policies, requirements, and whether the files are
    as they were when they were opened. Then each tensor is read in pieces of 1 MB. Each piece is copied into the memory
    of the model, and compared there with the bytes that were read. The model is not copied.

    What is checked afterwards: every loaded tensor has the value of the checkpoint, by its bytes; every other tensor
    did not change; all parameters are the same objects in the same memory as before. So are all buffers, but for those
    that the model's own code replaces. A lazy module makes its parameters while it is loaded, in the same objects.

    Some modules have hooks for loading, or a loading method of their own. ``load_state_dict`` gives them their tensors
    and those of the modules below, all at once and in memory, as in torch; of all other tensors that are loaded, it
    gives those of the model, which have their new values by then. Their code is first tried on a copy of the
    model on the meta device, where such a copy can be made. Afterwards all loaded tensors are compared with the
    checkpoint once more, and all others are compared by SHA-256. Without such code only ckptkit writes, and the
    count that torch has of the changes of each tensor is compared instead.

    A failure after the first change raises ``LoadError``, which names what was replaced. ``rollback=True`` restores the
    model instead.

    Parameters of ``fully_shard`` and other DTensors are loaded too: each process reads the rows of its own shard. Their
    own code is tried on whole tensors without values. Where a cast could overflow, each process reads the whole tensor
    first, so that all of them refuse together.

    Args:
        model: The model that is loaded into.
        checkpoint: A path, a Checkpoint, a Module, or a mapping of tensors. What is opened here is closed at the end.
        rules: As in ``plan_merge``; they rename and filter the keys of the checkpoint.
        on_missing: As in ``plan_merge``, also that only ``"keep"`` in writing accepts a key that the checkpoint has in
            parts. A key that keeps its value is a warning of the report, or a note if a pattern names it.
        on_unexpected: As in ``plan_merge``; ``"add"`` raises, since a model cannot get keys that it does not have.
        on_mismatch: As in ``plan_merge``. A skipped key is a warning of the report, or a note if a pattern names it.
        dequantize: Load quantised weights as numbers, which get the dtype of the model; or round them to this dtype
            first.
        skip_unread: As in ``plan_merge``.
        require: A pattern or a list of patterns: every matching key of the model's state_dict must be loaded.
        min_coverage: The least share of the model's elements that must be loaded, between 0 and 1.
        allow_overflow: Load values that the dtype of the model cannot hold; a finding has their count. Values are
            cast to the dtype of the model as torch casts them, and a finding also counts the values that become 0.
        assign: Give the model new tensors on the CPU with the dtypes of the checkpoint, as ``assign=True`` of
            ``load_state_dict`` does; each keeps ``requires_grad``, and tied parameters stay tied. A model on the meta
            device needs it. All tensors are read before the first is assigned. A finding names each optimizer that
            still holds replaced parameters.
        rollback: Copy the model first, and restore it after a failure or an interrupt. The copy is in memory up to
            256 MB, else in a temporary file. Earlier versions always made this copy.

    Raises:
        ArgumentError: ``min_coverage`` is not a share, or another argument has a wrong type.
        PlanError: A policy is ``error``, or a cast makes inf of finite values.
        RuleError: A rule is wrong, or a pattern matches no key.
        ModelError: ``require`` or ``min_coverage`` is not met, or a tensor of the model cannot be written, such as one
            on the meta device without ``assign``. Nothing was changed.
        LoadError: Reading failed, the model's own code failed, or the check of the result failed, after the first
            change. With ``rollback=True``, the error of the read itself is raised instead.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> load_into(model, {"weight": torch.ones(2, 2)})
        <LoadReport: loaded 1 of 2 tensors, 66.7 % of the elements; kept 1 as they were>
    """
    require_flags(skip_unread=skip_unread, allow_overflow=allow_overflow, assign=assign, rollback=rollback)
    if "add" in parse_policy("on_unexpected", on_unexpected, UNEXPECTED_ACTIONS).actions:
        raise ModelError(
            "a model cannot get keys that it does not have", hint='on_unexpected must be "skip" or "error"'
        )
    if not hasattr(model, "named_parameters"):
        raise ModelError(f"the model is {kind_of(model)}, not a torch.nn.Module", hint="pass the model that will train")
    with rare_gc(), ExitStack() as stack:  # a collection would look at all objects of torch
        base = _describe(model)
        requirements = parse_requirements(require, min_coverage)
        stored = stack.enter_context(opened(checkpoint, "checkpoint"))
        rounded: dict[str, CastLoss] = {}
        donor = as_numbers(stored, dequantize, rounded).checkpoint
        plan, own = plan_loading(
            base,
            donor,
            rules,
            on_missing=on_missing,
            on_unexpected=on_unexpected,
            on_mismatch=on_mismatch,
            skip_unread=skip_unread,
            requirements=requirements,
        )
        steps = [step for step in plan.steps if step.sources[0].role == "donor"]
        if assign:
            steps = [uncast(step, donor) for step in steps]
        handing = Handing(tuple(steps), own)
        loading = Loading(model, base, Producer({"donor": donor}), handing, assign=assign)
        if not allow_overflow:
            refuse_overflow(loading.producer, steps, donor.path)
        donor.check_unchanged()
        loading.rehearse()
        extra_states = [step.out.key for step in steps if is_extra_state(step.out.key)]
        before = stack.enter_context(Snapshot(model, extra_states)) if rollback else loading.watch()
        found = loading.run(before)
        found = replace(found, losses=(*found.losses, *_under_keys(rounded, steps)))
    asked = Asked(
        parse_policy("on_missing", "keep" if on_missing is None else on_missing, MISSING_ACTIONS),
        parse_policy("on_mismatch", on_mismatch, MISMATCH_ACTIONS),
    )
    return report_load(base, plan, handing, found, donor.warnings, asked=asked)


def _under_keys(losses: Mapping[str, CastLoss], steps: Sequence[Step]) -> Iterator[CastLoss]:
    """Yield the losses of tensors of the checkpoint under the keys that they have in the model."""
    for step in steps:
        for source in step.sources:
            loss = losses.get(source.key)
            if loss:
                yield replace(loss, key=step.out.key)


def _describe(model: Module) -> Checkpoint:
    """Return the description of a model.

    A DTensor counts as the whole tensor that it is a part of. No parameter or buffer counts as unreadable, since the
    model keeps what is not loaded, and nothing has to copy it. The dtype is that of the parameter or buffer, also where
    a hook casts what ``state_dict()`` returns.
    """
    base = as_checkpoint(model, "model")
    infos = dict(base.items())
    for key, tensor in named_tensors(model).items():
        info = base.get(key)
        if info is not None and (info.kind != "dense" or info.dtype != code_of(tensor.dtype)):
            tied = View(id(tensor), 0, row_major(info.shape)) if is_dtensor(tensor) else None
            infos[key] = replace(info, dtype=code_of(tensor.dtype), kind="dense", view=tied)
    description = Description(
        base.path,
        base.format,
        entries=base.entries,
        versions=base.versions,
        configuration=base.configuration,
    )
    return Checkpoint(infos, Access(lambda info: base.payload(info.key)), description, model=model)
