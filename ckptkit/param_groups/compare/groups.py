"""Compare two lists of param groups: which parameters moved, and which options, shapes and orders differ."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "GroupDifference",
    "GroupDifferences",
    "GroupView",
    "OptionDifference",
    "OrderDifference",
    "ShapeDifference",
    "compare_groups",
]

Match = Literal["name", "position"]
Shape = tuple[int, ...]


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
    - ``match="position"``, as torch loads a state: groups correspond by number. The options of each parameter are
      compared with the options of the found group that has the parameter.

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
    """Return the number of the found group of the same name, or else of the group with most common parameters."""
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
