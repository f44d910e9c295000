"""``load_into``: load a checkpoint into a live model, and check the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, replace

from ckptkit.comparison.own_code import is_below, modules_with_own_code
from ckptkit.comparison.own_code.rehearsal import Given, Untried, rehearse
from ckptkit.core.arguments import require_flags
from ckptkit.core.cast_losses import CastLoss, describe_overflow, describe_small_losses
from ckptkit.core.checkpoint import UNINITIALISED, Access, Checkpoint, Description, TensorInfo, View, row_major
from ckptkit.core.coverage import ModuleCoverage, coverage_by_module, measure_coverage
from ckptkit.core.coverage.requirements import parse_requirements
from ckptkit.core.findings import Finding, Report, Severity
from ckptkit.core.text import kind_of, listed, percent, plural, quoted
from ckptkit.core.torch_bridge import ABSENT, as_checkpoint, code_of, is_dtensor
from ckptkit.core.torch_types import Module
from ckptkit.errors import ModelError
from ckptkit.formats.codes import unread_findings
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.loading import codes
from ckptkit.loading.decision import (
    Decision,
    Handing,
    decide,
    followers,
    is_extra_state,
    refuse_meta,
    refuse_overflow,
    uncast,
)
from ckptkit.loading.snapshot import Snapshot
from ckptkit.loading.transfer import Transfer, module_versions_for, optimizers_that_hold, refuse_gradients
from ckptkit.loading.watch import Digests, Watch, named_tensors
from ckptkit.plans.merge import OtherNames, plan_loading
from ckptkit.plans.plan import Plan, Step
from ckptkit.plans.policies import (
    MISMATCH_ACTIONS,
    MISSING_ACTIONS,
    UNEXPECTED_ACTIONS,
    MismatchAction,
    MissingAction,
    OnMismatch,
    OnMissing,
    OnUnexpected,
    Policy,
    parse_policy,
)
from ckptkit.plans.produce import Producer
from ckptkit.rules.model import RulesLike
from ckptkit.rules.positions import NamedByPosition

__all__ = ["LoadReport", "load_into"]


@dataclass(frozen=True, repr=False)
class LoadReport(Report):
    """The result of ``load_into``: the keys of the model that were loaded, and the findings.

    ``kept`` names the keys that were not loaded; their values change only with a loaded tensor in the same memory.
    ``coverage`` is the share of the model's elements that were loaded, between 0 and 1. ``modules`` has the coverage of
    each module; a module that was loaded in part is divided into its children.

    Example:
        >>> report = ckptkit.load_into(torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2)})
        >>> report.loaded, report.kept, round(report.coverage, 2)
        (('weight',), ('bias',), 0.67)
    """

    loaded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    coverage: float = 0.0
    modules: tuple[ModuleCoverage, ...] = ()

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        return (
            f"loaded {len(self.loaded)} of {plural(len(self.loaded) + len(self.kept), 'tensor')}, "
            f"{percent(self.coverage)} of the elements; kept {len(self.kept)} as they were"
        )


def load_into(
    model: Module,
    checkpoint: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    on_missing: OnMissing | None = None,
    on_unexpected: OnUnexpected = "skip",
    on_mismatch: OnMismatch = "error",
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
    base = _describe(model)
    requirements = parse_requirements(require, min_coverage)
    with opened(checkpoint, "checkpoint") as donor, ExitStack() as stack:
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
        loading = _Loading(model, base, Producer({"donor": donor}), handing, assign=assign)
        if not allow_overflow:
            refuse_overflow(loading.producer, steps, donor.path)
        donor.check_unchanged()
        loading.rehearse()
        extra_states = [step.out.key for step in steps if is_extra_state(step.out.key)]
        before = stack.enter_context(Snapshot(model, extra_states)) if rollback else loading.watch()
        found = loading.run(before)
    asked = _Asked(
        parse_policy("on_missing", "keep" if on_missing is None else on_missing, MISSING_ACTIONS),
        parse_policy("on_mismatch", on_mismatch, MISMATCH_ACTIONS),
    )
    return _report(base, plan, handing, found, donor.warnings, asked=asked)


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


@dataclass(frozen=True, slots=True)
class _Found:
    """What the check after loading found, for the report."""

    shared: frozenset[str]
    rewritten: tuple[str, ...]
    not_compared: tuple[TensorInfo, ...]
    findings: tuple[Finding, ...]
    losses: tuple[CastLoss, ...]


class _Loading:
    """One call of ``load_into``, from the decision of what is written to the check of the result."""

    def __init__(self, model: Module, base: Checkpoint, producer: Producer, handing: Handing, *, assign: bool) -> None:
        """Decide how each tensor is loaded. Raises ``ModelError`` where one cannot be; nothing is changed."""
        self._model = model
        self._base = base
        self.producer = producer
        self._handing = handing
        self._loaded = set(handing.loaded())
        before = Watch(model)
        self._before = before
        self._decision: Decision | None = None
        if handing.own.undecided:
            _refuse_values_without_tensor(model, base, handing.own.undecided)
        if assign:
            _refuse_assigned_shards(before, self._loaded)
            refuse_gradients(before, handing.steps)
            followers(base, producer, handing.steps)  # only to refuse two values for one tensor
            self._runs_code = bool(modules_with_own_code(model))
        else:
            refuse_meta(base, before)
            self._decision = decide(model, base, before, producer, handing)
            self._runs_code = self._decision.runs_code

    def rehearse(self) -> None:
        """Try the model's own code on a copy of the model. Raises ``ModelError`` where it fails."""
        if self._decision is not None and self._runs_code:
            infos = {self._handing.name(step.out.key): step.out for step in self._handing.steps}
            infos |= {step.out.key: step.out for step in self._handing.own.others}
            given = Given(infos, (), module_versions_for(self.producer, self._handing))
            tried = rehearse(self._model, [""], given)
            if isinstance(tried, Untried):
                return
            for refusal in (*tried.refusals, *(f"size mismatch for {key}" for key in tried.mismatched)):
                raise ModelError(f"load_state_dict failed: {refusal}")
            for name in tried.replaced:
                self._refuse_replaced(name)

    def _refuse_replaced(self, name: str) -> None:
        """Raise ``ModelError`` where something else would change if a tensor were replaced while loading."""
        would = f"{quoted(name)} would be replaced while loading"
        if name in self._before.parameters:
            raise ModelError(
                f"{would}, and optimizers would hold the old tensor",
                hint="pass assign=True, which names the optimizers that hold it",
            )
        others = sorted(set().union(*(tie for tie in self._before.ties if name in tie)) - {name})
        if others:
            raise ModelError(f"{would}, and would not share memory with {quoted(others[0])} any more")
        if name in self._base and name not in self._loaded and name not in self._handing.own.filled:
            raise ModelError(f"{would}, and the checkpoint does not have it")

    def watch(self) -> Watch:
        """Return the watch that can tell afterwards what changed, without a copy of the model."""
        if not self._runs_code:
            return self._before
        return Digests(self._model, self._before.tensors.keys() - _sharing_memory(self._before, self._loaded))

    def run(self, before: Watch) -> _Found:
        """Load and check. A failure restores the model from ``before`` if that is a snapshot."""
        transfer = Transfer(self._model, before, self.producer, self._handing)
        try:
            if self._decision is None:
                transfer.assign()
            else:
                transfer.copy(self._decision)
            rewritten = self._check_not_loaded(before)
        except BaseException as error:
            if isinstance(before, Snapshot):
                failed = before.restore()
                if failed:
                    raise ModelError(f"{quoted(failed[0])} could not be restored after the error: {error}") from error
                raise
            if isinstance(error, Exception) and transfer.has_begun:
                raise transfer.half_loaded(error) from error
            raise
        return _Found(
            frozenset(_sharing_memory(before, self._loaded) - self._loaded) if self._decision else frozenset(),
            tuple(rewritten),
            tuple(before.infos[name] for name in before.not_compared),
            tuple(self._assigned_findings(before)),
            tuple(self.producer.losses[key] for key in self._base if key in self.producer.losses),
        )

    def _check_not_loaded(self, before: Watch) -> list[str]:
        """Raise ``ModelError`` where anything but the loaded tensors changed; return the buffers that hooks rewrote.

        Only buffers that are not persistent may be rewritten.
        """
        assigned = frozenset[str]() if self._decision else _same_tensors(before, self._loaded)
        for name in before.replaced():
            if name not in assigned and name in before.parameters:
                raise ModelError(f"{quoted(name)} was replaced while loading, and optimizers still hold the old tensor")
        written = _sharing_memory(before, self._loaded)
        replaced = set(before.replaced())
        changed = [
            name
            for name in before.tensors
            if name not in written and (name in replaced or not before.is_unchanged(name))
        ]
        for name in changed:
            if name in self._base and name not in self._handing.own.filled:
                raise ModelError(
                    f"{quoted(name)} was not loaded, but it changed",
                    hint="a hook of the model wrote to it while loading",
                )
        for tie in before.ties ^ before.ties_now() if self._runs_code and not assigned else ():
            first, second, *_ = sorted(tie)
            raise ModelError(f"loading changed whether {quoted(first)} and {quoted(second)} share memory")
        return changed

    def _assigned_findings(self, before: Watch) -> Iterator[Finding]:
        if self._decision is not None:
            return
        old = [tensor for name, tensor in before.tensors.items() if name in self._loaded and not tensor.is_meta]
        for optimizer, count in optimizers_that_hold(old) if old else ():
            name = type(optimizer).__name__
            yield codes.REPLACED.finding(
                "",
                f"an optimizer ({name}) holds {plural(count, 'parameter')} that the model no longer has, "
                "and would not train the new ones",
                "build the optimizer after load_into(..., assign=True)",
            )
        for name, tensor in named_tensors(self._model).items():
            if tensor.is_meta:
                why = "is not in the checkpoint" if name in self._base else "is a buffer that no checkpoint has"
                yield codes.META.finding(name, f"{quoted(name)} {why}, and is still on the meta device without a value")


def _refuse_values_without_tensor(model: Module, base: Checkpoint, reason: str) -> None:
    """Raise ``ModelError`` where code that was not tried saves values that no plan has, such as packed weights."""
    paths = modules_with_own_code(model)
    for entry in base.entries:
        key = entry.path
        if entry.type != ABSENT and not is_extra_state(key) and is_below(key, paths):
            raise ModelError(
                f"{quoted(key)} is not a tensor, and only the model's own code can load it",
                hint=f"call model.load_state_dict: ckptkit could not try the code, because {reason}",
            )


def _refuse_assigned_shards(before: Watch, loaded: AbstractSet[str]) -> None:
    for name, tensor in before.tensors.items():
        if name in loaded and is_dtensor(tensor):
            raise ModelError(
                f"{quoted(name)} is a DTensor, and assign=True would replace it by the whole tensor",
                hint="call model.to_empty(device=...), and load without assign",
            )


def _same_tensors(before: Watch, loaded: AbstractSet[str]) -> set[str]:
    """Return every name of the loaded tensors."""
    written = {id(before.tensors[name]) for name in loaded if name in before.tensors}
    return {name for name, tensor in before.tensors.items() if id(tensor) in written}


def _sharing_memory(before: Watch, loaded: AbstractSet[str]) -> set[str]:
    """Return the names of the loaded tensors and of all tensors that share memory with one of them."""
    names = _same_tensors(before, loaded)
    return names.union(*(tie for tie in before.ties if tie & names))


@dataclass(frozen=True, slots=True)
class _Asked:
    """The policies of a load, which tell whether the user asked for what happened to a key."""

    on_missing: Policy[MissingAction]
    on_mismatch: Policy[MismatchAction]


def _report(
    base: Checkpoint, plan: Plan, handing: Handing, found: _Found, warnings: Sequence[str], *, asked: _Asked
) -> LoadReport:
    computed = {**handing.own.computed, **{name: () for name in found.rewritten if name in base}}
    loaded = {step.out.key for step in handing.steps} | computed.keys()
    # A lazy module, and other code, gives a tensor the shape of the checkpoint.
    infos = {**base, **{step.out.key: step.out for step in handing.steps}}
    covered = measure_coverage(infos, loaded)
    findings = (
        *unread_findings(warnings),
        *(codes.NAMED.finding("", note) for note in plan.notes if isinstance(note, NamedByPosition)),
        *found.findings,
        *_kept_findings(covered.kept, plan, found, asked),
        *_tied_findings(handing.steps),
        *_loss_findings(found.losses),
        *_dropped_findings(plan, asked),
        *_computed_findings(computed),
        *_unverified_findings(found, loaded),
    )
    findings = tuple(dict.fromkeys(findings))  # both inputs drop an extra state, with equal findings
    return LoadReport(
        findings,
        ModelError,
        loaded=covered.filled,
        kept=covered.kept,
        coverage=covered.share,
        modules=coverage_by_module(infos.values(), loaded),
    )


def _tied_findings(steps: Sequence[Step]) -> Iterator[Finding]:
    for step in steps:
        if step.tied_to is not None:
            key = step.out.key
            yield codes.TIED.finding(key, f"{quoted(key)} is tied to {quoted(step.tied_to)}, which was loaded")


def _computed_findings(computed: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    for key, names in computed.items():
        of = f" of {listed(names, 3)}" if names else ""
        message = f"{quoted(key)} was made{of} by the model's own code, so its value was not compared"
        yield codes.UNPROVED.finding(key, message)


def _loss_findings(losses: Iterable[CastLoss]) -> Iterator[Finding]:
    for loss in losses:
        if loss.overflowed:
            yield codes.OVERFLOW.finding(loss.key, describe_overflow([loss]))
        for sentence in describe_small_losses([loss]):
            yield codes.UNDERFLOW.finding(loss.key, sentence)


def _kept_findings(kept: Sequence[str], plan: Plan, found: _Found, asked: _Asked) -> Iterator[Finding]:
    mismatched = {drop.wanted for drop in plan.dropped} | {finding.key for finding in found.findings}
    lazy = {info.key for info in found.not_compared if info.kind == UNINITIALISED}
    hint = next((note.partition("; ")[2] for note in plan.notes if isinstance(note, OtherNames)), "")
    for key in kept:
        if key in found.shared:
            yield codes.SHARED.finding(
                key, f"{quoted(key)} was not loaded, but it shares memory with a loaded tensor and changed with it"
            )
        elif key not in mismatched:
            severity = _severity(asked.on_missing, key)
            message = f"{quoted(key)} is not in the checkpoint and "
            message += "stays uninitialised" if key in lazy else "keeps its value"
            yield codes.MISSING.finding(key, message, severity=severity, hint=hint)
            hint = ""  # of the first such tensor, for all of them


def _dropped_findings(plan: Plan, asked: _Asked) -> Iterator[Finding]:
    for drop in plan.dropped:
        message = f"{quoted(drop.key)} was not loaded: {drop.reason}"
        if drop.wanted:
            yield codes.SHAPE.finding(drop.key, message, severity=_severity(asked.on_mismatch, drop.wanted))
        else:
            yield codes.SKIPPED.finding(drop.key, message)


def _severity(policy: Policy[MissingAction] | Policy[MismatchAction], key: str) -> Severity:
    return "note" if policy.has_pattern(key) else "warning"


def _unverified_findings(found: _Found, loaded: AbstractSet[str]) -> Iterator[Finding]:
    for name in (name for name in found.rewritten if name not in loaded):
        message = f"a hook of the model rewrote {quoted(name)}, a buffer that is in no checkpoint"
        yield codes.DERIVED.finding(name, message)
    for name in filter(is_extra_state, loaded):
        message = f"{quoted(name)} was passed to its module; whether the module kept it was not checked"
        yield codes.UNPROVED.finding(name, message)
    for info in found.not_compared:
        if info.key not in loaded and info.kind != UNINITIALISED:
            message = f"{quoted(info.key)} is a {info.kind} tensor, so its bits were not compared"
            yield codes.UNPROVED.finding(info.key, message)
