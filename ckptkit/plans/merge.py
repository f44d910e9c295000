"""Plans of a base and its donors: the keys of the base, with the donors' values where key and shape agree."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptkit.core.arguments import require_flags, takes_rules
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.coverage import measure_coverage
from ckptkit.core.coverage.requirements import Requirements, parse_requirements
from ckptkit.core.text import quoted
from ckptkit.core.ties import tied_keys
from ckptkit.errors import PlanError
from ckptkit.inputs import CheckpointLike, opened, rules_for
from ckptkit.plans.metadata import follow_metadata
from ckptkit.plans.metadata.edits import edit_metadata
from ckptkit.plans.overlays.choices import Policies, Sides, parse_policies
from ckptkit.plans.overlays.overlay import Overlay, OwnLoading, make_overlay
from ckptkit.plans.overlays.requirements import refuse_missing, refuse_parted, refuse_unmet
from ckptkit.plans.plan import Dropped, Plan, Step
from ckptkit.plans.policies import (
    OnMismatch,
    OnMissing,
    OnUnexpected,
)
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.quantized.as_codes import QuantizeLike, quantize_outputs
from ckptkit.plans.quantized.as_numbers import DequantizedInputs
from ckptkit.plans.steps import (
    dropped_entries,
    dropped_sources,
    make_step,
    refuse_ambiguous,
    refuse_suspicious,
    refuse_unread,
    role_to_edit,
    without_unread,
)
from ckptkit.quantized.view import DequantizeLike
from ckptkit.rules.model import Derivation, Rules, RulesLike

__all__ = ["follow_ties", "plan_loading", "plan_merge"]


@takes_rules
def plan_merge(
    base: CheckpointLike,
    donors: CheckpointLike | Sequence[CheckpointLike],
    rules: RulesLike | None = None,
    *,
    on_missing: OnMissing | None = None,
    on_unexpected: OnUnexpected = "skip",
    on_mismatch: OnMismatch = "error",
    dequantize: DequantizeLike = False,
    quantize: QuantizeLike | None = None,
    skip_unread: bool = False,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    metadata: Mapping[str, str] | None = None,
    drop_metadata: str | Sequence[str] = (),
) -> Plan:
    """Return the plan of an overlay: the keys of ``base``, with the donors' values where key and shape agree.

    ``base`` and each donor are a path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is
    opened here is closed at the end; give the same paths to ``execute``. ``rules`` are a list of renames, the path of a
    rule file, its parsed content, or ``Rules``; they rename and filter the keys of the donors first. Of several
    donors, the last that has a key wins. Values of another dtype are cast to the dtype of the base.

    ``on_missing`` says what happens to a key of the base that no donor has: ``keep`` keeps the base's value. It is the
    default, which refuses one thing that ``keep`` in writing accepts: a key whose values a donor has in another form.
    Such forms are the parts of a stack or of a fused projection, and the whole of such parts.
    ``on_unexpected`` is for a key of a donor that the base does not have: ``skip`` leaves it out, ``add`` adds it.
    ``on_mismatch`` is for a key with two shapes: ``skip`` keeps the base's value. The name of a tensor operation, such
    as ``pad``, converts the donor's value. Every policy raises with ``error``.

    Each of the three is one action for every key, or a mapping of patterns to actions. The first pattern that matches
    a key decides. The action of ``"*"`` is for all other keys, wherever it stands; without it, they are an error.
    The patterns match the keys of the base, and those of ``on_unexpected`` match the keys in the donor's file. A
    pattern that decides about no key is an error, as an unused rule is, unless ``rules`` allow unused rules.
    ``Step.rule`` names the rules and the policy that decided about a tensor.

    With ``dequantize``, quantised weights of every input are numbers, as in ``plan_remap``; those of a donor get the
    dtype of the base. ``dequantize`` may also be the dtype of those of the base.
    With ``quantize``, the output has codes of linear weights, as in ``plan_remap``.

    A tensor that is listed without its values, such as a sparse tensor, cannot be copied. ``skip_unread`` leaves all
    such tensors out, and ``dropped`` of the plan names each.

    The output has the metadata of ``base``; ``metadata`` and ``drop_metadata`` change it as in ``plan_remap``.

    ``require`` is a pattern or a list of patterns: every matching key of the base must get its values from a donor.
    ``min_coverage`` is the least share of the base's elements that must get them, between 0 and 1. ``coverage`` of the
    plan is that share, and ``from_base`` names the keys that keep the values of the base.

    Raises:
        ArgumentError: An action is not one of those above, or ``min_coverage`` is not a share.
        RuleError: A rule or a pattern is not valid, or it decides about no key.
        PlanError: A policy is ``error``, ``require`` or ``min_coverage`` is not met, an operation cannot make the
            shapes equal, or nothing matches at all. A donor has the values of a missing key in parts. A tensor cannot
            be copied, or a file refers to code that looks malicious. Or a quantised weight would replace a plain
            weight, or the reverse.

    Example:
        A new head on a body that must fit:

        >>> import torch
        >>> from ckptkit import plan_merge
        >>> def net(classes):
        ...     return torch.nn.ModuleDict({"body": torch.nn.Linear(4, 3), "fc": torch.nn.Linear(3, classes)})
        >>> plan = plan_merge(net(2), net(10), on_mismatch={"fc.*": "skip"})
        >>> {step.out.key: step.sources[0].role for step in plan.steps}
        {'body.weight': 'donor', 'body.bias': 'donor', 'fc.weight': 'base', 'fc.bias': 'base'}
        >>> plan.steps[-1].rule
        "--on-mismatch 'fc.*=skip'"
    """
    require_flags(skip_unread=skip_unread)
    policies = parse_policies(on_missing, on_unexpected, on_mismatch, Sides())
    requirements = parse_requirements(require, min_coverage)
    given = list(donors) if isinstance(donors, Sequence) and not isinstance(donors, str) else [donors]
    if not given:
        raise PlanError("there is no donor to take values from")
    roles = ["donor"] if len(given) == 1 else [f"donor{number}" for number in range(1, len(given) + 1)]
    with contextlib.ExitStack() as stack:
        opened_base = stack.enter_context(opened(base, "base"))
        sources = {role: stack.enter_context(opened(donor, role)) for role, donor in zip(roles, given, strict=True)}
        rules = rules_for(rules, sources[roles[0]], opened_base)
        inputs = DequantizedInputs({"base": opened_base, **sources}, dequantize, rules=rules, by_rules=roles)
        checkpoints = {role: inputs.checkpoints[role] for role in roles}
        plan, _ = _plan(
            inputs.checkpoints["base"], checkpoints, inputs.rules or rules, policies, requirements,
            skip_unread=skip_unread,
        )  # fmt: skip
        plan = quantize_outputs(inputs.finish(plan), inputs.stored, quantize)
        return edit_metadata(plan, metadata, drop_metadata)


def plan_loading(
    model: Checkpoint,
    checkpoint: Checkpoint,
    rules: RulesLike | None,
    *,
    on_missing: OnMissing | None,
    on_unexpected: OnUnexpected,
    on_mismatch: OnMismatch,
    skip_unread: bool,
    requirements: Requirements,
) -> tuple[Plan, OwnLoading]:
    """Return the plan that ``plan_merge`` makes of two checkpoints; errors speak of the model and the checkpoint.

    The second value says what the model's own code does with the checkpoint.
    """
    policies = parse_policies(on_missing, on_unexpected, on_mismatch, Sides("model", "checkpoint"))
    sources = {"donor": checkpoint}
    return _plan(model, sources, rules_for(rules, checkpoint, model), policies, requirements, skip_unread=skip_unread)


def _plan(
    base: Checkpoint,
    sources: dict[str, Checkpoint],
    rules: Rules,
    policies: Policies,
    requirements: Requirements,
    *,
    skip_unread: bool,
) -> tuple[Plan, OwnLoading]:
    refuse_suspicious(base, "base")
    refuse_ambiguous(base, base)
    notes = policies.unused(base, sources, allow_unused=rules.allow_unused)
    skipped: list[Dropped] = []
    for role, donor in sources.items() if skip_unread else ():
        sources[role], unread = without_unread(donor, role)
        skipped += unread
    quantized = QuantizedInputs({"base": base, **sources}, base, "base")
    overlays = [make_overlay(quantized, donor, role, rules, policies) for role, donor in sources.items()]
    from_donor = {key: step for overlay in overlays for key, step in overlay.from_donor.items()}
    added = {key: step for overlay in overlays for key, step in overlay.added.items()}
    from_donor, tie_notes = follow_ties(base, from_donor)
    notes += tie_notes
    mismatched = {key for overlay in overlays for key in overlay.mismatched}
    own = overlays[-1].own if policies.sides.is_loading else OwnLoading()
    missing = [key for key in base if key not in from_donor and key not in mismatched and key not in own.computed]
    refuse_missing([key for key in missing if policies.on_missing.action(key) == "error"], policies.sides)
    if not policies.keeps_parted:
        for role, overlay in zip(sources, overlays, strict=True):
            refuse_parted(base, missing, sources[role], overlay, policies.sides)
    if requirements:
        refuse_unmet(requirements, base, from_donor.keys() | own.computed.keys(), overlays, policies.sides)
    if skip_unread:
        base, unread = without_unread(base, "base", from_donor)
        skipped += unread
    refuse_unread((key for key in base if key not in from_donor), base)
    steps = [
        from_donor.get(key)
        or _base_step(info, base, (policies.on_mismatch if key in mismatched else policies.on_missing).rule(key))
        for key, info in base.items()
    ]
    dropped = [*dropped_entries(base, "base"), *(drop for overlay in overlays for drop in overlay.dropped)]
    dropped += skipped
    dropped += _replaced_by_later_donors(overlays, from_donor | added)
    notes += [
        f"{overlay.role}: {note}" if len(overlays) > 1 else note for overlay in overlays for note in overlay.notes
    ]
    all_steps = (*steps, *added.values())
    plan = Plan(
        all_steps,
        tuple(dropped),
        {},
        tuple(notes),
        base.versions,
        role_to_edit(base, "base"),
        command="merge",
        # A step has the shape that a lazy module gets.
        covered=measure_coverage({step.out.key: step.out for step in steps}, from_donor.keys() | own.computed.keys()),
    )
    return check_quantized(follow_metadata(plan, {"base": base, **sources}), quantized), own


def follow_ties(base: Checkpoint, changed: Mapping[str, Step]) -> tuple[dict[str, Step], list[str]]:
    """Return the steps of the changed keys and of every key that the base ties to one of them, and notes.

    A model that loads the output writes tied keys into the same memory, so they must have the same values. A note
    names two tied keys that get the values of different tensors.
    """
    steps, notes = dict(changed), []
    for keys in tied_keys(base.values()):
        leader = next((key for key in keys if key in changed), None)
        if leader is None:
            continue
        for key in keys:
            if key not in changed:
                out = replace(changed[leader].out, key=key)
                steps[key] = replace(changed[leader], out=out, rule=f"tied to {quoted(leader)}", tied_to=leader)
            elif key != leader and (steps[key].out.view is None or steps[key].out.view != steps[leader].out.view):
                notes.append(
                    f"{quoted(leader)} and {quoted(key)} are tied in the base, but get the values of two tensors"
                )
    return steps, notes


def _replaced_by_later_donors(overlays: Sequence[Overlay], final: Mapping[str, Step]) -> list[Dropped]:
    """Return the tensors of each donor that a later donor replaces."""
    steps = [step for overlay in overlays for step in (*overlay.from_donor.values(), *overlay.added.values())]
    dropped = []
    for step in steps:
        role, last = step.sources[0].role, final[step.out.key].sources[0].role
        if last != role:
            derivation = Derivation(tuple(source.key for source in step.sources), step.recipe)
            dropped += dropped_sources(role, step.out.key, derivation, f"{last} is a later donor and has the key too")
    return dropped


def _base_step(info: TensorInfo, base: Checkpoint, policy: str) -> Step:
    return make_step(info, Derivation((info.key,), rule=policy), "base", base)
