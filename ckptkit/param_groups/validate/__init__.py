"""Check that live groups hold every trainable parameter of a model exactly once, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ckptkit.core.arguments import require_flags
from ckptkit.core.findings import Finding, Report
from ckptkit.core.findings.ignoring import IgnoreLike, ignore_findings, parse_ignore
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import plural
from ckptkit.core.torch_types import Module, Optimizer
from ckptkit.errors import CkptkitError, GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroups, read_groups
from ckptkit.param_groups.lock import LockLike, as_lock, lock_live
from ckptkit.param_groups.parameters import LiveModel, bare_name, read_live_model
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.validate.membership import (
    check_membership,
    check_names,
    check_shared_groups,
    check_wrappers,
    find_missing,
    group_by_tensor,
)
from ckptkit.param_groups.validate.model import check_empty, check_memory, check_meta, check_tied
from ckptkit.param_groups.validate.modules import check_modules
from ckptkit.param_groups.validate.optimizer_rules import check_across_groups, check_optimizer_rules
from ckptkit.param_groups.validate.options import check_options
from ckptkit.param_groups.validate.schedulers import check_schedulers, read_schedulers
from ckptkit.param_groups.validate.state import check_state, check_state_values

__all__ = ["assert_param_groups", "check_param_groups", "validate_param_groups"]


def validate_param_groups(
    model: Module,
    groups: Optimizer | Iterable[Any],
    *,
    schedulers: Any = None,
    spec: SpecLike | None = None,
    lock: LockLike | None = None,
    ignore: IgnoreLike = (),
) -> Report:
    """Report whether ``groups`` train every trainable parameter of ``model`` exactly once, and nothing else.

    ``groups`` is an optimizer, a list of optimizers that share the model, a list of group dicts, or a list of
    parameters or ``(name, parameter)`` pairs. Parameters are compared by identity, never by value. Nothing is changed,
    and no iterator is consumed. If a group holds a one-shot iterator, its members and the missing parameters stay
    unknown.

    For an optimizer, its options and every value of its state are checked too, and with ``schedulers`` (one or several)
    also their lrs. With ``spec``, each parameter must be in the group of the spec, and each group must have the options
    of the spec. With ``lock``, nothing may differ from the lock, not even the order of the parameters. Both may be the
    paths of their files.

    ``ignore`` lists expected findings, as does ``ignore`` at the top of a spec: ``CODE`` or ``CODE:KEY-PATTERN``. They
    are in ``ignored`` of the report, not in ``findings``. An entry that matches no finding is a note.

    >>> import torch
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD([model.weight], lr=0.1)
    >>> print(validate_param_groups(model, optimizer, ignore=["groups.missing:*bias"]))
    no findings; 1 finding ignored (1 error)

    The codes of the findings begin with ``groups.``; docs/codes.md lists them. Raises ``GroupsError`` if ``model``,
    ``groups``, ``schedulers`` or ``spec`` is not of a type that is named here. Raises ``RuleError`` for an entry of
    ``ignore`` that is not valid, or that names a code that no check has.
    """
    entries = parse_ignore(ignore)
    if spec is not None:
        spec = parse_spec(spec)
        entries += parse_ignore(spec.ignore)
    report = check_param_groups(model, groups, schedulers=schedulers, spec=spec, lock=lock)
    return ignore_findings(report, entries, bare_name=bare_name)


def check_param_groups(
    model: Module,
    groups: Optimizer | Iterable[Any],
    *,
    schedulers: Any = None,
    spec: SpecLike | None = None,
    lock: LockLike | None = None,
    ignored: frozenset[str] = frozenset(),
) -> Report:
    """Return the report of ``validate_param_groups`` with every finding.

    The options in ``ignored`` are not compared with the spec.
    """
    with pause_gc():
        live_model, given_schedulers, live = read_live_model(model), read_schedulers(schedulers), read_groups(groups)
        findings = _check_live_groups(live_model, live, given_schedulers, groups)
        if spec is not None:
            from ckptkit.param_groups.compare.spec import compare_with_spec

            has_schedulers = bool(given_schedulers)
            findings.extend(compare_with_spec(live_model, live, spec, ignored, has_schedulers=has_schedulers))
        if lock is not None:
            from ckptkit.param_groups.compare.locks import diff_locks
            from ckptkit.param_groups.compare.rates import check_flat_rates

            lock = as_lock(lock)
            findings.extend(diff_locks(lock, lock_live(live_model, live)).findings)
            if spec is None:
                flat = check_flat_rates(lock, live_model, live, "the lock", has_schedulers=bool(given_schedulers))
                findings.extend(flat)
        count = sum(parameter.trainable for parameter in live_model.parameters.values())
        groups_text = plural(len(live.groups), "group")
        proved = f"{plural(count, 'trainable parameter')}, each in exactly one of {groups_text}"
        return Report(tuple(findings), GroupsError, proved=proved)


def _check_live_groups(live_model: LiveModel, live: LiveGroups, schedulers: Sequence[Any], given: Any) -> list[Finding]:
    groups, members, optimizers = live.groups, live.members, live.optimizers
    findings = list(live.findings)
    findings.extend(check_shared_groups(groups))
    findings.extend(check_wrappers(given))
    findings.extend(check_names(live_model, groups, members))
    findings.extend(check_options(groups))
    findings.extend(check_optimizer_rules(live_model, optimizers))
    findings.extend(check_across_groups(live_model, optimizers, schedulers))
    findings.extend(check_state(live_model, optimizers))
    findings.extend(check_state_values(live_model, optimizers))
    findings.extend(check_schedulers(optimizers, schedulers))
    by_tensor = group_by_tensor(members)
    missing = find_missing(live_model, groups, by_tensor)
    if members and not missing and all(group.is_readable for group in groups):
        # Nothing is missing, so an empty group is harmless. The Trainer of transformers always makes two groups, and
        # with LoRA the group without decay is empty.
        findings = [
            replace(finding, severity="note") if finding.code == codes.EMPTY.name else finding for finding in findings
        ]
    findings.extend(check_membership(live_model, by_tensor, missing))
    findings.extend(check_meta(live_model, members))
    findings.extend(check_tied(live_model, by_tensor.first))
    findings.extend(check_memory(live_model, by_tensor.first))
    findings.extend(check_empty(live_model))
    findings.extend(check_modules(live_model))
    return findings


def assert_param_groups(
    model: Module,
    groups: Optimizer | Iterable[Any],
    *,
    schedulers: Any = None,
    spec: SpecLike | None = None,
    lock: LockLike | None = None,
    strict: bool = False,
    ignore: IgnoreLike = (),
) -> Report:
    """Return the report of ``validate_param_groups``, or raise ``GroupsError`` if it has an error.

    The exception names the first fault and the number of the others; the page of all findings is a note of the
    exception, which Python and pytest print below it. With ``strict``, warnings count as errors. Findings that
    ``ignore`` or the spec lists never raise. The other arguments are those of ``validate_param_groups``.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD([model.weight], lr=0.1)
        >>> assert_param_groups(model, optimizer, strict=True, ignore=["groups.missing:bias"]).ok
        True
    """
    require_flags(strict=strict)
    report = validate_param_groups(model, groups, schedulers=schedulers, spec=spec, lock=lock, ignore=ignore)
    try:
        report.raise_for_errors(warnings=strict)
    except CkptkitError as error:
        error.add_note(str(report))
        raise
    return report
