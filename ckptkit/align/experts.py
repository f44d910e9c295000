"""Rules that join the experts of a layer into one tensor, or divide this tensor into its experts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptkit.align.digests import Digests
from ckptkit.align.writing.renames import as_template, fill_numbers, is_plain_text, numbers_in
from ckptkit.align.writing.to_rules import Suggestion
from ckptkit.comparison.experts import StackedExperts, find_stacked_experts
from ckptkit.comparison.numbered import NumberedFamily
from ckptkit.core.checkpoint import TensorInfo

__all__ = ["expert_rules"]

_VARIABLES = "ijklmnopqrstuvwxyz"
_CONFIDENCE = 0.85


def expert_rules(
    expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo], digests: Digests
) -> tuple[list[Suggestion], dict[str, bool]]:
    """Return the rules for experts that one side has in one tensor, and whether the bytes of expected keys are equal.

    Digests correct the order of gate and up.
    """
    rules: list[Suggestion] = []
    proofs: dict[str, bool] = {}
    for is_joined in (True, False):
        wholes, parts = (expected, found) if is_joined else (found, expected)
        groups: dict[object, list[StackedExperts]] = defaultdict(list)
        for one in find_stacked_experts(_shapes(wholes), _shapes(parts)):
            if len({wholes[one.key].dtype, *(parts[key].dtype for key in one.parts)}) > 1:
                continue
            ordered, are_equal = _compared(one, digests, is_joined=is_joined)
            if are_equal is not None:
                proofs |= dict.fromkeys((one.key,) if is_joined else one.parts, are_equal)
            names = (ordered.key, *(text for family in ordered.families for text in (family.head, family.tail)))
            groups[tuple(map(as_template, names)), ordered.join].append(ordered)
        for group in groups.values():
            rules += _rules(group, expected, found, is_joined=is_joined)
    return rules, proofs


def _shapes(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in infos.items() if info.kind == "dense"}


def _compared(one: StackedExperts, digests: Digests, *, is_joined: bool) -> tuple[StackedExperts, bool | None]:
    """Return the experts in the order that gives equal bytes, and whether one does; None if this cannot be known."""
    result = None
    for families in dict.fromkeys((one.families, one.families[::-1])) if one.is_in_order else ():
        ordered = replace(one, families=families)
        parts = ordered.parts_as_stored
        result = digests.are_joined((one.key,), parts) if is_joined else digests.are_joined(parts, (one.key,))
        if result is None or result:
            return ordered, result
    return one, result


def _rules(
    group: Sequence[StackedExperts],
    expected: Mapping[str, TensorInfo],
    found: Mapping[str, TensorInfo],
    *,
    is_joined: bool,
) -> list[Suggestion]:
    """Return one rule for the experts of all layers if its patterns match nothing else, else one for each layer."""
    names = [name for one in group for name in (one.key, *one.parts)]
    if not all(map(is_plain_text, names)):
        return []
    sources = [key for one in group for key in (one.parts if is_joined else (one.key,))]
    templates = Counter(map(as_template, found))
    are_alone = sum(templates[name] for name in set(map(as_template, sources))) == len(set(sources))
    rules = []
    for members in [group] if are_alone else [[one] for one in group]:
        first = members[0]
        count = len(numbers_in(first.key))
        variables = _VARIABLES[:count] if are_alone and len(members) > 1 else None
        given = [f"{{{name}:int}}" for name in variables] if variables is not None else numbers_in(first.key)
        taken = [f"{{{name}}}" for name in variables] if variables is not None else numbers_in(first.key)
        keys: dict[str, tuple[str, ...]] = {}
        for one in members:
            keys |= {one.key: one.parts} if is_joined else dict.fromkeys(one.parts, (one.key,))
        old: tuple[str, ...]
        if is_joined:
            # The experts are gathered: their number is in no new name.
            old = tuple(_family_name(family.head, "{expert:int}", family.tail, given) for family in first.families)
            new: tuple[str, ...] = (fill_numbers(first.key, taken),)
        else:
            old = (fill_numbers(first.key, given),)
            new = tuple(
                _family_name(family.head, str(number), family.tail, taken)
                for family in first.families
                for number in range(family.count)
            )
        operations = first.join if is_joined else first.divide
        why = "all experts of a layer, in the order of their numbers"
        if len(first.families) > 1:
            why += f"; {' before '.join(map(_last_name, first.families))}, which no shape shows"
        elements = sum(expected[key].elements for key in keys)
        rules.append(Suggestion(old, new, operations, why, _CONFIDENCE, keys, elements))
    return rules


def _last_name(family: NumberedFamily) -> str:
    """Return the name of the matrix, such as ``w1``."""
    return family.tail.strip("./").removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _family_name(head: str, expert: str, tail: str, numbers: Sequence[str]) -> str:
    count = len(numbers_in(head))
    return f"{fill_numbers(head, numbers[:count])}{expert}{fill_numbers(tail, numbers[count:])}"
