"""Load the state of an optimizer into a live one by parameter names, and prove that it was loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import cast, get_args

from ckptkit.core.arguments import require_choice, require_flags, takes_rules
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.torch_optim import options_of_kind, schema_of
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import PlanError
from ckptkit.inputs import opened_optimizer, rules_for
from ckptkit.optimizer_state import codes
from ckptkit.optimizer_state.casts import cast_findings
from ckptkit.optimizer_state.compatibility import match_state, refuse_other_class, unknown_decay_findings
from ckptkit.optimizer_state.groups import Hyper, resplit
from ckptkit.optimizer_state.loading.names import StateLike, named_state, read_live_groups, with_live_names
from ckptkit.optimizer_state.loading.policies import SKIP_ACTIONS, OnSkip, Policies, refuse_by_policy, refuse_unexpected
from ckptkit.optimizer_state.loading.refusals import (
    refuse_hidden_parameters,
    refuse_moved_elements,
    refuse_state_of_wrapper,
    wrapper_error,
)
from ckptkit.optimizer_state.loading.report import OptimizerLoadReport, initial_lr_findings, match_findings
from ckptkit.optimizer_state.loading.transfer import load_by_torch
from ckptkit.optimizer_state.model import NamedGroup, OptimizerState
from ckptkit.optimizer_state.naming import NamesLike, naming_findings
from ckptkit.optimizer_state.remapping import remap
from ckptkit.param_groups.live import single_optimizer
from ckptkit.param_groups.parameters import read_live_model
from ckptkit.plans.policies import MISSING_ACTIONS, OnMissing, parse_policy
from ckptkit.rules.load import as_rules
from ckptkit.rules.model import RulesLike

__all__ = ["load_optimizer_state"]

# These options tell how a step is computed, not its result. What a file from a GPU has may not work on this machine.
_SPEED_OPTIONS = options_of_kind("speed")


@takes_rules
def load_optimizer_state(
    optimizer: Optimizer,
    model: Module,
    state: StateLike | str | os.PathLike[str],
    rules: RulesLike | None = None,
    *,
    names: NamesLike | str | os.PathLike[str] | None = None,
    hyper: Hyper = "saved",
    on_missing: OnMissing = "keep",
    on_unexpected: OnSkip = "skip",
    on_mismatch: OnSkip = "error",
    allow_overflow: bool = False,
) -> OptimizerLoadReport:
    """Load a state into ``optimizer`` by the names of its parameters, and compare the values afterwards.

    ``state`` is an ``OptimizerState``, the path of a state, an open Checkpoint of one, or a ``state_dict()`` in any
    form of torch. A path is opened as by ``open_optimizer``, and closed at the end. ``rules``, as for the weights,
    rename and move the state as they do the weights. The groups of the optimizer can differ from those of the file in
    number, order and members.

    A state without names is read by position, as torch reads it, if the sizes of the groups and all shapes agree with
    the optimizer. If they do not, the order and the shapes of ``model`` must allow exactly one assignment; else those
    of the weights in the same file. With ``rules``, which start from the names in the file, only these weights count.
    A note says how the state was read. ``names`` reads it otherwise: ``"model"`` takes the order of ``model``, another
    model gives its own order, and a list, or the path of a text file, has the names in the order of the state.

    - ``hyper`` chooses the options: from the file (``saved``), from the optimizer (``live``), or an error if they
      differ (``error``). The optimizer keeps every option that the file does not have. It always keeps its
      options for speed (``foreach``, ``fused``, ``capturable``, ``differentiable``).
    - ``on_missing`` is for trainable parameters without state in the file: ``keep`` or ``error``.
    - ``on_unexpected`` is for state of parameters that the optimizer does not have: ``skip`` or ``error``.
    - ``on_mismatch`` is for state that does not fit its parameter: ``error`` or ``skip``.
    - Each of these three is one action, or a mapping of patterns of names to actions as in ``plan_merge``. The patterns
      match the names of parameters, and those of ``on_unexpected`` match the names in the state after the rules.
    - ``allow_overflow`` loads values that the cast to the dtype of the parameter makes inf; a finding has their count.

    The ``load_state_dict()`` of torch loads the state, so its hooks run, and it casts the state to the dtype and the
    device of the parameter. Single numbers keep their dtype. No step is made, gradients are not used, and no memory is
    shared with ``state``. Everything is checked before the optimizer is changed, and it is restored if loading fails.

    Raises ``ArgumentError`` for an unknown action. Raises ``RuleError`` for a wrong rule, and for a pattern that
    decides about no name, unless ``rules`` allow unused rules.
    Raises ``PlanError`` if a policy demands it, if another optimizer class was saved, or if nothing would be loaded.
    It is also raised if a cast would make inf of finite values.
    Raises ``GroupsError`` if the optimizer does not belong to ``model``, or has other values after the load.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> old, new = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
        >>> model(torch.ones(2)).sum().backward()
        >>> old.step()
        >>> ckptkit.load_optimizer_state(new, model, old.state_dict()).loaded
        ('weight', 'bias')
    """
    require_flags(allow_overflow=allow_overflow)
    require_choice(hyper, get_args(Hyper), "hyper")
    policies = Policies(
        parse_policy("on_missing", on_missing, MISSING_ACTIONS),
        parse_policy("on_unexpected", on_unexpected, SKIP_ACTIONS),
        parse_policy("on_mismatch", on_mismatch, SKIP_ACTIONS),
    )
    with opened_optimizer(state) as found:
        return _load_state(
            optimizer,
            model,
            cast("StateLike", found),
            rules_for(rules, found) if rules is not None and isinstance(found, Checkpoint) else rules,
            names=names,
            hyper=hyper,
            policies=policies,
            allow_overflow=allow_overflow,
        )


def _load_state(
    optimizer: Optimizer,
    model: Module,
    state: StateLike,
    rules: RulesLike | None,
    *,
    names: NamesLike | str | os.PathLike[str] | None,
    hyper: Hyper,
    policies: Policies,
    allow_overflow: bool,
) -> OptimizerLoadReport:
    inner = single_optimizer(optimizer)
    refuse_state_of_wrapper(optimizer, inner)
    live_model = read_live_model(model)
    live_groups = read_live_groups(inner, live_model)
    drop_strays = "skip" in policies.on_unexpected.actions
    saved, strays = named_state(state, names, model, live_groups, drop_strays=drop_strays, has_rules=rules is not None)
    if optimizer is not inner and saved.more.state:  # the wrapper wrote these values into the state of the optimizer
        raise wrapper_error(optimizer, inner)
    schema = schema_of(type(inner))
    refuse_other_class(saved, inner, schema)
    parsed = as_rules(rules)
    if rules is not None:
        saved = remap(saved, parsed)
    live_names = [name for group in live_groups for name in group.names]
    policies.refuse_unused([*saved.names, *strays, *saved.more.names], live_names, allow_unused=parsed.allow_unused)
    saved, unused = with_live_names(saved, live_model, live_groups)
    unused += strays
    refuse_unexpected([name for name in unused if policies.on_unexpected.action(name) == "error"])
    refuse_moved_elements(saved, schema)
    refuse_hidden_parameters(saved, live_groups)
    groups = _chosen_options(saved, live_groups, hyper)
    with_state = [name for name, live in live_model.by_name.items() if inner.state.get(live.tensor)]
    match = match_state(saved, groups, live_model, schema, with_state=with_state)
    refuse_by_policy(match, saved, policies)
    findings = [
        *naming_findings(saved),
        *match_findings(match, unused),
        *initial_lr_findings(live_groups, groups),
        *unknown_decay_findings(saved, schema),
        *cast_findings(match.state, live_model, schema, allow_overflow=allow_overflow),
    ]
    if not saved.state and saved.names:
        findings.append(codes.OPTIONS_ONLY.finding("", "the file has no state, so only the options were loaded"))
    chosen = replace(saved, state=match.state, groups=groups)
    unread = load_by_torch(inner, chosen, match, live_model, schema, on_unexpected=policies.on_unexpected)
    findings += unread
    return OptimizerLoadReport(
        tuple(findings),
        PlanError,
        loaded=tuple(match.state),
        dropped=tuple(match.dropped),
        missing=match.missing,
        unused=tuple(unused),
        reshaped=tuple(change.name for change in saved.changes if change.moves_elements),
    )


def _chosen_options(saved: OptimizerState, live_groups: Sequence[NamedGroup], hyper: Hyper) -> tuple[NamedGroup, ...]:
    """Return the live groups with the options that ``hyper`` chooses for their parameters."""
    if hyper == "live":
        return tuple(live_groups)
    groups = [
        replace(group, options={key: value for key, value in group.options.items() if key not in _SPEED_OPTIONS})
        for group in saved.groups
        if group.names
    ]
    in_file = {name for group in groups for name in group.names}
    to_resplit = [group for group in live_groups if in_file.intersection(group.names)]
    resplit_groups = iter(resplit(replace(saved, groups=tuple(groups)), to_resplit, hyper).groups)
    chosen = [next(resplit_groups) if in_file.intersection(group.names) else group for group in live_groups]
    if [group.names for group in saved.groups] == [group.names for group in live_groups]:
        pairs = zip(chosen, saved.groups, strict=True)  # a group without parameters has only its number
        chosen = [
            group if group.names else replace(group, options={**group.options, **same.options}) for group, same in pairs
        ]
    return tuple(chosen)
