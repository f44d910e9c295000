"""Proof that live groups hold every trainable parameter of the model once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ckptkit.core.findings import Finding, Report
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import GroupsError
from ckptkit.param_groups.compare import compare_with_spec, diff_locks
from ckptkit.param_groups.live import by_optimizer, read_groups
from ckptkit.param_groups.lock import ParamGroupsLock, lock_optimizer
from ckptkit.param_groups.parameters import take_inventory
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.validate.membership import (
    check_dicts,
    check_membership,
    check_names,
    check_wrappers,
    find_missing,
    find_placements,
)
from ckptkit.param_groups.validate.model import check_empty, check_memory, check_meta, check_tied
from ckptkit.param_groups.validate.optimizer_rules import check_across_groups, check_optimizer_rules
from ckptkit.param_groups.validate.options import check_options
from ckptkit.param_groups.validate.schedulers import check_schedulers, read_schedulers
from ckptkit.param_groups.validate.state import check_state, check_state_values

__all__ = ["assert_param_groups", "validate_param_groups"]


def validate_param_groups(
    model: Module,
    groups: Optimizer | Iterable[Any],
    *,
    schedulers: Any = None,
    spec: SpecLike | None = None,
    lock: ParamGroupsLock | None = None,
) -> Report:
    """Report whether ``groups`` train every trainable parameter of ``model`` exactly once, and nothing else.

    ``groups`` is a list of group dicts, a list of parameters or of ``(name, parameter)`` pairs, an
    optimizer, or a list of optimizers that share the model. Membership is by identity: equal values
    prove nothing. Nothing is consumed or changed; where a group holds a one-shot iterator, what it
    stands for stays unknown, and so does what is missing. Of an optimizer the options, the state and,
    with ``schedulers`` (one, or several), the schedules are looked at too: state is read once, every value of it.
    With ``spec`` each parameter must be in the group, and each group have the options, that the spec says;
    with ``lock`` nothing may have changed since it was written, the order of the optimizer's state included.

    Codes: ``groups.missing``, ``duplicate``, ``tied``, ``stale``, ``foreign``, ``sharded``, ``unregistered``,
    ``frozen``, ``empty``, ``one-shot``, ``unordered``, ``buffer``, ``not-a-parameter``, ``names``, ``shared``,
    ``cached``, ``lazy``, ``meta``, ``shared-memory``, ``shared-module``, ``no-parameters``; of options
    ``option-value``, ``option-unread``, ``option-missing``, ``option-set``, ``multiplier``, ``decay``, ``shared-lr``,
    ``many``, ``matrices-only``, ``one-group``, ``decoupled``, ``capturable``, ``mixed``; of state ``state-shape``,
    ``state-dtype``, ``state-device``, ``state-incomplete``, ``state-orphan``, ``state-stray``, ``state-steps``,
    ``state-absent``, ``state-empty``, ``state-value``, ``state-shared``, ``state-dead``; of schedulers
    ``scheduler-length``, ``scheduler-base-lr``, ``scheduler-initial-lr``, ``scheduler-optimizer``, ``scheduler-flat``;
    against a spec ``moved``, ``options``, and those of ``check_spec``; against a lock those of ``diff_locks``. Raises
    ``GroupsError`` where ``model``, ``groups``, ``schedulers`` or ``spec`` is nothing of the kind.
    """
    with pause_gc():
        findings = _findings(model, groups, schedulers)
        if spec is not None:
            findings.extend(compare_with_spec(model, groups, spec))
        if lock is not None:
            findings.extend(diff_locks(lock, lock_optimizer(model, groups)).findings)
        return Report(tuple(findings), GroupsError)


def _findings(model: Module, groups: Any, schedulers: Any) -> list[Finding]:
    inventory = take_inventory(model)
    driving = read_schedulers(schedulers)
    read, members, findings = read_groups(groups)
    owners = by_optimizer(read, members)
    findings.extend(check_dicts(read))
    findings.extend(check_wrappers(groups))
    findings.extend(check_names(inventory, read, members))
    findings.extend(check_options(read))
    findings.extend(check_optimizer_rules(inventory, owners))
    findings.extend(check_across_groups(inventory, owners, driving))
    findings.extend(check_state(inventory, owners))
    findings.extend(check_state_values(inventory, owners))
    findings.extend(check_schedulers(owners, driving))
    stand = find_placements(members)
    missing = find_missing(inventory, read, stand)
    if members and not missing and all(group.is_readable for group in read):
        # The half of a split that nothing fell into: the Trainer of transformers always makes two groups, and with
        # LoRA the one without decay is empty.
        findings = [replace(one, severity="note") if one.code == "groups.empty" else one for one in findings]
    findings.extend(check_membership(inventory, stand, missing))
    findings.extend(check_meta(inventory, members))
    findings.extend(check_tied(inventory, stand.first))
    findings.extend(check_memory(inventory, stand.first))
    findings.extend(check_empty(inventory))
    return findings


def assert_param_groups(
    model: Module,
    groups: Optimizer | Iterable[Any],
    *,
    schedulers: Any = None,
    spec: SpecLike | None = None,
    lock: ParamGroupsLock | None = None,
    strict: bool = False,
) -> Report:
    """Return the report of ``validate_param_groups`` where nothing is wrong; raise where something is.

    ``GroupsError`` names the first fault and says how many more there are: errors, and with ``strict`` warnings too.
    """
    report = validate_param_groups(model, groups, schedulers=schedulers, spec=spec, lock=lock)
    report.raise_for_errors(warnings=strict)
    return report
