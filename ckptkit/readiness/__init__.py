"""Check a run before training: which tensors load, which parameters train at which lr, and whether it can resume."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

from ckptkit.comparison import diff_checkpoints
from ckptkit.core.arguments import refuse
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage.requirements import Requirements, parse_requirements
from ckptkit.core.findings import Finding
from ckptkit.core.findings.ignoring import IgnoreLike, ignore_findings, parse_ignore
from ckptkit.core.text import listed
from ckptkit.core.torch_bridge import as_checkpoint, shape_or_none
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError
from ckptkit.formats.codes import unread_findings
from ckptkit.inputs import CheckpointLike, opened, opened_optimizer, rules_for
from ckptkit.param_groups import codes as group_codes
from ckptkit.param_groups.parameters import bare_name, read_live_model
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.readiness import codes
from ckptkit.readiness.at_init import check_untrained, find_untrained_in_init
from ckptkit.readiness.dry_step import LossFunction, run_dry_step
from ckptkit.readiness.init import (
    UNLOADED,
    InspectedModel,
    check_init,
    check_own_code,
    check_quantized,
    check_requirements,
    check_values,
    compare_init,
    find_quantized_problems,
    fresh_patterns,
)
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
    OptimizerLike,
    Training,
    build_optimizers,
    find_training,
    idle_findings,
    module_training,
    restored_flags,
)
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules, RulesLike
from ckptkit.statistics.state_dict_stats import StateDictStats

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
    init: CheckpointLike | None = None,
    rules: RulesLike | None = None,
    fresh: str | Sequence[str] = (),
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    initial: StateDictStats | None = None,
    groups: SpecLike | None = None,
    optimizer: OptimizerLike | None = None,
    schedulers: Any = None,
    resume: CheckpointLike | None = None,
    resume_optimizer: Any = None,
    dry_step: LossFunction | None = None,
    ignore: IgnoreLike = (),
) -> Preflight:
    """Return a report that says whether ``model`` is ready to train.

    Only ``model`` is required. Without its argument, a check is skipped, and ``not_judged`` names the check.

    - ``init``: the checkpoint that the model starts from: a path, a Checkpoint, a Module or a mapping of tensors.
      ``fresh`` are patterns of the keys that must keep their initial values, such as the keys of a new head.
      ``require`` are patterns of the keys that ``init`` must fill, and ``min_coverage`` is the least share of the
      elements, between 0 and 1. A requirement that is not met is an error of the report. ``initial`` are the
      ``stats(model)`` from before ``init`` was loaded: with them, tensors that ``init`` has as a new model has them
      are found, also where the model has an initialisation of its own.
    - ``rules``, or the path of a rule file, rename the keys of ``init``. Without ``init``, they rename the keys of
      ``resume``.
    - ``groups``: a param-group spec, or the path of its file. ``optimizer``: a live optimizer, a list of them, a class,
      or the name of a class of torch.optim. ``schedulers``: the schedulers of a live optimizer.
    - ``resume``: the weights of a run to resume, as for ``init``. ``resume_optimizer``: its optimizer state, as a path,
      or as ``state_dict()`` or ``open_optimizer`` return it.
    - ``dry_step``: a function that takes a deep copy of the model and returns the loss of one batch, a tensor of one
      number. A backward pass and a step on the copy show which parameters get a gradient and change.
    - ``ignore``: expected findings, as ``CODE`` or ``CODE:KEY-PATTERN``. The entries of the spec count too. The verdict
      follows what remains.

    The arguments are not changed, and each tensor is read once. What is opened here is closed at the end. Raises:

    - ``ModelError`` where ``model`` cannot be described;
    - ``GroupsError`` where the spec or the optimizer cannot be read;
    - ``RuleError`` for rules and patterns that match nothing, and for an entry of ``ignore`` with an unknown code;
    - any error that reading a checkpoint raises.

    Example:
        >>> from fixtures.lenet import build
        >>> weights, spec = "fixtures/lenet_10class.pth", "fixtures/groups.toml"
        >>> report = preflight(build(), init=weights, groups=spec, optimizer="SGD")
        >>> [group.name for group in report.groups]
        ['head', 'base']
    """
    requirements = parse_requirements(require, min_coverage)
    if requirements and init is None:
        refuse(None, "init", "given, because require and min_coverage are about what it fills")
    read_live_model(model)  # refuses what is not a model, or cannot list its parameters
    with contextlib.ExitStack() as stack:
        return _preflight(
            model,
            init=None if init is None else stack.enter_context(opened(init, "init")),
            rules=rules,
            fresh=fresh,
            requirements=requirements,
            initial=initial,
            groups=groups,
            optimizer=optimizer,
            schedulers=schedulers,
            resume=None if resume is None else stack.enter_context(opened(resume, "found")),
            resume_optimizer=stack.enter_context(opened_optimizer(resume_optimizer)),
            dry_step=dry_step,
            ignore=ignore,
        )


def _preflight(
    model: Module,
    *,
    init: Checkpoint | None,
    rules: RulesLike | None,
    fresh: str | Sequence[str],
    requirements: Requirements,
    initial: StateDictStats | None,
    groups: SpecLike | None,
    optimizer: OptimizerLike | None,
    schedulers: Any,
    resume: Checkpoint | None,
    resume_optimizer: Any,
    dry_step: LossFunction | None,
    ignore: IgnoreLike,
) -> Preflight:
    entries = parse_ignore(ignore)
    if groups is not None:
        groups = parse_spec(groups)
        entries += parse_ignore(groups.ignore)
    lazy = [name for name, tensor in model.named_parameters() if shape_or_none(tensor) is None]
    if lazy:
        report = _preflight_lazy(model, lazy, groups, optimizer, dry_step)
        return ignore_findings(report, entries, bare_name=bare_name)
    state = as_checkpoint(model, "model")
    not_judged: list[str] = []
    with restored_flags(model):
        training = find_training(model, groups, optimizer, schedulers)
        inspected = InspectedModel(model, state, training.frozen)
        init_section, findings = _check_init(
            inspected, init, rules, fresh, requirements, initial=initial, not_judged=not_judged
        )
        findings += [*idle_findings(training, model), *training.findings]
        findings += check_dtypes(model, training.frozen, training.optimizers)
        not_judged += training.not_judged
        modules = module_training(model, training.frozen)
        trained = [tensor for name, tensor in model.named_parameters() if name not in training.frozen]
        memory = estimate_memory(model, trained, training.optimizers)
    resume_section = None
    if resume is not None:
        from ckptkit.optimizer_state.forms import read_state
        from ckptkit.readiness.resume import check_resume

        saved_state = None if resume_optimizer is None else read_state(resume_optimizer)
        key_map = apply_rules(rules_for(rules, resume) if init is None else Rules(), resume, inspected.state)
        resumed = diff_checkpoints(inspected.state, resume, key_map)
        problems = find_quantized_problems(inspected.state, resume, key_map, "run")
        resume_section, more = check_resume(model, training, resumed, saved_state, schedulers)
        filled = {pair.key for pair in resumed.matched}
        findings = [finding for finding in findings if finding.code not in UNLOADED or finding.key not in filled]
        findings += [*check_quantized(problems, codes.RESUME_QUANTIZED), *more]
        if saved_state is None:
            not_judged.append("the optimizer state of the run: none given")
    else:
        not_judged.append("resuming: no run given")
    step = None
    if dry_step is None:
        not_judged.append("gradients: no dry_step given")
    elif inspected.on_meta:
        not_judged.append("gradients: the model is on the meta device")
    else:

        def optimizers_of(model_copy: Module) -> Sequence[Optimizer]:
            return _optimizers_of_copy(model, model_copy, training, optimizer)

        step, more, varied = run_dry_step(model, training.frozen, dry_step, optimizers_of)
        # What the dry step showed replaces what the model alone suggests.
        findings = [finding for finding in findings if not _is_answered(finding, varied)]
        findings += more
    not_judged.append("memory of activations, and temporary memory of a step")
    report = Preflight(
        tuple(findings),
        GroupsError,
        init_section,
        modules,
        training.groups,
        memory,
        resume_section,
        step,
        tuple(not_judged),
    )
    return ignore_findings(report, entries, bare_name=bare_name)


def _preflight_lazy(
    model: Module,
    lazy: Sequence[str],
    groups: SpecLike | None,
    optimizer: OptimizerLike | None,
    dry_step: LossFunction | None,
) -> Preflight:
    """Return the report on a model with parameters that have no shape yet: only a dry step can say more."""
    not_judged = ["loading, values, dtypes and memory: the first forward pass has not made all parameters"]
    first = group_codes.LAZY.finding(
        lazy[0],
        f"the first forward pass will make {listed(lazy, 4)}",
        "run the model once on a sample batch, and then run this check and build the optimizer",
        severity="warning",
    )
    findings = [first]
    training = Training(frozen=frozenset(name for name, tensor in model.named_parameters() if not tensor.requires_grad))
    if groups is None:
        with restored_flags(model):
            training = find_training(model, None, optimizer, None)
        findings += [finding for finding in training.findings if finding.code != first.code]
    else:
        not_judged.append("param groups: a spec needs the shapes of the parameters")
    step = None
    if dry_step is not None:
        step, more, _ = run_dry_step(
            model, training.frozen, dry_step, lambda made: _optimizers_of_copy(model, made, training, optimizer)
        )
        findings += more
    return Preflight(tuple(findings), GroupsError, groups=(), step=step, not_judged=tuple(not_judged))


def _is_answered(finding: Finding, varied: frozenset[str]) -> bool:
    """Return whether a dry step answers a finding: it shows which statistics change, and what trains from one value."""
    is_constant = finding.code in {codes.ZERO.name, codes.CONSTANT.name}
    return finding.code == group_codes.FROZEN_STATISTICS.name or (is_constant and finding.key in varied)


def _check_init(
    inspected: InspectedModel,
    init: Checkpoint | None,
    rules: RulesLike | None,
    fresh: str | Sequence[str],
    requirements: Requirements,
    *,
    initial: StateDictStats | None,
    not_judged: list[str],
) -> tuple[Init | None, list[Finding]]:
    if inspected.on_meta:
        not_judged.append("values: the model is on the meta device")
    if init is None:
        not_judged.append("loading: no init given")
        return None, list(check_values(inspected, None))
    key_map = apply_rules(rules_for(rules, init), init, inspected.state)
    result = diff_checkpoints(inspected.state, init, key_map)
    problems = find_quantized_problems(inspected.state, init, key_map, "initial checkpoint")
    section = compare_init(inspected, result, init, problems)
    findings = [*unread_findings(init.warnings), *check_quantized(problems, codes.INIT_QUANTIZED)]
    findings += [*check_own_code(result), *check_requirements(result, requirements, problems)]
    patterns = fresh_patterns(fresh, inspected.state)
    untrained = find_untrained_in_init(inspected, section, result, init, initial)
    findings += check_init(inspected, section, result, init, patterns, untrained=untrained)
    findings += check_untrained(inspected, untrained, patterns)
    return section, [*findings, *check_values(inspected, section)]


def _optimizers_of_copy(
    model: Module, model_copy: Module, training: Training, optimizer: OptimizerLike | None
) -> Sequence[Optimizer]:
    """Return optimizers for ``model_copy``: a copy of each live optimizer with its state, or new ones of a class."""
    if not training.given or any(finding.severity == "error" for finding in training.findings):
        return ()
    if optimizer is None or isinstance(optimizer, str | type):
        return build_optimizers(model_copy, training.plan, optimizer)[0]
    memo: dict[int, Any] = dict(zip(map(id, model.parameters()), model_copy.parameters(), strict=True))
    return [_copy_optimizer(original, memo) for original in training.given]


def _copy_optimizer(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    # deepcopy of an Optimizer leaves out attributes, such as _numel_cache of LBFGS. A scheduler stores a step() in the
    # object, which would update the original, so this attribute is not copied.
    made = memo[id(optimizer)] = object.__new__(type(optimizer))
    made.__dict__.update(copy.deepcopy({key: value for key, value in vars(optimizer).items() if key != "step"}, memo))
    return made
