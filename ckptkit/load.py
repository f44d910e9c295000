"""Loading a checkpoint into a live model, and proving that it arrived."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptkit.errors import ModelError
from ckptkit.findings import Finding, Report
from ckptkit.making import Maker
from ckptkit.merging import TIED, plan_merge
from ckptkit.plan import Plan, Step
from ckptkit.rules import Rules
from ckptkit.sharing import shared_keys
from ckptkit.tensors import Checkpoint
from ckptkit.text import plural, quoted
from ckptkit.torch_bridge import StateDictLike, as_checkpoint, flat_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["LoadReport", "load_into"]

_BATCH = 256 << 20


@dataclass(frozen=True)
class LoadReport(Report):
    """What was loaded, by key of the model and through ties; ``kept`` stays as the model had it."""

    loaded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    coverage: float = 0.0

    def __str__(self) -> str:
        """Say in one line what happened."""
        return (
            f"loaded {len(self.loaded)} of {plural(len(self.loaded) + len(self.kept), 'tensor')}, "
            f"{100 * self.coverage:.1f} % of the elements; kept {len(self.kept)} as they were"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>{super()._repr_html_()}"


def load_into(
    model: torch.nn.Module,
    checkpoint: StateDictLike,
    rules: Rules | list[str] | None = None,
    *,
    on_missing: str = "keep",
    on_unexpected: str = "skip",
    on_mismatch: str = "error",
) -> LoadReport:
    """Load what fits into ``model``, in place, and prove by identity and value that it is there.

    ``rules`` and the policies are those of ``plan_merge`` (``on_unexpected="add"`` has no meaning here and
    is refused). torch's own ``load_state_dict`` does the copying, so the model's hooks run and values are
    cast as torch casts. Raises ``PlanError`` where a policy says so, and ``ModelError`` where a tensor of
    the model is on the meta device or does not have the checkpoint's value afterwards.
    """
    if on_unexpected == "add":
        raise ModelError(
            "a model cannot take over keys that it does not have", hint='on_unexpected is "skip" or "error"'
        )
    base, donor = as_checkpoint(model, "model"), as_checkpoint(checkpoint, "checkpoint")
    plan = plan_merge(base, donor, rules, on_missing=on_missing, on_unexpected=on_unexpected, on_mismatch=on_mismatch)
    taken = [step for step in plan.steps if step.sources[0].role == "donor"]
    before = model.state_dict(keep_vars=True)
    _refuse_meta(before, taken)
    versions = {} if any(step.out.key != step.sources[0].key for step in taken) else donor.versions
    batches = list(_batches(taken))
    for batch in batches:
        _load_batch(model, before, donor, batch, versions)
    loaded = {step.out.key for step in taken}
    if len(batches) > 1:
        # What shares memory with a tensor of a later batch may have been written over since it was proved.
        shared = shared_keys({key: base[key] for key in loaded})
        for batch in batches:
            again = [step for step in batch if step.out.key in shared]
            _prove(model.state_dict(keep_vars=True), before, _values(donor, again))
    kept = [key for key in base if key not in loaded]
    elements = sum(info.elements for info in base.values())
    filled = sum(info.elements for key, info in base.items() if key in loaded)
    findings = (*_kept_findings(kept, plan), *_tied_findings(taken), *_dropped_findings(plan))
    return LoadReport(
        findings,
        ModelError,
        loaded=tuple(key for key in base if key in loaded),
        kept=tuple(kept),
        coverage=filled / elements if elements else 1.0,
    )


def _refuse_meta(state: dict[str, torch.Tensor], steps: Sequence[Step]) -> None:
    for step in steps:
        if state[step.out.key].is_meta:
            raise ModelError(
                f"{quoted(step.out.key)} is on the meta device and can hold no value",
                hint="model.to_empty(device=...) gives it memory, or build the model on a real device",
            )


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
    model: torch.nn.Module,
    before: dict[str, torch.Tensor],
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
        raise ModelError(f"load_state_dict refused: {' '.join(str(error).split())}") from error
    _prove(model.state_dict(keep_vars=True), before, values)


def _values(donor: Checkpoint, steps: Sequence[Step]) -> OrderedDict[str, torch.Tensor]:
    maker = Maker({"donor": donor})
    return OrderedDict((step.out.key, maker.tensor(step)) for step in steps)


def _prove(
    after: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]
) -> None:
    for key, value in values.items():
        if after[key] is not before[key]:
            raise ModelError(f"{quoted(key)} became another object while loading: optimizers still hold the old one")
        if not _same(after[key].detach().to("cpu").resolve_conj().resolve_neg(), value):
            raise ModelError(
                f"{quoted(key)} does not have the checkpoint's value after loading",
                hint="another key that shares its memory was loaded over it, or a hook of the model changed it",
            )


def _same(there: torch.Tensor, value: torch.Tensor) -> bool:
    import torch

    wanted = value.to(there.dtype)
    found, expected = (
        flat_bytes(there),
        flat_bytes(wanted),
    )  # not numbers: NaN is not equal to itself, and -0.0 is to 0.0
    if torch.equal(found, expected):
        return True
    if there.dtype == value.dtype or not (there.is_floating_point() or there.is_complex()):
        return False
    # Which bits a NaN gets by a cast depends on the memory layout: torch has several kernels for it.
    differ = (found != expected).reshape(there.numel(), -1).any(dim=1)
    wide = torch.complex128 if there.is_complex() else torch.float64
    return all(bool(tensor.reshape(-1).to(wide)[differ].isnan().all()) for tensor in (there, wanted))


def _tied_findings(taken: Sequence[Step]) -> Iterator[Finding]:
    for step in taken:
        if step.rule.startswith(TIED):
            key = step.out.key
            yield Finding("load.tied", "note", key, f"{quoted(key)} is {step.rule}, which was loaded")


def _kept_findings(kept: Sequence[str], plan: Plan) -> Iterator[Finding]:
    mismatched = {drop.wanted for drop in plan.dropped}
    for key in kept:
        if key not in mismatched:
            yield Finding("load.missing", "warning", key, f"{quoted(key)} is not in the checkpoint and stays as it was")


def _dropped_findings(plan: Plan) -> Iterator[Finding]:
    for drop in plan.dropped:
        code, severity = ("load.shape", "warning") if drop.wanted else ("load.skipped", "note")
        yield Finding(code, severity, drop.key, f"{quoted(drop.key)} was not loaded: {drop.reason}")  # type: ignore[arg-type]
