"""One page before training: what loads, what stays at init, who trains at which rate, and whether a run can go on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ckptkit.comparison import StateDictDiff, diff_checkpoints
from ckptkit.core.findings import Finding
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.core.torch_types import Module
from ckptkit.errors import GroupsError
from ckptkit.param_groups.parse import SpecLike
from ckptkit.readiness.dry_step import Loss, run_dry_step
from ckptkit.readiness.init import UNLOADED, InspectedModel, check_init, check_values, compare_init
from ckptkit.readiness.model import (
    DryStep,
    Init,
    Kept,
    Memory,
    ModuleTraining,
    Preflight,
    Resume,
    StateMemory,
    TrainingGroup,
)
from ckptkit.readiness.resources import check_dtypes, estimate_memory
from ckptkit.readiness.training import (
    Training,
    build_optimizers,
    idle_findings,
    module_training,
    plan_training,
    unchanged_flags,
)
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import as_rules

__all__ = [
    "DryStep",
    "Init",
    "Kept",
    "Memory",
    "ModuleTraining",
    "Preflight",
    "Resume",
    "StateMemory",
    "TrainingGroup",
    "preflight",
]


def preflight(
    model: Module,
    *,
    init: StateDictLike | None = None,
    rules: Rules | list[str] | None = None,
    fresh: str | Sequence[str] = (),
    groups: SpecLike | None = None,
    optimizer: Any = None,
    schedulers: Any = None,
    resume: StateDictLike | None = None,
    resume_optimizer: Any = None,
    dry_step: Loss | None = None,
) -> Preflight:
    """Return one page on whether ``model`` is ready to train; what is not given is not judged, and said.

    ``init`` is the checkpoint that it begins with, or began with, its keys changed by ``rules``; ``fresh`` are patterns
    of keys that are meant to stay at init. ``groups`` is a param-group spec, ``optimizer`` a live optimizer, a list of
    them, a class, or the name of one of torch.optim; ``schedulers`` are those of a live optimizer. ``resume`` are the
    weights of a run that shall go on, ``resume_optimizer`` the state of its optimizer: a ``state_dict()``, or what
    ``open_optimizer`` gives. ``dry_step`` is called with a deep copy of the model and returns the loss of one batch, a
    tensor of one number: a backward pass and a step on the copy then show what gets a gradient and moves.

    Nothing of the caller's is changed. Values are read once where the model has any. Raises ``ModelError`` where
    ``model`` cannot be described, ``GroupsError`` where the spec or the optimizer cannot be read, ``RuleError`` for
    rules and patterns that fit nothing, and what reading the checkpoints raises.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise GroupsError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module",
            hint="a preflight is of the live model that will train",
        )
    state = as_checkpoint(model, "model")
    not_judged: list[str] = []
    with unchanged_flags(model):
        training = plan_training(model, groups, optimizer, schedulers)
        subject = InspectedModel(model, state, training.frozen)
        facts, findings = _begin(subject, init, rules, fresh, not_judged)
        findings += [*idle_findings(training, model), *training.findings]
        findings += check_dtypes(model, training.frozen, training.optimizers)
        not_judged += training.not_judged
        modules = module_training(model, training.frozen)
        trained = [tensor for name, tensor in model.named_parameters() if name not in training.frozen]
        memory = estimate_memory(model, trained, training.optimizers)
    going = None
    if resume is not None:
        from ckptkit.optimizer_state.forms import read_state
        from ckptkit.readiness.resume import check_resume

        found = None if resume_optimizer is None else read_state(resume_optimizer)
        resumed = _compared(subject, resume, None)
        going, said = check_resume(model, training, resumed, found)
        filled = {pair.key for pair in resumed.matched}
        findings = [one for one in findings if one.code not in UNLOADED or one.key not in filled] + said
        if found is None:
            not_judged.append("the optimizer state of the run: none given")
    else:
        not_judged.append("resuming: no run given")
    step = None
    if dry_step is None:
        not_judged.append("gradients: no dry step asked for")
    elif subject.on_meta:
        not_judged.append("gradients: the model is on the meta device")
    else:

        def stepping(twin: Module) -> Sequence[Any]:
            return _twins(model, twin, training, optimizer)

        step, said = run_dry_step(model, training.frozen, dry_step, stepping)
        findings += said
    not_judged.append("memory of activations, and of what a step needs for a moment")
    return Preflight(
        tuple(findings),
        GroupsError,
        facts,
        modules,
        training.groups,
        memory,
        going,
        step,
        tuple(not_judged),
    )


def _begin(
    subject: InspectedModel,
    init: StateDictLike | None,
    rules: Rules | list[str] | None,
    fresh: str | Sequence[str],
    not_judged: list[str],
) -> tuple[Init | None, list[Finding]]:
    if subject.on_meta:
        not_judged.append("values: the model is on the meta device")
    if init is None:
        not_judged.append("what loads: no init given")
        return None, list(check_values(subject, None))
    opened = as_checkpoint(init, "init")
    result = _compared(subject, opened, rules)
    facts = compare_init(subject, result, opened)
    return facts, [*check_init(subject, facts, result, fresh), *check_values(subject, facts)]


def _compared(subject: InspectedModel, found: StateDictLike, rules: Rules | list[str] | None) -> StateDictDiff:
    opened = as_checkpoint(found, "found")
    return diff_checkpoints(subject.state, opened, apply_rules(as_rules(rules), opened))


def _twins(model: Module, twin: Module, training: Training, optimizer: Any) -> Sequence[Any]:
    """Return optimizers of the copy: live ones copied with their state, others built as they were for the model."""
    if not training.optimizers or any(finding.severity == "error" for finding in training.findings):
        return ()
    if optimizer is None or isinstance(optimizer, str | type):
        return build_optimizers(twin, training.plan, optimizer)[0]
    memo: dict[int, Any] = dict(zip(map(id, model.parameters()), twin.parameters(), strict=True))
    return [_copied(one, memo) for one in training.optimizers]


def _copied(optimizer: Any, memo: dict[int, Any]) -> Any:
    # Optimizer's own way of being copied leaves out what its classes keep beside groups and state, as LBFGS does; the
    # step that a scheduler puts into the object steps the original, and stays with it.
    made = memo[id(optimizer)] = object.__new__(type(optimizer))
    made.__dict__.update(copy.deepcopy({key: value for key, value in vars(optimizer).items() if key != "step"}, memo))
    return made
