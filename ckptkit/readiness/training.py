"""Which parameter trains with which options: of live optimizers, or of a spec and a class as they would be built."""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.coverage import group_by_module
from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import first_line
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.build import build_planned_groups
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import ParamGroupsPlan, assign
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.validate import validate_param_groups
from ckptkit.readiness.model import ModuleTraining, TrainingGroup

__all__ = ["Training", "build_optimizers", "module_training", "plan_training", "unchanged_flags"]


@dataclass(frozen=True)
class Training:
    """Who trains how: the groups in order, the optimizers that have them, and the names that do not train."""

    groups: tuple[TrainingGroup, ...] = ()
    optimizers: tuple[Any, ...] = ()
    frozen: frozenset[str] = frozenset()
    findings: tuple[Finding, ...] = ()
    not_judged: tuple[str, ...] = ()
    plan: ParamGroupsPlan | None = None


@contextlib.contextmanager
def unchanged_flags(model: Module) -> Iterator[None]:
    """Give every parameter its ``requires_grad`` back at the end: building groups of a spec may freeze some."""
    flags = [(tensor, tensor.requires_grad) for tensor in model.parameters()]
    try:
        yield
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


def plan_training(model: Module, groups: SpecLike | None, optimizer: Any, schedulers: Any) -> Training:
    """Return what the groups and the optimizer mean for the model, with all that is wrong with them.

    Raises ``GroupsError`` where the spec cannot be read, or the optimizer is none.
    """
    frozen = frozenset(
        name for name, tensor in model.named_parameters(remove_duplicate=False) if not tensor.requires_grad
    )
    live = _live(optimizer)
    if live:
        found = validate_param_groups(model, live, schedulers=schedulers, spec=groups).findings
        unseen = () if schedulers is not None else ("schedulers: none given",)
        return Training(_rows(model, live), live, frozen, (*_spec_ignored(found), *found), unseen)
    not_judged: tuple[str, ...] = ("schedulers and optimizer state: no live optimizer given",)
    if groups is None and optimizer is None:
        return Training(frozen=frozen, not_judged=("param groups and their options: none given", *not_judged))
    if groups is not None:
        assignment = assign(parameter_table(model), groups)
        report, plan = assignment.report, assignment.plan
        if not report.ok:
            return Training(frozen=frozen, findings=report.findings, not_judged=not_judged)
        names = {name for parameter in plan.freeze for name in (parameter.name, *parameter.aliases)}
        frozen |= names
        built, faults = build_optimizers(model, plan, optimizer)
        findings = [*report.findings, *faults]
        if built:
            findings += validate_param_groups(model, built).findings
            return Training(_rows(model, built), built, frozen, tuple(findings), not_judged, plan)
        if not any(finding.severity == "error" for finding in findings):
            findings += validate_param_groups(model, build_planned_groups(model, plan)).findings
            not_judged = ("the optimizer: none given", *not_judged)
        rows = tuple(
            TrainingGroup(group.name, tuple(one.name for one in group.parameters), group.elements, group.options)
            for group in plan.groups
        )
        return Training(rows, (), frozen, tuple(findings), not_judged)
    built, faults = build_optimizers(model, None, optimizer)
    findings = [*faults, *(validate_param_groups(model, built).findings if built else ())]
    return Training(_rows(model, built), built, frozen, tuple(findings), not_judged)


def build_optimizers(
    model: Module, plan: ParamGroupsPlan | None, optimizer: Any
) -> tuple[tuple[Any, ...], Sequence[Finding]]:
    """Return new optimizers of the model, of the class given or of those that the spec names, and what went wrong."""
    kinds: list[tuple[str | None, type]] = []
    if plan is not None:
        named = [name for name in plan.optimizers if name is not None]
        kinds = [(name, _class(name)) for name in named]
        if optimizer is not None and len(named) < 2:
            kinds = [(named[0] if named else None, _class(optimizer))]
    elif optimizer is not None:
        kinds = [(None, _class(optimizer))]
    built: list[Any] = []
    for name, kind in kinds:
        given: Any = [pair for pair in model.named_parameters() if pair[1].requires_grad]
        if plan is not None:
            given = build_planned_groups(model, plan, optimizer=name)
        try:
            built.append(kind(given))
        except Exception as error:  # noqa: BLE001 - a class of anybody's says in its own way what it does not take
            message = f"{kind.__name__} does not take these groups: {first_line(error)}"
            return (), [Finding("preflight.optimizer", "error", "", message, "ckpt groups table shows them")]
    return tuple(built), ()


def _live(optimizer: Any) -> tuple[Any, ...]:
    if optimizer is None or isinstance(optimizer, str | type):
        return ()
    several = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    if not several or not all(hasattr(one, "param_groups") for one in several):
        raise GroupsError(
            f"the optimizer is a {type(optimizer).__name__}",
            hint="give a live optimizer, a list of them, a class, or the name of one of torch.optim",
        )
    return several


def _class(given: str | type) -> type:
    import torch

    if isinstance(given, type):
        return given
    known = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
    }
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
        raise GroupsError(
            f"torch.optim has no optimizer {quoted(given)}",
            hint=f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}",
        )
    return known[given]


def _rows(model: Module, optimizers: Sequence[Any]) -> tuple[TrainingGroup, ...]:
    names: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), name)
    rows = []
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            called = group.get("name", group.get("group_name", f"group {number}"))
            options = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
            members = tuple(names.get(id(tensor), "") for tensor in group["params"])
            elements = sum(tensor.numel() for tensor in group["params"])
            rows.append(TrainingGroup(str(called), members, elements, options, type(optimizer).__name__))
    return tuple(rows)


def _spec_ignored(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield one finding that counts those in which the validator compares the live groups with the spec."""
    counts = Counter(finding.code for finding in findings)
    moved, options = counts[codes.MOVED.name], counts[codes.OPTIONS.name]
    if moved or options:
        parts = [
            f"{plural(moved, 'parameter')} in another group" if moved else "",
            f"{plural(options, 'group')} with other options" if options else "",
        ]
        message = f"the optimizer does not follow the spec: {' and '.join(filter(None, parts))}"
        hint = "build the optimizer from build_param_groups(model, spec)"
        yield Finding("preflight.spec-ignored", "error", "", message, hint)


def module_training(model: Module, frozen: frozenset[str]) -> tuple[ModuleTraining, ...]:
    """Return how much of each module will train; one of which a part does is opened."""
    sizes: Mapping[str, int] = {name: tensor.numel() for name, tensor in model.named_parameters()}
    rows = []
    for module, names in group_by_module({name: name in frozen for name in sizes}):
        training = [name for name in names if name not in frozen]
        rows.append(
            ModuleTraining(
                module,
                len(training),
                len(names),
                sum(sizes[name] for name in training),
                sum(sizes[name] for name in names),
            )
        )
    return tuple(rows)


def idle_findings(training: Training, model: Module) -> Iterator[Finding]:
    """Yield where nothing trains at all, and which groups no step moves."""
    count = len(list(model.parameters()))
    if count and all(name in training.frozen for name, _ in model.named_parameters()):
        yield Finding(
            "preflight.nothing-trains",
            "error",
            "",
            f"all of {plural(count, 'parameter')} are frozen (requires_grad=False)",
            "unfreeze what shall train: requires_grad_(True)",
        )
    filled = [row for row in training.groups if row.names]
    # A warm-up may well begin at 0: torch's schedulers then keep the rate that they lead to.
    still = [row for row in filled if row.options.get("initial_lr", row.options.get("lr")) == 0]
    if still:
        every = len(still) == len(filled)
        which = "all groups" if every else f"group {', '.join(quoted(row.name) for row in still)}"
        yield Finding(
            "preflight.lr-zero",
            "error" if every else "warning",
            "",
            f"no step moves a parameter of {which}: lr is 0",
            "write the lr that was meant, or freeze what shall stay (freeze = true in a spec)",
        )
