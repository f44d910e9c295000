"""Compare param groups: a lock with a lock, a spec with live groups, and any two lists of groups."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckptkit.core.findings import Finding, Report
from ckptkit.core.text import kind_of, plural, printable, quoted
from ckptkit.core.torch_optim import options_of_kind, overwritten_options
from ckptkit.errors import GroupsError
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import LiveGroups
from ckptkit.param_groups.lock import LockedParameter, ParamGroupsLock, lock_live, lock_plan
from ckptkit.param_groups.parameters import LiveModel, bare_name
from ckptkit.param_groups.parse import SpecLike
from ckptkit.param_groups.plan import assign
from ckptkit.param_groups.properties import live_parameter_table

__all__ = [
    "GroupDifference",
    "GroupDifferences",
    "GroupView",
    "OptionDifference",
    "OrderDifference",
    "ShapeDifference",
    "compare_groups",
    "compare_with_spec",
    "diff_locks",
]

Match = Literal["name", "position"]
Shape = tuple[int, ...]
_LOCK_AGAIN = "lock the groups again if the change is intended"
_BY_NAME = "load the optimizer state by name: torch loads it by position"
_BUILD_AGAIN = "build the groups from the spec again (build_param_groups), and load the optimizer state by name"


@dataclass(frozen=True, slots=True)
class GroupView:
    """One param group of a lock, a spec, a live optimizer or a saved state, in the form that is compared.

    ``names`` are in order. ``shapes`` has the names with a known shape. ``optimizer`` is a class name or None.
    """

    name: str
    names: tuple[str, ...]
    options: Mapping[str, object]
    optimizer: str | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)


Ignored = Callable[[GroupView, GroupView], Collection[str]]
Equal = Callable[[object, object], bool]


@dataclass(frozen=True, slots=True)
class OptionDifference:
    """One option of the parameters ``names`` with two values; ``is_absent`` means that the found group lacks it."""

    key: str
    expected: object
    found: object
    names: tuple[str, ...]
    is_absent: bool = False


@dataclass(frozen=True, slots=True)
class ShapeDifference:
    """One parameter with two shapes."""

    name: str
    expected: Shape
    found: Shape


@dataclass(frozen=True, slots=True)
class OrderDifference:
    """The first position at which the parameters of an optimizer differ, and the number of such positions."""

    position: int
    expected: str
    found: str
    count: int


@dataclass(frozen=True, slots=True)
class GroupDifference:
    """The differences of one expected group.

    ``found`` is the number of the group that corresponds to it, or None. ``moved`` has the parameters that are in
    another found group, each with the number of that group. ``optimizer`` has the expected and the found class where
    they differ.
    """

    expected: int
    found: int | None
    moved: tuple[tuple[str, int], ...]
    options: tuple[OptionDifference, ...]
    optimizer: tuple[str, str] | None


@dataclass(frozen=True, slots=True)
class GroupDifferences:
    """Every difference between two lists of groups; ``groups`` has one entry for each expected group.

    ``missing`` are the names in expected groups only, ``unexpected`` those in found groups only. ``found_groups`` maps
    each name to the number of its found group.
    """

    groups: tuple[GroupDifference, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[ShapeDifference, ...]
    order: tuple[OrderDifference, ...]
    found_groups: Mapping[str, int]


def compare_groups(
    expected: Sequence[GroupView],
    found: Sequence[GroupView],
    *,
    match: Match = "name",
    ignored: Ignored = lambda _expected, _found: (),
    equal: Equal = operator.eq,
) -> GroupDifferences:
    """Return the differences between two lists of groups; only options that an expected group has are compared.

    - ``match="name"``: groups correspond by name, or else by most common parameters. Corresponding groups are compared.
    - ``match="position"``, as torch loads a state: groups correspond by number, but the options of each parameter are
      compared with those of the found group that has the parameter.

    ``ignored`` returns the options of an expected and a found group that are not compared. ``equal`` compares two
    values of an option.
    """
    found_groups = {name: number for number, group in enumerate(found) for name in group.names}
    if match == "name":
        matches = _match_groups(expected, found, found_groups)
    else:
        matches = {number: number for number in range(len(found))}
    groups = []
    for number, group in enumerate(expected):
        matched = matches.get(number)
        common = [(name, found_groups[name]) for name in group.names if name in found_groups]
        partners: dict[int, list[str]] = {}
        if match == "name":
            partners = {} if matched is None else {matched: list(group.names)}
        else:
            for name, partner in common:
                partners.setdefault(partner, []).append(name)
        options = [
            difference
            for partner, names in partners.items()
            for difference in _option_differences(group, found[partner], names, ignored, equal)
        ]
        moved = tuple((name, partner) for name, partner in common if partner != matched)
        classes = None if matched is None else _class_difference(group, found[matched])
        groups.append(GroupDifference(number, matched, moved, tuple(options), classes))
    expected_names = {name for group in expected for name in group.names}
    return GroupDifferences(
        tuple(groups),
        tuple(name for group in expected for name in group.names if name not in found_groups),
        tuple(name for group in found for name in group.names if name not in expected_names),
        tuple(_shape_differences(expected, found, found_groups)),
        tuple(_order_differences(expected, found)),
        found_groups,
    )


def _match_groups(
    expected: Sequence[GroupView], found: Sequence[GroupView], found_groups: Mapping[str, int]
) -> dict[int, int]:
    """Return the number of the found group of the same name, or else of the one with most common parameters."""
    by_name = {group.name: number for number, group in enumerate(found)}
    matches = {number: by_name[group.name] for number, group in enumerate(expected) if group.name in by_name}
    matched = set(matches.values())
    for number, group in enumerate(expected):
        if number in matches:
            continue
        common = Counter(found_groups[name] for name in group.names if name in found_groups)
        free = [(count, -candidate) for candidate, count in common.items() if candidate not in matched]
        if free:
            matches[number] = -max(free)[1]
            matched.add(matches[number])
    return matches


def _option_differences(
    expected: GroupView, found: GroupView, names: Sequence[str], ignored: Ignored, equal: Equal
) -> Iterator[OptionDifference]:
    left_out = ignored(expected, found)
    for key, value in expected.options.items():
        if key not in left_out and not (key in found.options and equal(value, found.options[key])):
            is_absent = key not in found.options
            yield OptionDifference(key, value, found.options.get(key), tuple(names), is_absent)


def _class_difference(expected: GroupView, found: GroupView) -> tuple[str, str] | None:
    if expected.optimizer and found.optimizer and expected.optimizer != found.optimizer:
        return expected.optimizer, found.optimizer
    return None


def _shape_differences(
    expected: Sequence[GroupView], found: Sequence[GroupView], found_groups: Mapping[str, int]
) -> Iterator[ShapeDifference]:
    for group in expected:
        for name in group.names:
            shape = group.shapes.get(name)
            other = found[found_groups[name]].shapes.get(name) if name in found_groups else None
            if shape is not None and other is not None and shape != other:
                yield ShapeDifference(name, shape, other)


def _order_differences(expected: Sequence[GroupView], found: Sequence[GroupView]) -> Iterator[OrderDifference]:
    """Yield a difference for each optimizer that has the common parameters in another order."""
    before, after = _sequences(expected), _sequences(found)
    for optimizer, names in before.items():
        others = after.get(optimizer, names)
        common = set(names) & set(others)
        pairs = zip(filter(common.__contains__, names), filter(common.__contains__, others), strict=False)
        different = [(position, *pair) for position, pair in enumerate(pairs) if pair[0] != pair[1]]
        if different:
            yield OrderDifference(*different[0], len(different))


def _sequences(groups: Sequence[GroupView]) -> Mapping[str | None, list[str]]:
    """Return the names of each optimizer in the order of its state; a single optimizer has the key None."""
    sequences: dict[str | None, list[str]] = {}
    is_single = len({group.optimizer for group in groups}) == 1
    for group in groups:
        sequences.setdefault(None if is_single else group.optimizer, []).extend(group.names)
    return sequences


def _views(lock: ParamGroupsLock) -> list[GroupView]:
    return [
        GroupView(group.name, tuple(parameter.name for parameter in group.parameters), group.options, group.optimizer)
        for group in lock.groups
    ]


def diff_locks(expected: ParamGroupsLock, found: ParamGroupsLock) -> Report:
    """Return the differences of ``found`` from ``expected``.

    Where one lock has no groups, only names, shapes, dtypes and ties are compared. Options are compared where
    ``expected`` has them. Codes of errors: ``groups.gone``, ``new``, ``shape``, ``moved``, ``order``, ``ties``; of
    warnings: ``dtype``, ``thawed``, ``options``. Raises ``GroupsError`` where an argument is not a lock.
    """
    for lock in (expected, found):
        if not isinstance(lock, ParamGroupsLock):
            raise GroupsError(f"a lock cannot be {kind_of(lock)}", hint="parse_lock(json.load(file)) reads one")
    findings: list[Finding] = []
    if expected.fingerprint != found.fingerprint:
        findings += [*_name_findings(expected, found), *_shape_findings(expected, found)]
    if expected.groups and found.groups:
        findings += [*_membership_findings(expected, found), *_lock_group_findings(expected, found)]
    return Report(tuple(findings), GroupsError)


def _name_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    gone = [parameter for name, parameter in expected.parameters.items() if name not in found.parameters]
    new = [parameter for name, parameter in found.parameters.items() if name not in expected.parameters]
    renamed = _find_renamed(gone, new)
    for parameter in gone:
        other = renamed.get(parameter.name)
        message = f"{quoted(parameter.name)} {list(parameter.shape)} is gone"
        if other is None:
            yield codes.GONE.finding(parameter.name, message, "drop its state, or restore the name")
        else:
            message += f"; {quoted(other)} has the same shape and position"
            hint = f"rename its state: {printable(parameter.name)}={printable(other)}"
            yield codes.GONE.finding(parameter.name, message, hint)
    for parameter in new:
        if parameter.name not in renamed.values():
            suffix = "" if parameter.index is None else " and trains"
            message = f"{quoted(parameter.name)} {list(parameter.shape)} is new{suffix}"
            yield codes.NEW.finding(parameter.name, message, _LOCK_AGAIN)


def _find_renamed(gone: Sequence[LockedParameter], new: Sequence[LockedParameter]) -> dict[str, str]:
    """Return the new name of each parameter that is gone, where both lists have the same shapes in the same order."""
    if [parameter.shape for parameter in gone] != [parameter.shape for parameter in new]:
        return {}
    return {old.name: other.name for old, other in zip(gone, new, strict=True)}


def _shape_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    for name, before in expected.parameters.items():
        after = found.parameters.get(name)
        if after is None:
            continue
        if after.shape != before.shape:
            yield codes.SHAPE.finding(
                name,
                f"{quoted(name)} had shape {list(before.shape)} and now has {list(after.shape)}",
                "its optimizer state has the old shape: drop it, or resize it as the parameter was resized",
            )
        elif after.dtype != before.dtype and after.dtype and before.dtype:
            message = f"{quoted(name)} had dtype {before.dtype} and now has {after.dtype}"
            yield codes.DTYPE.finding(name, message, "torch casts its state to the new dtype")
        if set(after.aliases) != set(before.aliases):
            yield codes.TIES.finding(
                name,
                f"{quoted(name)} was tied to {_name_list(before.aliases)} and is now tied to "
                f"{_name_list(after.aliases)}",
                "tie the weights as before, or lock the groups again",
            )


def _membership_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    for name, before in expected.parameters.items():
        after = found.parameters.get(name)
        if after is not None and (before.index is None) != (after.index is None):
            change = (
                "was in no group and is now in one" if before.index is None else "was in a group and is now in none"
            )
            hint = "freeze or unfreeze it as before, or lock the groups again"
            yield codes.THAWED.finding(name, f"{quoted(name)} {change}", hint)


def _lock_group_findings(expected: ParamGroupsLock, found: ParamGroupsLock) -> Iterator[Finding]:
    differences = compare_groups(
        _views(expected), _views(found), ignored=lambda _, group: overwritten_options(group.options)
    )
    for difference in differences.groups:
        group = expected.groups[difference.expected]
        for name, number in difference.moved:
            other = quoted(found.groups[number].name)
            message = f"{quoted(name)} was in group {quoted(group.name)} and is now in {other}"
            yield codes.MOVED.finding(name, message, _BY_NAME)
        changes = [
            f"{option.key} {option.expected!r} -> {'nothing' if option.is_absent else repr(option.found)}"
            for option in difference.options
        ]
        if difference.optimizer is not None:
            changes.insert(0, f"optimizer {' -> '.join(difference.optimizer)}")
        if changes:
            message = f"group {quoted(group.name)} has other options: {', '.join(changes)}"
            yield codes.OPTIONS.finding(group.name, message, _LOCK_AGAIN, severity="warning")
    for order in differences.order:
        yield codes.ORDER.finding(
            order.expected,
            f"{plural(order.count, 'parameter')} changed position: the first position that held "
            f"{quoted(order.expected)} now holds {quoted(order.found)}",
            _BY_NAME,
        )


def _name_list(names: tuple[str, ...]) -> str:
    return ", ".join(map(quoted, names)) or "nothing"


def compare_with_spec(live_model: LiveModel, live: LiveGroups, spec: SpecLike) -> Iterator[Finding]:
    """Yield the findings of ``spec`` for the model, and each difference of the live groups from the spec.

    Learning rates are those before schedulers changed them, where the groups record these. Options that schedulers
    overwrite and options that only change the speed of a step are not compared.
    """
    assignment = assign(live_parameter_table(live_model), spec)
    yield from assignment.report.findings
    if not assignment.report.ok:
        return
    expected, found = lock_plan(assignment.plan), lock_live(live_model, live)
    speed = options_of_kind("speed")
    differences = compare_groups(
        _views(expected), _views(found), ignored=lambda _, group: speed | overwritten_options(group.options)
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
            "build the groups from the spec again; load_state_dict() replaces the options by those of the file",
        )


def _label(lock: ParamGroupsLock, number: int) -> str:
    name = lock.groups[number].name
    return name if name == f"group {number}" else f"group {number} ({quoted(name)})"
