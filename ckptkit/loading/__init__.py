"""Loading a checkpoint into a live model, and proving that it arrived."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckptkit.comparison import diff
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage import ModuleCoverage, coverage_by_module
from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import html_table, kind_of, plural, printable, quoted
from ckptkit.core.ties import shared_keys
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint, same_values
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import ModelError
from ckptkit.loading.requirements import Requirements, refuse_unmet
from ckptkit.loading.snapshot import Snapshot, named_tensors
from ckptkit.plans.merge import TIED, plan_merge
from ckptkit.plans.plan import Plan, Step
from ckptkit.plans.produce import Producer
from ckptkit.rules.model import Rules

__all__ = ["LoadReport", "load_into"]

_BATCH = 256 << 20


@dataclass(frozen=True)
class LoadReport(Report):
    """What was loaded, by key of the model and through ties; ``kept`` stays as the model had it, bit by bit.

    ``modules`` says the same by module; one that was loaded in part is opened. ``coverage`` is the share of the
    elements that were loaded, between 0 and 1.
    """

    loaded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    coverage: float = 0.0
    modules: tuple[ModuleCoverage, ...] = ()

    def __str__(self) -> str:
        """Say in one line what happened."""
        return (
            f"loaded {len(self.loaded)} of {plural(len(self.loaded) + len(self.kept), 'tensor')}, "
            f"{100 * self.coverage:.1f} % of the elements; kept {len(self.kept)} as they were"
        )

    def _repr_html_(self) -> str:
        rows = [
            (
                printable(row.module),
                f"{row.loaded:,} of {row.tensors:,}",
                f"{row.loaded_elements:,} of {row.elements:,}",
            )
            for row in self.modules
        ]
        return (
            f"<p>{self}</p>{html_table(('module', 'tensors loaded', 'elements loaded'), rows)}{super()._repr_html_()}"
        )


def load_into(
    model: Module,
    checkpoint: StateDictLike,
    rules: Rules | list[str] | None = None,
    *,
    on_missing: str = "keep",
    on_unexpected: str = "skip",
    on_mismatch: str = "error",
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
) -> LoadReport:
    """Load what fits into ``model``, in place, and prove by identity and value that it and nothing else changed.

    ``rules`` and the policies are those of ``plan_merge`` (``on_unexpected="add"`` has no meaning here and
    is refused). ``require`` is a pattern or a list of patterns: every key of the model's state_dict that fits one must
    be loaded. ``min_coverage``, between 0 and 1, is the least share of its elements that must be. torch's own
    ``load_state_dict`` does the copying, so the model's hooks run and values are cast as torch casts.

    Afterwards every loaded tensor has the checkpoint's value, every other one each bit that it had, all are the
    objects that they were, and the same ones share memory. Whatever fails or is interrupted, the model is put back as
    it was, from a copy that takes up to 256 MB of memory and beyond that a temporary file.

    Raises ``PlanError`` where a policy says so, ``RuleError`` where a pattern fits no key, and ``ModelError`` where
    what was asked for is not reached (before anything is copied), a tensor of the model is on the meta device, or the
    proof fails.
    """
    if on_unexpected == "add":
        raise ModelError(
            "a model cannot take over keys that it does not have", hint='on_unexpected is "skip" or "error"'
        )
    if not hasattr(model, "named_parameters"):
        raise ModelError(f"the model is {kind_of(model)}, not a torch.nn.Module", hint="pass the model that will train")
    base, donor = as_checkpoint(model, "model"), as_checkpoint(checkpoint, "checkpoint")
    plan = plan_merge(base, donor, rules, on_missing=on_missing, on_unexpected=on_unexpected, on_mismatch=on_mismatch)
    taken = [step for step in plan.steps if step.sources[0].role == "donor"]
    loaded = {step.out.key for step in taken}
    refuse_unmet(Requirements(require, min_coverage), base, loaded, plan, lambda: diff(base, donor, rules))
    _refuse_meta(model, base)
    with Snapshot(model) as before:
        try:
            _load(model, base, donor, taken)
            derived = _prove_rest(model, before, loaded)
        except BaseException as error:
            stuck = before.restore()
            if stuck:
                raise ModelError(f"{quoted(stuck[0])} could not be put back as it was after: {error}") from error
            raise
        shared = [name for name in _written_through(before, loaded) if name not in loaded]
    kept = [key for key in base if key not in loaded]
    filled = sum(info.elements for key, info in base.items() if key in loaded)
    elements = sum(info.elements for info in base.values())
    findings = (
        *_kept_findings(kept, plan, shared),
        *_tied_findings(taken),
        *_dropped_findings(plan),
        *_unproved_findings(before, derived, loaded),
    )
    findings = tuple(dict.fromkeys(findings))  # an extra state is in both, and no tensor in either
    return LoadReport(
        findings,
        ModelError,
        loaded=tuple(key for key in base if key in loaded),
        kept=tuple(kept),
        coverage=filled / elements if elements else 1.0,
        modules=coverage_by_module(base.values(), loaded),
    )


def _refuse_meta(model: Module, base: Checkpoint) -> None:
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta:
            raise ModelError(
                f"{quoted(name)} is on the meta device and can hold no value"
                if name in base
                else f"{quoted(name)} is on the meta device, and no checkpoint brings a buffer that is not persistent",
                hint="model.to_empty(device=...) gives it memory, or build the model on a real device"
                if name in base
                else "build the model on a real device",
            )


def _load(model: Module, base: Checkpoint, donor: Checkpoint, taken: Sequence[Step]) -> None:
    before = model.state_dict(keep_vars=True)
    versions = {} if any(step.out.key != step.sources[0].key for step in taken) else donor.versions
    batches = list(_batches(taken))
    for batch in batches:
        _load_batch(model, before, donor, batch, versions)
    if len(batches) > 1:
        # What shares memory with a tensor of a later batch may have been written over since it was proved.
        shared = shared_keys({step.out.key: base[step.out.key] for step in taken})
        for batch in batches:
            again = [step for step in batch if step.out.key in shared]
            _prove(model.state_dict(keep_vars=True), before, _values(donor, again))


def _batches(steps: Sequence[Step]) -> Iterator[list[Step]]:
    batch: list[Step] = []
    size = 0
    for step in steps:
        batch.append(step)
        size += step.out.nbytes
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _load_batch(
    model: Module,
    before: dict[str, Tensor],
    donor: Checkpoint,
    batch: Sequence[Step],
    versions: Mapping[str, int],
) -> None:
    values = _values(donor, batch)
    if versions:
        # Modules take values without a version for those of their oldest one, and may convert them.
        values._metadata = {prefix: {"version": version} for prefix, version in versions.items()}  # type: ignore[attr-defined]  # noqa: SLF001
    try:
        model.load_state_dict(values, strict=False)
    except Exception as error:  # the model's own hooks may raise anything
        called = "no " if isinstance(error, KeyError) else ""  # such an error says the key alone
        raise ModelError(f"load_state_dict refused: {called}{' '.join(str(error).split())}") from error
    _prove(model.state_dict(keep_vars=True), before, values)


def _values(donor: Checkpoint, steps: Sequence[Step]) -> OrderedDict[str, Tensor]:
    producer = Producer({"donor": donor})
    return OrderedDict((step.out.key, producer.tensor(step)) for step in steps)


def _prove(after: Mapping[str, Tensor], before: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for key, value in values.items():
        if _is_extra(key):
            continue
        if after[key] is not before[key]:
            raise ModelError(f"{quoted(key)} became another object while loading: optimizers still hold the old one")
        if not same_values(after[key].detach().to("cpu").resolve_conj().resolve_neg(), value):
            raise ModelError(
                f"{quoted(key)} does not have the checkpoint's value after loading",
                hint="another key that shares its memory was loaded over it, or a hook of the model changed it",
            )


def _is_extra(key: str) -> bool:
    """Return whether a module makes this entry itself, and takes it as it likes."""
    return key.rpartition(".")[2] == "_extra_state"


def _written_through(before: Snapshot, loaded: AbstractSet[str]) -> set[str]:
    """Return the names of all tensors that have memory in common with a loaded one, those themselves among them."""
    written = {id(before.tensors[name]) for name in loaded if name in before.tensors}
    names = {name for name, tensor in before.tensors.items() if id(tensor) in written}
    return names.union(*(tie for tie in before.ties if tie & names))


def _prove_rest(model: Module, before: Snapshot, loaded: AbstractSet[str]) -> list[str]:
    """Raise ``ModelError`` where anything but the loaded tensors changed; return the buffers that hooks made anew."""
    for name in before.replaced():
        raise ModelError(f"{quoted(name)} became another object while loading: optimizers still hold the old one")
    written = _written_through(before, loaded)
    changed = [name for name in before.tensors if name not in written and not before.is_unchanged(name)]
    persistent = model.state_dict(keep_vars=True).keys()
    for name in changed:
        if name in persistent:
            raise ModelError(
                f"{quoted(name)} was not to be loaded, and changed all the same",
                hint="a hook of the model wrote to it while loading",
            )
    for tie in before.ties ^ before.ties_now():
        first, second, *_ = sorted(tie)
        raise ModelError(f"{quoted(first)} and {quoted(second)} share memory otherwise than before loading")
    return changed


def _tied_findings(taken: Sequence[Step]) -> Iterator[Finding]:
    for step in taken:
        if step.rule.startswith(TIED):
            key = step.out.key
            yield Finding("load.tied", "note", key, f"{quoted(key)} is {step.rule}, which was loaded")


def _kept_findings(kept: Sequence[str], plan: Plan, shared: Sequence[str]) -> Iterator[Finding]:
    mismatched = {drop.wanted for drop in plan.dropped}
    for key in kept:
        if key in shared:
            yield Finding(
                "load.shared",
                "warning",
                key,
                f"{quoted(key)} was not loaded, but shares memory with a tensor that was, and changed with it",
            )
        elif key not in mismatched:
            yield Finding("load.missing", "warning", key, f"{quoted(key)} is not in the checkpoint and stays as it was")


def _dropped_findings(plan: Plan) -> Iterator[Finding]:
    for drop in plan.dropped:
        code, severity = ("load.shape", "warning") if drop.wanted else ("load.skipped", "note")
        yield Finding(code, severity, drop.key, f"{quoted(drop.key)} was not loaded: {drop.reason}")  # type: ignore[arg-type]


def _unproved_findings(before: Snapshot, derived: Sequence[str], loaded: AbstractSet[str]) -> Iterator[Finding]:
    for name in derived:
        message = f"{quoted(name)}, a buffer that no checkpoint has, was written anew by a hook of the model"
        yield Finding("load.derived", "note", name, message)
    for name in filter(_is_extra, loaded):
        yield Finding(
            "load.unproved", "note", name, f"{quoted(name)} was given to its module, which keeps it as it likes"
        )
    for name in before.not_copied:
        if name not in loaded:
            kind = before.infos[name].kind
            yield Finding(
                "load.unproved", "note", name, f"{quoted(name)} is a {kind} tensor, whose bits were not compared"
            )
