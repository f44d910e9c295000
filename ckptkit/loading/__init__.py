"""``load_into``: load a checkpoint into a live model, and check the result."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ckptkit.comparison import diff
from ckptkit.core.cast_losses import CastLoss, describe_overflow, describe_small_losses, wider_dtype
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage import ModuleCoverage, coverage_by_module
from ckptkit.core.files import same_bytes
from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import html_table, kind_of, plural, printable, quoted
from ckptkit.core.ties import shared_keys
from ckptkit.core.torch_bridge import as_checkpoint, same_values
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import ModelError, PlanError
from ckptkit.formats.codes import unread_findings
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.loading import codes
from ckptkit.loading.requirements import Requirements, refuse_unmet
from ckptkit.loading.snapshot import Snapshot, named_tensors
from ckptkit.plans.merge import plan_merge
from ckptkit.plans.plan import Plan, Step
from ckptkit.plans.policies import UNEXPECTED_ACTIONS, OnMismatch, OnMissing, OnUnexpected, parse_policy
from ckptkit.plans.produce import Producer
from ckptkit.rules.model import RulesLike

__all__ = ["LoadReport", "load_into"]

_BATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class LoadReport(Report):
    """The result of ``load_into``: the keys of the model that were loaded, and the findings.

    ``kept`` names the keys that were not loaded; their values change only with a loaded tensor in the same memory.
    ``coverage`` is the share of the model's elements that were loaded, between 0 and 1. ``modules`` has the coverage of
    each module; a module that was loaded in part is divided into its children.
    """

    loaded: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    coverage: float = 0.0
    modules: tuple[ModuleCoverage, ...] = ()

    def __str__(self) -> str:
        """Return one line with the numbers of tensors and elements that were loaded."""
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
    checkpoint: CheckpointLike,
    rules: RulesLike | None = None,
    *,
    on_missing: OnMissing = "keep",
    on_unexpected: OnUnexpected = "skip",
    on_mismatch: OnMismatch = "error",
    skip_unread: bool = False,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    allow_overflow: bool = False,
) -> LoadReport:
    """Load the tensors of ``checkpoint`` that match into ``model``, in place, and check that nothing else changed.

    ``checkpoint`` is a path, a Checkpoint, a Module, or a mapping of tensors; what is opened here is closed at the end.
    ``rules``, ``on_missing``, ``on_unexpected``, ``on_mismatch`` and ``skip_unread`` mean the same as in
    ``plan_merge``, but ``on_unexpected="add"`` raises. ``require`` is a pattern or a list of patterns: every matching
    key of the model's state_dict must be loaded. ``min_coverage``, between 0 and 1, is the least share of the model's
    elements that must be loaded. torch's own ``load_state_dict`` copies the values, so the hooks of the model run.

    Values are cast to the dtype of the model as torch casts them. Values that would become inf are refused before
    anything is copied; with ``allow_overflow`` they are loaded, and a finding has their count. A finding also counts
    the values that become 0.

    Afterwards every loaded tensor has the value of the checkpoint, and every other tensor has the same bits as before.
    All parameters and buffers are the same objects and share the same memory as before. If loading fails or is
    interrupted, the model is restored from a copy. A copy of more than 256 MB is stored in a temporary file.

    Raises ``PlanError`` where a policy is ``error``, and where a cast makes inf of finite values. Raises ``RuleError``
    where a pattern matches no key. Raises ``ModelError`` where ``require`` or ``min_coverage`` is not met, before
    anything is copied. ``ModelError`` is also raised where a tensor of the model is on the meta device, and where the
    check of the result fails.
    """
    if "add" in parse_policy("on_unexpected", on_unexpected, UNEXPECTED_ACTIONS).actions:
        raise ModelError(
            "a model cannot get keys that it does not have", hint='on_unexpected must be "skip" or "error"'
        )
    if not hasattr(model, "named_parameters"):
        raise ModelError(f"the model is {kind_of(model)}, not a torch.nn.Module", hint="pass the model that will train")
    base = as_checkpoint(model, "model")
    requirements = Requirements(require, min_coverage)
    with opened(checkpoint, "checkpoint") as donor:
        plan = plan_merge(
            base,
            donor,
            rules,
            on_missing=on_missing,
            on_unexpected=on_unexpected,
            on_mismatch=on_mismatch,
            skip_unread=skip_unread,
        )
        return _load_planned(
            model, base, donor, plan, rules=rules, requirements=requirements, allow_overflow=allow_overflow
        )


def _load_planned(
    model: Module,
    base: Checkpoint,
    donor: Checkpoint,
    plan: Plan,
    *,
    rules: RulesLike | None,
    requirements: Requirements,
    allow_overflow: bool,
) -> LoadReport:
    from_donor = [step for step in plan.steps if step.sources[0].role == "donor"]
    loaded = {step.out.key for step in from_donor}
    refuse_unmet(requirements, base, loaded, plan, lambda: diff(base, donor, rules))
    _refuse_meta(model, base)
    producer = Producer({"donor": donor})
    _refuse_unloadable(model, base, producer, from_donor)
    if not allow_overflow:
        _refuse_overflow(producer, from_donor, donor.path)
    with Snapshot(model) as before:
        try:
            _load(model, base, producer, from_donor)
            rewritten = _check_not_loaded(model, before, loaded)
        except BaseException as error:
            failed = before.restore()
            if failed:
                raise ModelError(f"{quoted(failed[0])} could not be restored after the error: {error}") from error
            raise
        shared = [name for name in _sharing_memory(before, loaded) if name not in loaded]
    kept = [key for key in base if key not in loaded]
    filled = sum(info.elements for key, info in base.items() if key in loaded)
    elements = sum(info.elements for info in base.values())
    findings = (
        *unread_findings(donor.warnings),
        *_kept_findings(kept, plan, shared),
        *_tied_findings(from_donor),
        *_loss_findings([producer.losses[key] for key in base if key in producer.losses]),
        *_dropped_findings(plan),
        *_unverified_findings(before, rewritten, loaded),
    )
    findings = tuple(dict.fromkeys(findings))  # both inputs drop an extra state, with equal findings
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
                f"{quoted(name)} is on the meta device and cannot hold a value"
                if name in base
                else f"{quoted(name)} is on the meta device, and no checkpoint has a buffer that is not persistent",
                hint="call model.to_empty(device=...), or build the model on a real device"
                if name in base
                else "build the model on a real device",
            )


def _refuse_unloadable(model: Module, base: Checkpoint, producer: Producer, steps: Sequence[Step]) -> None:
    """Raise ``ModelError`` for a new value of a tensor that ``state_dict()`` makes and ``load_state_dict`` cannot set.

    The modules of bitsandbytes in four bits have such tensors: their codes would be loaded without their scales.
    """
    named = named_tensors(model)
    for step in steps:
        key = step.out.key
        if key in named or _is_extra_state(key) or _has_loader(model, key):
            continue
        if base[key].kind != "dense" or not same_bytes(base.payload(key), producer.payload(step)):
            raise ModelError(
                f"{quoted(key)} is neither a parameter nor a buffer of the model, and load_state_dict does not set it",
                hint="load it with the library of the module, such as from_pretrained of transformers",
            )


def _has_loader(model: Module, key: str) -> bool:
    """Return whether a module on the path of ``key`` loads its tensors with code of its own."""
    import torch

    default = torch.nn.Module._load_from_state_dict  # noqa: SLF001 - modules override it to load further tensors
    module: Module | None = model
    for name in key.split("."):
        if module is None:
            break
        if module._load_state_dict_pre_hooks or type(module)._load_from_state_dict is not default:  # noqa: SLF001
            return True
        module = module._modules.get(name)  # noqa: SLF001
    return False


def _refuse_overflow(producer: Producer, steps: Sequence[Step], path: str) -> None:
    """Raise ``PlanError`` where a cast to the dtype of the model would make inf of finite values."""
    overflowed = [loss for step in steps if (loss := producer.loss(step)) is not None and loss.overflowed]
    if overflowed:
        wider = wider_dtype(overflowed)
        way = f"a model of {wider} holds them; " if wider else ""
        raise PlanError(describe_overflow(overflowed), hint=f"{way}allow_overflow=True loads them anyway", path=path)


def _load(model: Module, base: Checkpoint, producer: Producer, steps: Sequence[Step]) -> None:
    before = model.state_dict(keep_vars=True)
    versions = {} if any(step.out.key != step.sources[0].key for step in steps) else producer.roles["donor"].versions
    batches = list(_batches(steps))
    for batch in batches:
        _load_batch(model, before, producer, batch, versions)
    if len(batches) > 1:
        # A later batch may have overwritten a tensor of an earlier batch that shares memory with a later tensor.
        shared = shared_keys({step.out.key: base[step.out.key] for step in steps})
        for batch in batches:
            again = [step for step in batch if step.out.key in shared]
            _check_loaded(model, before, _values(producer, again))


def _batches(steps: Sequence[Step]) -> Iterator[list[Step]]:
    batch: list[Step] = []
    size = 0
    for step in steps:
        batch.append(step)
        size += step.out.nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _load_batch(
    model: Module,
    before: dict[str, Tensor],
    producer: Producer,
    batch: Sequence[Step],
    versions: Mapping[str, int],
) -> None:
    values = _values(producer, batch)
    if versions:
        # A module converts values that have no version as if its oldest version had saved them.
        values._metadata = {prefix: {"version": version} for prefix, version in versions.items()}  # type: ignore[attr-defined]  # noqa: SLF001
    try:
        model.load_state_dict(values, strict=False)
    except Exception as error:  # hooks of the model can raise anything
        message = " ".join(str(error).split())
        if isinstance(error, KeyError):  # its text is the key alone
            message = f"there is no key {message}"
        raise ModelError(f"load_state_dict failed: {message}") from error
    _check_loaded(model, before, values)


def _values(producer: Producer, steps: Sequence[Step]) -> OrderedDict[str, Tensor]:
    return OrderedDict((step.out.key, producer.tensor(step)) for step in steps)


def _check_loaded(model: Module, before: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    after, named = model.state_dict(keep_vars=True), named_tensors(model)
    for key, value in values.items():
        if _is_extra_state(key):
            continue
        # state_dict() of a quantised module makes some tensors anew each time.
        if key in named and after[key] is not before[key]:
            raise ModelError(f"{quoted(key)} was replaced while loading, and optimizers still hold the old tensor")
        if not same_values(after[key].detach().to("cpu").resolve_conj().resolve_neg(), value):
            raise ModelError(
                f"{quoted(key)} does not have the checkpoint's value after loading",
                hint="a key that shares its memory was loaded after it, or a hook of the model changed it"
                if key in named
                else "only state_dict() of its module makes this tensor: load it with the library of the module",
            )


def _is_extra_state(key: str) -> bool:
    """Return whether the key is the extra state of a module, which only the module can interpret."""
    return key.rpartition(".")[2] == "_extra_state"


def _sharing_memory(before: Snapshot, loaded: AbstractSet[str]) -> set[str]:
    """Return the names of the loaded tensors and of all tensors that share memory with one of them."""
    written = {id(before.tensors[name]) for name in loaded if name in before.tensors}
    names = {name for name, tensor in before.tensors.items() if id(tensor) in written}
    return names.union(*(tie for tie in before.ties if tie & names))


def _check_not_loaded(model: Module, before: Snapshot, loaded: AbstractSet[str]) -> list[str]:
    """Raise ``ModelError`` where anything but the loaded tensors changed; return the buffers that hooks rewrote.

    Only buffers that are not persistent may be rewritten.
    """
    for name in before.replaced():
        raise ModelError(f"{quoted(name)} was replaced while loading, and optimizers still hold the old tensor")
    written = _sharing_memory(before, loaded)
    changed = [name for name in before.tensors if name not in written and not before.is_unchanged(name)]
    persistent = model.state_dict(keep_vars=True).keys()
    for name in changed:
        if name in persistent:
            raise ModelError(
                f"{quoted(name)} was not loaded, but it changed",
                hint="a hook of the model wrote to it while loading",
            )
    for tie in before.ties ^ before.ties_now():
        first, second, *_ = sorted(tie)
        raise ModelError(f"loading changed whether {quoted(first)} and {quoted(second)} share memory")
    return changed


def _tied_findings(steps: Sequence[Step]) -> Iterator[Finding]:
    for step in steps:
        if step.tied_to is not None:
            key = step.out.key
            yield codes.TIED.finding(key, f"{quoted(key)} is tied to {quoted(step.tied_to)}, which was loaded")


def _loss_findings(losses: Iterable[CastLoss]) -> Iterator[Finding]:
    for loss in losses:
        if loss.overflowed:
            yield codes.OVERFLOW.finding(loss.key, describe_overflow([loss]))
        for sentence in describe_small_losses([loss]):
            yield codes.UNDERFLOW.finding(loss.key, sentence)


def _kept_findings(kept: Sequence[str], plan: Plan, shared: Sequence[str]) -> Iterator[Finding]:
    mismatched = {drop.wanted for drop in plan.dropped}
    for key in kept:
        if key in shared:
            yield codes.SHARED.finding(
                key, f"{quoted(key)} was not loaded, but it shares memory with a loaded tensor and changed with it"
            )
        elif key not in mismatched:
            yield codes.MISSING.finding(key, f"{quoted(key)} is not in the checkpoint and keeps its value")


def _dropped_findings(plan: Plan) -> Iterator[Finding]:
    for drop in plan.dropped:
        code = codes.SHAPE if drop.wanted else codes.SKIPPED
        yield code.finding(drop.key, f"{quoted(drop.key)} was not loaded: {drop.reason}")


def _unverified_findings(before: Snapshot, rewritten: Sequence[str], loaded: AbstractSet[str]) -> Iterator[Finding]:
    for name in rewritten:
        message = f"a hook of the model rewrote {quoted(name)}, a buffer that is in no checkpoint"
        yield codes.DERIVED.finding(name, message)
    for name in filter(_is_extra_state, loaded):
        message = f"{quoted(name)} was passed to its module; whether the module kept it was not checked"
        yield codes.UNPROVED.finding(name, message)
    for name in before.not_copied:
        if name not in loaded:
            kind = before.infos[name].kind
            yield codes.UNPROVED.finding(name, f"{quoted(name)} is a {kind} tensor, so its bits were not compared")
