"""Compare live param groups with a spec: one finding for each difference."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.findings import Finding
from ckptkit.core.text import quoted
from ckptkit.core.torch_optim import overwritten_options
from ckptkit.param_groups import codes
from ckptkit.param_groups.compare.groups import GroupDifference, compare_groups
from ckptkit.param_groups.compare.locks import group_views
from ckptkit.param_groups.live import LiveGroups
from ckptkit.param_groups.lock import ParamGroupsLock, lock_live, lock_plan
from ckptkit.param_groups.parameters import LiveModel, bare_name
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import assign
from ckptkit.param_groups.properties import live_parameter_table

__all__ = ["compare_with_spec"]

_BUILD_AGAIN = "build the groups from the spec again (build_param_groups), and load the optimizer state by name"


def compare_with_spec(
    live_model: LiveModel, live: LiveGroups, spec: SpecLike, ignored: frozenset[str] = frozenset()
) -> Iterator[Finding]:
    """Yield the findings of ``spec`` for the model, and each difference of the live groups from the spec.

    Where a group has an ``initial_lr``, it is compared instead of ``lr``, which schedulers change. Options that
    schedulers overwrite are not compared, and neither are the options in ``ignored``.
    """
    assignment = assign(live_parameter_table(live_model), spec)
    yield from assignment.report.findings
    if not assignment.report.ok:
        return
    expected, found = lock_plan(assignment.plan), lock_live(live_model, live)
    differences = compare_groups(
        group_views(expected), group_views(found), ignored=lambda _, group: ignored | overwritten_options(group.options)
    )
    for difference in differences.groups:
        group = expected.groups[difference.expected]
        for name, number in difference.moved:
            message = (
                f"the live group of {quoted(name)} {expected.parameters[name].shape} is {_label(found, number)}, and "
                f"the spec says {quoted(group.name)}"
            )
            yield codes.MOVED.finding(name, message, _BUILD_AGAIN)
        if difference.found is not None:
            yield from _spec_options(group.name, _label(found, difference.found), difference)
    trainable = {bare_name(parameter.name) for parameter in live_model.trainable()}
    for parameter in expected.outside:
        # The validator reports a frozen parameter in a group also without a spec.
        if parameter.name in differences.found_groups and parameter.name in trainable:
            label = _label(found, differences.found_groups[parameter.name])
            message = f"{quoted(parameter.name)} {parameter.shape} is in {label}, and the spec freezes it"
            yield codes.MOVED.finding(parameter.name, message, _BUILD_AGAIN)


def _spec_options(key: str, label: str, difference: GroupDifference) -> Iterator[Finding]:
    pairs = [
        (
            f"no {option.key}" if option.is_absent else f"{option.key}={option.found!r}",
            f"{option.key}={option.expected!r}",
        )
        for option in difference.options
    ]
    if difference.optimizer is not None:
        wanted, actual = difference.optimizer
        pairs.insert(0, (actual, wanted))
    if pairs:
        has, says = (", ".join(side) for side in zip(*pairs, strict=True))
        yield codes.OPTIONS.finding(
            key,
            f"{label} trains with {has}, and the spec says {says}",
            "build the groups from the spec again; load_state_dict() replaces the options with the saved options",
        )


def _label(lock: ParamGroupsLock, number: int) -> str:
    name = lock.groups[number].name
    return name if name == f"group {number}" else f"group {number} ({quoted(name)})"
