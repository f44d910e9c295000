"""Match two checkpoints: first stacks of layers, then modules.

Shapes show neither whether a square matrix is transposed nor the row order of rotary embeddings. Such pairs are
checked again at the end.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from ckptkit.align.digests import Digests, Places
from ckptkit.align.evidence import ModuleMatch, TensorLink, best_shift
from ckptkit.align.layouts import Arrangement
from ckptkit.align.modules import LayeredModule, ModuleMember, group_into_modules
from ckptkit.align.pairing import ModulePair, Scope, Undecided
from ckptkit.comparison.roles import are_opposite, split_words, word_overlap
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["Matching", "match_checkpoints"]

_MIN_OVERLAP, _MIN_MARGIN = 0.3, 0.05
_MAX_STACK_PAIRS = 10_000
_TRANSPOSE = parse_operation("transpose")
_EMBEDDING_ROLES = ("word_embedding", "position_embedding", "type_embedding")
_ROTATED_ROLES = frozenset({"query", "key", "qkv"})
_ROTARY = "with rotary embeddings the rows may be in another order (rope_permute), which the shape does not show"
Stacks = dict[str, list[LayeredModule]]
_FIRST_NUMBER = re.compile(r"(?<![0-9])[0-9]+(?=[./])")


@dataclass(slots=True)
class Matching:
    """The paired modules, the undecided modules, and modules with equal names but different shapes.

    ``found`` are all found modules, paired or not.
    """

    pairs: list[ModulePair] = field(default_factory=list)
    undecided: list[Undecided] = field(default_factory=list)
    unequal: list[tuple[LayeredModule, LayeredModule]] = field(default_factory=list)
    found: Sequence[LayeredModule] = ()


def match_checkpoints(
    expected: Mapping[str, TensorInfo],
    found: Mapping[str, TensorInfo],
    digests: Digests,
    decided: Mapping[str, str],
    arrangement: Arrangement | None = None,
) -> Matching:
    """Return the pairs of expected and found modules, by names and shapes.

    ``decided`` are pairs of other tensors, which equal bytes show. They say which layers belong together.
    ``arrangement`` says which tensors of a GGUF file are stored in another form.
    """
    in_order = not (_is_sorted(expected) or _is_sorted(found))
    expected_modules, found_modules = group_into_modules(expected), group_into_modules(found)
    may_rotate = not any(map(_adds_positions, (*expected_modules, *found_modules)))
    result = Matching(found=found_modules)
    expected_stacks, found_stacks = _group_by_stack(expected_modules), _group_by_stack(found_modules)
    outside = Scope(
        [module for module in expected_modules if module.stack is None],
        [module for module in found_modules if module.stack is None],
        in_order=in_order,
    )
    scopes = [outside]
    stack_pairs, tied = _match_stacks(expected_stacks, found_stacks, decided)
    for expected_names, found_names in tied:
        tied_expected, tied_found = (
            tuple(module for name in sorted(names) for module in stacks.pop(name))
            for stacks, names in ((expected_stacks, expected_names), (found_stacks, found_names))
        )
        why = "several stacks of layers are alike, and nothing distinguishes them"
        result.undecided.append(Undecided(tied_expected, tied_found, why))
    for expected_name, found_name in stack_pairs:
        shift = best_shift(_layer_numbers(expected_stacks[expected_name]), _layer_numbers(found_stacks[found_name]))
        scopes.append(Scope(expected_stacks.pop(expected_name), found_stacks.pop(found_name), shift, in_order))
    for scope in scopes:
        scope.pair_all()
    for scope in [scope for scope in scopes[1:] if not scope.pairs and not scope.undecided]:
        scopes.remove(scope)  # the two stacks have no module in common
        expected_stacks[f"{len(expected_stacks)}"], found_stacks[f"{len(found_stacks)}"] = scope.expected, scope.found
    # Modules that match in no stack may still match one by one, such as the modules of a Sequential.
    rest_expected, rest_found = (
        outside.expected + _split_stacks(expected_stacks),
        outside.found + _split_stacks(found_stacks),
    )
    rest = Scope(rest_expected, rest_found, in_order=in_order)
    outside.undecided = []  # ``rest`` decides about these modules again
    rest.pair_all()
    for scope in (*scopes, rest):
        result.pairs += scope.pairs
        result.undecided += scope.undecided
        result.unequal += scope.unequal
    _transpose_squares(result, digests)
    _order_fused_parts(result, digests)
    if arrangement is not None:
        _reject_inexpressible(result, arrangement)
        result.pairs = [_arranged(pair, arrangement) for pair in result.pairs]
    if may_rotate:
        _reject_rotary(result, digests, arrangement)
    _reject_unequal_bytes(result, digests, decided)
    return result


def _is_sorted(keys: Iterable[str]) -> bool:
    """Return whether keys are sorted by name, so that their order says nothing about the order of the model."""
    keys = list(keys)
    return len(keys) > 2 and keys == sorted(keys)


def _layer_numbers(modules: Iterable[LayeredModule]) -> set[int]:
    return {index[0] for module in modules for index in module.indices}


def _group_by_stack(modules: Iterable[LayeredModule]) -> Stacks:
    stacks: Stacks = defaultdict(list)
    for module in modules:
        if module.stack is not None:
            stacks[module.stack].append(module)
    return dict(stacks)


def _split_stacks(stacks: Stacks) -> list[LayeredModule]:
    return [single for modules in stacks.values() for module in modules for single in module.split()]


def _reject_unequal_bytes(result: Matching, digests: Digests, decided: Mapping[str, str]) -> None:
    """Make pairs undecided that equal bytes contradict, and pairs with different bytes if most others are equal."""
    shares = [_share_of_equal_bytes(pair, digests) for pair in result.pairs]
    known = [share for share in shares if share is not None]
    equal = len(decided) + sum(share == 1 for share in known)
    are_mostly_equal = 2 * equal > len(decided) + len(known)
    places = Places.of(decided)
    accepted = []
    for pair, share in zip(result.pairs, shares, strict=True):
        if share == 0 and are_mostly_equal:
            why = "the bytes of the tensor differ, but the bytes of most tensors are equal"
        elif share is not None and share < 1 and any(digests.contradict(*keys) for keys in _plain_keys(pair)):
            why = "the names agree, but another tensor has the bytes"
        elif decided and any(_is_elsewhere(*keys, places) for keys in _plain_keys(pair)):
            why = "the names agree, but other tensors of the layer have the bytes of another layer"
        else:
            accepted.append(pair)
            continue
        result.undecided.append(Undecided(pair.expected, pair.found, why, pair))
    result.pairs = accepted


def _is_elsewhere(expected: str, found: str, places: Places) -> bool:
    """Return whether equal bytes show that a layer or block comes from another place than this pair says."""
    head = places.found_head(expected)
    return head is not None and not found.startswith(head)


def _plain_keys(pair: ModulePair) -> Iterator[tuple[str, str]]:
    """Yield the expected and the found key of each tensor that the pair does not change."""
    for link in pair.match.links:
        if not link.operations:
            for shifted, index in pair.match.index_pairs(link):
                yield link.expected[0].tensors[shifted].key, link.found[0].tensors[index].key


def _share_of_equal_bytes(pair: ModulePair, digests: Digests) -> float | None:
    """Return the share of a pair's tensors that have equal bytes; None if no digests are known."""
    if digests.sides is None:
        return None
    results = [equal for keys in _plain_keys(pair) if (equal := digests.are_equal(*keys)) is not None]
    for link in pair.match.links:
        if len(link.expected) + len(link.found) > 2:
            for shifted, index in pair.match.index_pairs(link):
                expected = tuple(member.tensors[shifted].key for member in link.expected)
                equal = digests.are_joined(expected, tuple(member.tensors[index].key for member in link.found))
                results += [] if equal is None else [equal]
    return sum(results) / len(results) if results else None


def _count_shapes(modules: Iterable[LayeredModule]) -> Counter[tuple[int, ...]]:
    """Return how often each shape occurs, with sorted sizes, so that a transposed matrix counts as the same."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for module in modules:
        for member in module.members.values():
            shapes.update(tuple(sorted(info.shape)) for info in member.tensors.values())
    return shapes


_StackPair = tuple[str, str]


def _match_stacks(
    expected: Stacks, found: Stacks, decided: Mapping[str, str]
) -> tuple[list[_StackPair], list[tuple[set[str], set[str]]]]:
    """Return which stacks of layers match by their shapes and names, and groups of stacks that look the same.

    Pairs of tensors in ``decided`` are evidence that their stacks match.
    """
    votes = {(_stack_of(wanted), _stack_of(given)) for wanted, given in decided.items()}
    expected_shapes, found_shapes = (
        {name: _count_shapes(modules) for name, modules in stacks.items()} for stacks in (expected, found)
    )
    alike: dict[_StackPair, float] = {}  # by shapes alone
    scores: dict[_StackPair, float] = {}
    if len(expected) * len(found) <= _MAX_STACK_PAIRS:
        for expected_name, shapes in expected_shapes.items():
            for found_name, other_shapes in found_shapes.items():
                score = _share_of_common_elements(shapes, other_shapes)
                pair = expected_name, found_name
                words = split_words(expected_name), split_words(found_name)
                if are_opposite(*words) and pair not in votes:
                    continue
                if score >= _MIN_OVERLAP or expected_name == found_name or pair in votes:
                    by_name = 0.2 * word_overlap(*words)
                    alike[pair] = score
                    scores[pair] = score + by_name + (expected_name == found_name) + 2 * (pair in votes)
    pairs: list[_StackPair] = []
    tied: list[tuple[set[str], set[str]]] = []
    while scores:
        best = max(scores, key=lambda pair: scores[pair])
        rivals = [score for pair, score in scores.items() if pair != best and _share_a_side(pair, best)]
        if all(score <= scores[best] - _MIN_MARGIN for score in rivals):
            pairs.append(best)
            expected_names, found_names = {best[0]}, {best[1]}
        else:
            expected_names, found_names = _with_neighbours(best, scores)
            tied.append((expected_names, found_names))
        scores = {
            pair: score
            for pair, score in scores.items()
            if pair[0] not in expected_names and pair[1] not in found_names
        }
    return _without_guessed_twins(pairs, tied, alike, votes)


def _stack_of(key: str) -> str:
    number = _FIRST_NUMBER.search(key)
    return key[: number.start()] if number else key


def _share_a_side(first: _StackPair, second: _StackPair) -> bool:
    return first[0] == second[0] or first[1] == second[1]


def _with_neighbours(start: _StackPair, pairs: Iterable[_StackPair]) -> tuple[set[str], set[str]]:
    """Return the names of both sides that are linked with a pair, directly or through other pairs."""
    expected_names, found_names = {start[0]}, {start[1]}
    waiting, is_growing = list(pairs), True
    while is_growing:
        linked = [pair for pair in waiting if pair[0] in expected_names or pair[1] in found_names]
        waiting = [pair for pair in waiting if not (pair[0] in expected_names or pair[1] in found_names)]
        expected_names |= {pair[0] for pair in linked}
        found_names |= {pair[1] for pair in linked}
        is_growing = bool(linked)
    return expected_names, found_names


def _without_guessed_twins(
    pairs: list[_StackPair],
    tied: list[tuple[set[str], set[str]]],
    alike: Mapping[_StackPair, float],
    votes: set[_StackPair],
) -> tuple[list[_StackPair], list[tuple[set[str], set[str]]]]:
    """Return the pairs and the tied stacks, where pairs of twins are tied if their names do not tell them apart.

    Twins are stacks of equal shapes, such as a student and a teacher. That one of them is left over is not evidence.
    """
    accepted = list(pairs)
    for pair in pairs:
        if pair not in accepted or pair[0] == pair[1] or pair in votes:
            continue
        twins = [
            other
            for other, score in alike.items()
            if score > alike[pair] - _MIN_MARGIN and alike[pair] > score - _MIN_MARGIN
        ]
        expected_names, found_names = _with_neighbours(pair, [other for other in twins if other[0] != other[1]])
        group = [one for one in accepted if one[0] in expected_names or one[1] in found_names]
        if len(expected_names) == len(found_names) == 1 or all(
            one in votes or one[0] == one[1] or _are_told_apart(*one, expected_names, found_names) for one in group
        ):
            continue
        accepted = [one for one in accepted if one not in group]
        tied.append((expected_names, found_names))
    return accepted, tied


def _are_told_apart(expected: str, found: str, expected_twins: Iterable[str], found_twins: Iterable[str]) -> bool:
    """Return whether two names share a word that not all of their twins have, or both have only common words."""
    own, other = _own_words(expected, expected_twins), _own_words(found, found_twins)
    return bool(own & other) or own == other


def _own_words(name: str, twins: Iterable[str]) -> set[str]:
    words = [set(split_words(twin)) for twin in twins]
    common = set.intersection(*words) if len(words) > 1 else set()
    return set(split_words(name)) - common


def _share_of_common_elements(first: Counter[tuple[int, ...]], second: Counter[tuple[int, ...]]) -> float:
    return _count_elements(first & second) / max(_count_elements(first), _count_elements(second), 1)


def _count_elements(shapes: Counter[tuple[int, ...]]) -> int:
    total = 0
    for shape, count in shapes.items():
        elements = count
        for size in shape:
            elements *= size
        total += elements
    return total


def _is_square(link: TensorLink, match: ModuleMatch) -> bool:
    shapes = (link.found[0].tensors[index].shape for _, index in match.index_pairs(link))
    return all(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)


def _transpose_squares(result: Matching, digests: Digests) -> None:
    """Transpose square matrices if all other matrices of the same name are transposed: their shape shows nothing.

    If only some matrices of the same name are transposed, the pairs of the square matrices become undecided.
    """
    transposed_kinds = _transposed_kinds(result.pairs)
    for number, pair in enumerate(result.pairs):
        links: list[TensorLink] = []
        is_mixed = is_changed = False
        has_equal_bytes = _share_of_equal_bytes(pair, digests) == 1
        for link in pair.match.links:
            leaves = link.expected[0].leaf, link.found[0].leaf
            stack = pair.found[0].stack
            siblings = transposed_kinds.get((stack, *leaves)) or transposed_kinds.get((None, *leaves)) or {False}
            is_open = not link.operations and not has_equal_bytes and _is_square(link, pair.match)
            is_fused = len(link.found) + len(link.expected) > 2
            is_matrix = len(next(iter(link.found[0].tensors.values())).shape) == 2
            is_mixed |= (is_open or _TRANSPOSE in link.operations) and len(siblings) > 1
            is_mixed |= is_fused and is_matrix and True in siblings
            if is_open and siblings == {True}:
                is_changed = True
                note = "square, and transposed like all other matrices of the same name"
                links.append(replace(link, operations=(_TRANSPOSE,), note=note))
            else:
                links.append(link)
        if is_mixed:
            why = "the matrix may be transposed: only some matrices of the same name are"
            result.undecided.append(Undecided(pair.expected, pair.found, why, pair))
        elif is_changed:
            match = replace(pair.match, links=tuple(links))
            result.pairs[number] = replace(pair, match=match, confidence=pair.confidence * 0.9)
    removed = {id(group.pair) for group in result.undecided if group.pair is not None}
    result.pairs = [pair for pair in result.pairs if id(pair) not in removed]


def _transposed_kinds(pairs: Iterable[ModulePair]) -> Mapping[tuple[str | None, str, str], set[bool]]:
    """Return whether matrices that are not square are transposed, by stack and leaf; None is for all stacks."""
    kinds: dict[tuple[str | None, str, str], set[bool]] = defaultdict(set)
    for pair in pairs:
        if pair.expected[0].role in _EMBEDDING_ROLES or len(pair.found) != 1 or len(pair.expected) != 1:
            continue
        for link in pair.match.links:
            infos = link.found[0].tensors.values()
            if all(len(info.shape) == 2 for info in infos) and not _is_square(link, pair.match):
                for stack in {pair.found[0].stack, None}:
                    kinds[stack, link.expected[0].leaf, link.found[0].leaf].add(_TRANSPOSE in link.operations)
    return kinds


def _reject_inexpressible(result: Matching, arrangement: Arrangement) -> None:
    """Make pairs undecided of which a GGUF file has other values, which no rule makes."""
    accepted = []
    for pair in result.pairs:
        members = [member for link in pair.match.links for member in _stored(link, arrangement)]
        if any(arrangement.is_inexpressible(info.key) for member in members for info in member.tensors.values()):
            why = "GGUF stores -exp(A_log), which no rule computes"
            result.undecided.append(Undecided(pair.expected, pair.found, why, pair))
        else:
            accepted.append(pair)
    result.pairs = accepted


def _stored(link: TensorLink, arrangement: Arrangement) -> tuple[ModuleMember, ...]:
    return link.expected if arrangement.is_expected else link.found


def _arranged(pair: ModulePair, arrangement: Arrangement) -> ModulePair:
    """Return the pair with the operations that undo, or make, the form of a GGUF file."""
    if len(pair.expected) != 1 or len(pair.found) != 1:
        return pair
    roles = {pair.expected[0].role, pair.found[0].role}
    links = []
    for link in pair.match.links:
        key = next(iter(_stored(link, arrangement)[0].tensors.values())).key
        change = arrangement.operation(roles, key, _other_name(pair, arrangement))
        if change is None or link.operations:
            links.append(link)
        else:
            links.append(replace(link, operations=(change[0],), note=change[1]))
    return replace(pair, match=replace(pair.match, links=tuple(links)))


def _other_name(pair: ModulePair, arrangement: Arrangement) -> str:
    """Return the last part of the module's path on the side that is not a GGUF file."""
    module = (pair.found if arrangement.is_expected else pair.expected)[0]
    return module.path_in_layer.rpartition(".")[2]


def _order_fused_parts(result: Matching, digests: Digests) -> None:
    """Put the parts of fused projections in the order that equal bytes show."""
    for number, pair in enumerate(result.pairs):
        parts = max(len(pair.expected), len(pair.found))
        if digests.sides is None or parts == 1:
            continue
        options = (_reordered(pair, order) for order in permutations(range(parts)))
        right = next((option for option in options if _share_of_equal_bytes(option, digests) == 1), pair)
        result.pairs[number] = right


def _reordered(pair: ModulePair, order: Sequence[int]) -> ModulePair:
    """Return a pair of fused modules with its parts in another order."""
    splits = len(pair.expected) > 1
    links = []
    for link in pair.match.links:
        members = tuple((link.expected if splits else link.found)[at] for at in order)
        moved = replace(link, expected=members) if splits else replace(link, found=members)
        parameters = link.operations[0].params()
        sizes = parameters.get("sizes")
        if isinstance(sizes, list):
            split = parse_operation({"split": {**parameters, "sizes": [sizes[at] for at in order]}})
            moved = replace(moved, operations=(split,))
        links.append(moved)
    modules = tuple((pair.expected if splits else pair.found)[at] for at in order)
    match = replace(pair.match, links=tuple(links))
    return replace(pair, match=match, expected=modules) if splits else replace(pair, match=match, found=modules)


def _adds_positions(module: LayeredModule) -> bool:
    """Return whether a module adds position embeddings or biases, so that queries and keys are not rotated."""
    words = {word for text in module.path.texts for word in split_words(text)}
    return bool(words & {"wpe", "pos", "relative", "rel", "alibi"}) and not words & {"rotary", "rope"}


def _reject_rotary(result: Matching, digests: Digests, arrangement: Arrangement | None) -> None:
    """Make queries and keys undecided if another implementation may store the rows in another order."""
    accepted = []
    for pair in result.pairs:
        roles = {module.role for module in (*pair.expected, *pair.found)}
        is_same_code = [module.path_in_layer for module in pair.expected] == [
            module.path_in_layer for module in pair.found
        ]
        is_arranged = any(
            link.operations[:1] and link.operations[0].name == "rope_permute" for link in pair.match.links
        ) or (arrangement is not None and arrangement.has_rows_of(_other_name(pair, arrangement)))
        if is_same_code or is_arranged or not roles & _ROTATED_ROLES or _share_of_equal_bytes(pair, digests) == 1:
            accepted.append(pair)
        else:
            result.undecided.append(Undecided(pair.expected, pair.found, _ROTARY, pair))
    result.pairs = accepted
