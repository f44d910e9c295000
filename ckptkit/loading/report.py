"""The result of ``load_into``, and its findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckptkit.core.cast_losses import CastLoss, describe_overflow, describe_small_losses
from ckptkit.core.checkpoint import UNINITIALISED, Checkpoint, TensorInfo
from ckptkit.core.coverage import ModuleCoverage, coverage_by_module, measure_coverage
from ckptkit.core.findings import Finding, Report, Severity
from ckptkit.core.text import listed, percent, plural, quoted
from ckptkit.core.torch_bridge import is_extra_state
from ckptkit.errors import ModelError
from ckptkit.formats.codes import unread_findings
from ckptkit.loading import codes
from ckptkit.loading.decision import (
    Handing,
)
from ckptkit.plans.overlays.overlay import OtherNames
from ckptkit.plans.plan import Plan, Step
from ckptkit.plans.policies import (
    MismatchAction,
    MissingAction,
    Policy,
)
from ckptkit.rules.apply import MOST_NOT_KEPT, NOT_KEPT
from ckptkit.rules.positions import NamedByPosition

__all__ = ["Asked", "Found", "LoadReport", "report_load"]

_MOST_ENTRIES = 4


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


@dataclass(frozen=True, slots=True)
class Found:
    """What the check after loading found, for the report."""

    shared: frozenset[str]
    rewritten: tuple[str, ...]
    not_compared: tuple[TensorInfo, ...]
    findings: tuple[Finding, ...]
    losses: tuple[CastLoss, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """The policies of a load, which tell whether the user asked for what happened to a key."""

    on_missing: Policy[MissingAction]
    on_mismatch: Policy[MismatchAction]


def report_load(
    base: Checkpoint, plan: Plan, handing: Handing, found: Found, warnings: Sequence[str], *, asked: Asked
) -> LoadReport:
    """Return the report of a load that was checked."""
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
        if loss.infinite_codes:
            count = f"{loss.infinite_codes:,} of {plural(loss.values, 'code')}"
            yield codes.INFINITE.finding(loss.key, f"{quoted(loss.key)} has {count} that stand for NaN or inf")
        for sentence in describe_small_losses([loss]):
            yield codes.UNDERFLOW.finding(loss.key, sentence)


def _kept_findings(kept: Sequence[str], plan: Plan, found: Found, asked: Asked) -> Iterator[Finding]:
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


def _dropped_findings(plan: Plan, asked: Asked) -> Iterator[Finding]:
    entries = [drop.key for drop in plan.dropped if drop.is_entry and not drop.wanted]
    if len(entries) > 1:  # as every checkpoint of a trainer has
        message = f"{len(entries):,} entries that are not tensors were not loaded: {listed(entries, _MOST_ENTRIES)}"
        yield codes.SKIPPED.finding(entries[0], message, keys=entries)
    not_kept = [drop.key for drop in plan.dropped if drop.reason == NOT_KEPT]
    if len(not_kept) > MOST_NOT_KEPT:
        message = f"{len(not_kept):,} tensors were not loaded: {listed(not_kept, _MOST_ENTRIES)} ({NOT_KEPT})"
        yield codes.SKIPPED.finding(not_kept[0], message, keys=not_kept)
    for drop in plan.dropped:
        is_one_of_many = drop.reason == NOT_KEPT and len(not_kept) > MOST_NOT_KEPT
        if is_one_of_many or (len(entries) > 1 and drop.is_entry and not drop.wanted):
            continue
        message = f"{quoted(drop.key)} was not loaded: {drop.reason}"
        if drop.wanted:
            yield codes.SHAPE.finding(drop.key, message, severity=_severity(asked.on_mismatch, drop.wanted))
        else:
            yield codes.SKIPPED.finding(drop.key, message)


def _severity(policy: Policy[MissingAction] | Policy[MismatchAction], key: str) -> Severity:
    return "note" if policy.has_pattern(key) else "warning"


def _unverified_findings(found: Found, loaded: AbstractSet[str]) -> Iterator[Finding]:
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
