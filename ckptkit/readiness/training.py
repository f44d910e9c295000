"""Find which parameters train with which options, from live optimizers or from a spec."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.core.coverage import group_by_module
from ckptkit.core.files.live_prefix import LIVE_PREFIX
from ckptkit.core.findings import Finding
from ckptkit.core.text import first_line, nearest, plural, quoted
from ckptkit.core.torch_bridge import get_or_none, named_of
from ckptkit.core.torch_optim import initial_lr, options_of_kind
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes as group_codes
from ckptkit.param_groups.build import build_planned_groups
from ckptkit.param_groups.live import LiveGroups, LiveOptimizer, read_groups
from ckptkit.param_groups.parameters import read_live_model
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import ParamGroupsPlan, assign
from ckptkit.param_groups.properties import parameter_table
from ckptkit.param_groups.validate import check_param_groups
from ckptkit.param_groups.validate.options import read_number
from ckptkit.readiness import codes
from ckptkit.readiness.model import ModuleTraining, TrainingGroup

__all__ = [
    "OptimizerLike",
    "Training",
    "build_optimizers",
    "find_training",
    "idle_findings",
    "module_training",
    "restored_flags",
]

# A live optimizer, several of them, a class, or the name of a class of torch.optim.
OptimizerLike = Optimizer | Sequence[Optimizer] | type[Optimizer] | str
_NOT_SHOWN = options_of_kind("members") | {"name"}


@dataclass(frozen=True)
class Training:
    """The groups in order, their optimizers, and the names of the parameters that do not train.

    ``given`` has the optimizer objects that the caller passed, or that were built here. ``plan`` is the plan of the
    spec where they were built from a spec.
    """

    groups: tuple[TrainingGroup, ...] = ()
    optimizers: tuple[LiveOptimizer, ...] = ()
    given: tuple[Optimizer, ...] = ()
    frozen: frozenset[str] = frozenset()
    findings: tuple[Finding, ...] = ()
    not_judged: tuple[str, ...] = ()
    plan: ParamGroupsPlan | None = None


@contextlib.contextmanager
def restored_flags(model: Module) -> Iterator[None]:
    """Restore ``requires_grad`` of every parameter at the end, since building the groups of a spec may change it."""
    flags = [(tensor, tensor.requires_grad) for tensor in model.parameters()]
    try:
        yield
    finally:
        for tensor, flag in flags:
            if tensor.requires_grad != flag:
                tensor.requires_grad = flag  # a value can hide the method requires_grad_()


def find_training(model: Module, groups: SpecLike | None, optimizer: OptimizerLike | None, schedulers: Any) -> Training:
    """Return which parameters of ``model`` train with which options, and the findings about the spec and the optimizer.

    Raises ``GroupsError`` where the spec cannot be read, or the optimizer is of a wrong type.
    """
    frozen = frozenset(name for name, tensor in named_of(model, "parameters") if not tensor.requires_grad)
    given = _live_optimizers(optimizer)
    if given:
        not_judged: tuple[str, ...] = () if schedulers is not None else ("schedulers: none given",)
        # How fast a step runs does not decide whether the training is ready.
        speed = options_of_kind("speed")
        found = check_param_groups(
            model, _one_or_all(given), schedulers=schedulers, spec=groups, ignored=speed
        ).findings
        training = Training(frozen=frozen, findings=(*_spec_ignored(found), *found), not_judged=not_judged)
        return _with_optimizers(training, model, given)
    not_judged = ("schedulers and optimizer state: no live optimizer given",)
    if groups is not None:
        return _spec_training(model, groups, optimizer, Training(frozen=frozen, not_judged=not_judged))
    if optimizer is None:
        return Training(frozen=frozen, not_judged=("param groups and their options: none given", *not_judged))
    built, faults = build_optimizers(model, None, optimizer)
    findings = (*faults, *(check_param_groups(model, _one_or_all(built)).findings if built else ()))
    return _with_optimizers(Training(frozen=frozen, findings=findings, not_judged=not_judged), model, built)


def _one_or_all(given: tuple[Optimizer, ...]) -> Any:
    """Return a single optimizer itself, so that findings do not number it."""
    return given[0] if len(given) == 1 else given


def _with_optimizers(training: Training, model: Module, given: tuple[Optimizer, ...]) -> Training:
    if not given:
        return training
    live = read_groups(_one_or_all(given))
    return replace(training, groups=_training_groups(model, live), optimizers=live.optimizers, given=given)


def _spec_training(model: Module, groups: SpecLike, optimizer: OptimizerLike | None, unplanned: Training) -> Training:
    """Return the groups that a spec makes, with optimizers built from them where the class is known."""
    assignment = assign(parameter_table(model), groups)
    report, plan = assignment.report, assignment.plan
    if not report.ok:
        return replace(unplanned, findings=report.findings)
    frozen = unplanned.frozen | {name for parameter in plan.freeze for name in (parameter.name, *parameter.aliases)}
    built, faults = build_optimizers(model, plan, optimizer)
    findings = [*report.findings, *faults]
    if built:
        findings += check_param_groups(model, _one_or_all(built)).findings
        training = replace(unplanned, frozen=frozen, findings=tuple(findings), plan=plan)
        return _with_optimizers(training, model, built)
    not_judged = unplanned.not_judged
    if not any(finding.severity == "error" for finding in findings):
        findings += check_param_groups(model, build_planned_groups(model, plan)).findings
        not_judged = ("the optimizer: none given", *not_judged)
    planned = tuple(
        TrainingGroup(
            group.name, tuple(parameter.name for parameter in group.parameters), group.elements, group.options
        )
        for group in plan.groups
    )
    return Training(planned, frozen=frozen, findings=tuple(findings), not_judged=not_judged)


def build_optimizers(
    model: Module, plan: ParamGroupsPlan | None, optimizer: OptimizerLike | None
) -> tuple[tuple[Optimizer, ...], Sequence[Finding]]:
    """Return new optimizers of the given class or of the classes in the plan, and a finding where a class refuses."""
    kinds: list[tuple[str | None, type[Any]]] = []
    if plan is not None:
        named = [name for name in plan.optimizers if name is not None]
        kinds = [(name, _optimizer_class(name)) for name in named]
        if optimizer is not None and len(named) < 2:
            kinds = [(named[0] if named else None, _optimizer_class(optimizer))]
    elif optimizer is not None:
        kinds = [(None, _optimizer_class(optimizer))]
    built: list[Optimizer] = []
    for name, kind in kinds:
        params: list[Any] = [tensor for tensor in model.parameters() if tensor.requires_grad]
        if plan is not None:
            params = build_planned_groups(model, plan, optimizer=name)
        try:
            built.append(kind(params))
        except Exception as error:  # noqa: BLE001 - a class of the user may raise anything
            message = f"{kind.__name__} refuses these groups: {first_line(error)}"
            return (), [codes.OPTIMIZER.finding("", message, "ckpt groups table --model MODEL SPEC shows the groups")]
    return tuple(built), ()


def _live_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    if optimizer is None or isinstance(optimizer, str | type):
        return ()
    given = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    if not given or not all(get_or_none(item, "param_groups") is not None for item in given):
        raise GroupsError(
            f"the optimizer cannot be of type {type(optimizer).__name__}",
            hint="give a live optimizer, a list of them, a class, or the name of a class of torch.optim",
        )
    return given


def _optimizer_class(given: object) -> type[Any]:
    import torch

    if isinstance(given, type):
        return given
    known = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
    }
    name = str(given)
    if name not in known:
        near = nearest(name, known)
        if name.startswith(LIVE_PREFIX):
            hint = "give the name of a class, such as AdamW; in Python, preflight() takes a live optimizer too"
            raise GroupsError(f"{quoted(name)} is not the name of an optimizer of torch.optim", hint=hint)
        raise GroupsError(
            f"torch.optim has no optimizer {quoted(name)}",
            hint=f"did you mean {near}?" if near else f"it has {', '.join(sorted(known))}",
        )
    return known[name]


def _training_groups(model: Module, live: LiveGroups) -> tuple[TrainingGroup, ...]:
    live_model = read_live_model(model)
    groups = []
    for optimizer in live.optimizers:
        for number, group in enumerate(optimizer.groups):
            members = optimizer.members_of(group)
            parameters = [live_model.parameters.get(id(member.tensor)) for member in members]
            groups.append(
                TrainingGroup(
                    f"group {number}" if group.name is None else group.name,
                    tuple("" if parameter is None else parameter.name for parameter in parameters),
                    sum(math.prod(member.shape) for member in members if member.shape is not None),
                    {key: value for key, value in group.options.items() if key not in _NOT_SHOWN},
                    optimizer.class_name,
                )
            )
    return tuple(groups)


def _spec_ignored(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield one finding that counts the differences of the live groups from the spec among ``findings``."""
    counts = Counter(finding.code for finding in findings if finding.severity != "note")
    moved, options = counts[group_codes.MOVED.name], counts[group_codes.OPTIONS.name]
    if moved or options:
        parts = [
            f"{plural(moved, 'parameter')} in another group" if moved else "",
            f"{plural(options, 'group')} with other options" if options else "",
        ]
        message = f"the optimizer does not follow the spec: {' and '.join(filter(None, parts))}"
        yield codes.SPEC_IGNORED.finding("", message, "build the optimizer from build_param_groups(model, spec)")


def module_training(model: Module, frozen: frozenset[str]) -> tuple[ModuleTraining, ...]:
    """Return how much of each module trains; a module that trains in part has a row for each of its parts."""
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
    """Yield a finding where every parameter is frozen, and a finding for the groups with lr = 0."""
    names = [name for name, _ in model.named_parameters()]
    if names and all(name in training.frozen for name in names):
        message = f"all of {plural(len(names), 'parameter')} are frozen (requires_grad=False)"
        yield codes.NOTHING_TRAINS.finding("", message, "unfreeze the parameters that must train: requires_grad_(True)")
    filled = [group for group in training.groups if group.names]
    # A warm-up may begin at lr = 0; its final rate is then stored as initial_lr.
    still = [group for group in filled if read_number(initial_lr(group.options)) == 0]
    if still:
        is_every = len(still) == len(filled)
        groups = "all groups" if is_every else f"group {', '.join(quoted(group.name) for group in still)}"
        yield codes.LR_ZERO.finding(
            "",
            f"no step changes a parameter of {groups}: lr is 0",
            "set the lr that you want, or freeze these parameters (freeze = true in a spec)",
            severity="error" if is_every else "warning",
        )
