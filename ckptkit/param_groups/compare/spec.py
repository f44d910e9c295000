"""Compare live param groups with a spec: one finding for each difference."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.findings import Finding
from ckptkit.core.text import option_texts, quoted
from ckptkit.core.torch_optim import overwritten_options
from ckptkit.param_groups import codes
from ckptkit.param_groups.compare.groups import GroupDifference, compare_groups
from ckptkit.param_groups.compare.locks import group_views
from ckptkit.param_groups.compare.rates import check_flat_rates
from ckptkit.param_groups.live import LiveGroups
from ckptkit.param_groups.lock import ParamGroupsLock, lock_live, lock_plan
from ckptkit.param_groups.parameters import LiveModel, bare_name
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import assign
from ckptkit.param_groups.properties import live_parameter_table

__all__ = ["compare_with_spec"]

_BUILD_AGAIN = "build the groups from the spec again (build_param_groups), and load the optimizer state by name"


def compare_with_spec(
    live_model: LiveModel,
    live: LiveGroups,
    spec: SpecLike,
    ignored: frozenset[str] = frozenset(),
    *,
    has_schedulers: bool = False,
) -> Iterator[Finding]:
    """Yield the findings of ``spec`` for the model, and each difference of the live groups from the spec.

    Where a group has an ``initial_lr``, it is compared instead of ``lr``, which schedulers change. Options that
    schedulers overwrite are not compared, and neither are the options in ``ignored``. Where only the lr differs and no
    scheduler was built, a script may have set it, so the difference is a note. ``has_schedulers`` says whether the
    schedulers are checked too.
    """
    assignment = assign(live_parameter_table(live_model), spec)
    yield from assignment.report.findings
    if not assignment.report.ok:
        return
    expected, found = lock_plan(assignment.plan), lock_live(live_model, live)
    differences = compare_groups(
        group_views(expected), group_views(found), ignored=lambda _, group: ignored | overwritten_options(group.options)
    )
    flat = list(check_flat_rates(expected, live_model, live, "the spec", has_schedulers=has_schedulers))
    yield from flat
    follows = not flat and not any(difference.moved for difference in differences.groups)
    for difference in differences.groups:
        group = expected.groups[difference.expected]
        for name, number in difference.moved:
            message = (
                f"the live group of {quoted(name)} is {_label(found, number)}, and the spec says {quoted(group.name)}"
            )
            yield codes.MOVED.finding(name, message, _BUILD_AGAIN)
        if difference.found is not None:
            is_by_hand = follows and "initial_lr" not in live.groups[difference.found].options
            yield from _spec_options(group.name, _label(found, difference.found), difference, is_by_hand=is_by_hand)
    trainable = {bare_name(parameter.name) for parameter in live_model.trainable()}
    for parameter in expected.outside:
        # The validator reports a frozen parameter in a group also without a spec.
        if parameter.name in differences.found_groups and parameter.name in trainable:
            label = _label(found, differences.found_groups[parameter.name])
            message = f"{quoted(parameter.name)} {parameter.shape} is in {label}, and the spec freezes it"
            yield codes.MOVED.finding(parameter.name, message, _BUILD_AGAIN)


def _spec_options(key: str, label: str, difference: GroupDifference, *, is_by_hand: bool) -> Iterator[Finding]:
    pairs = [
        (f"no {option.key}" if option.is_absent else f"{option.key}={found}", f"{option.key}={expected}")
        for option in difference.options
        for found, expected in [option_texts(option.found, option.expected)]
    ]
    if difference.optimizer is not None:
        wanted, actual = difference.optimizer
        pairs.insert(0, (actual, wanted))
    if not pairs:
        return
    has, says = (", ".join(side) for side in zip(*pairs, strict=True))
    message = f"{label} trains with {has}, and the spec says {says}"
    is_lr_only = difference.optimizer is None and [option.key for option in difference.options] == ["lr"]
    if is_by_hand and is_lr_only and not difference.options[0].is_absent:
        hint = "this is right where a script sets the lr; load_state_dict() replaces it with the saved lr too"
        yield codes.OPTIONS.finding(key, message, hint, severity="note")
    else:
        yield codes.OPTIONS.finding(
            key,
            message,
            "build the groups from the spec again; load_state_dict() replaces the options with the saved options",
        )


def _label(lock: ParamGroupsLock, number: int) -> str:
    name = lock.groups[number].name
    return name if name == f"group {number}" else f"group {number} ({quoted(name)})"
