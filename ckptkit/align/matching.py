"""Match two checkpoints: first stacks of layers, then modules.

Shapes show neither whether a square matrix is transposed nor the row order of rotary embeddings. Such pairs are
checked again at the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.align.evidence import Digests, ModuleMatch, TensorLink, best_shift, match_modules
from ckptkit.align.modules import LayeredModule, group_into_modules
from ckptkit.align.pairing import ModulePair, Scope, Undecided
from ckptkit.comparison.roles import split_words, word_overlap
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["EQUAL_BYTES", "Matching", "match_checkpoints"]

EQUAL_BYTES = "equal bytes"

_MIN_OVERLAP, _MIN_MARGIN = 0.3, 0.05
_MAX_STACK_PAIRS = 10_000
_TRANSPOSE = parse_operation("transpose")
_EMBEDDING_ROLES = ("word_embedding", "position_embedding", "type_embedding")
_ROTATED_ROLES = frozenset({"query", "key", "qkv"})
_ROTARY = "with rotary embeddings the rows may be in another order (rope_permute), which the shape does not show"
Stacks = dict[str, list[LayeredModule]]


@dataclass(slots=True)
class Matching:
    """The paired modules, the undecided modules, and modules with equal names but different shapes."""

    pairs: list[ModulePair] = field(default_factory=list)
    undecided: list[Undecided] = field(default_factory=list)
    unequal: list[tuple[LayeredModule, LayeredModule]] = field(default_factory=list)


def match_checkpoints(
    expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo], digests: Digests
) -> Matching:
    """Return the pairs of expected and found modules; equal bytes, by ``digests``, decide before names and shapes."""
    in_order = not (_is_sorted(expected) or _is_sorted(found))
    expected_modules, found_modules = group_into_modules(expected), group_into_modules(found)
    may_rotate = not any(map(_adds_positions, (*expected_modules, *found_modules)))
    result = Matching()
    result.pairs += _pair_by_digests(expected_modules, found_modules, digests)
    expected_modules, found_modules = _without_paired(expected_modules, found_modules, result.pairs)
    expected_stacks, found_stacks = _group_by_stack(expected_modules), _group_by_stack(found_modules)
    outside = Scope(
        [module for module in expected_modules if module.stack is None],
        [module for module in found_modules if module.stack is None],
        in_order=in_order,
    )
    scopes = [outside]
    stack_pairs, tied = _match_stacks(expected_stacks, found_stacks, result.pairs)
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
    _transpose_squares(result)
    if may_rotate:
        _reject_rotary(result)
    _reject_unequal_bytes(result, digests)
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


def _without_paired(
    expected_modules: Iterable[LayeredModule], found_modules: Iterable[LayeredModule], pairs: Iterable[ModulePair]
) -> tuple[list[LayeredModule], list[LayeredModule]]:
    paired = {id(module) for pair in pairs for module in (*pair.expected, *pair.found)}
    unpaired_expected, unpaired_found = (
        [module for module in modules if id(module) not in paired] for modules in (expected_modules, found_modules)
    )
    return unpaired_expected, unpaired_found


def _pair_by_digests(
    expected_modules: Sequence[LayeredModule], found_modules: Sequence[LayeredModule], digests: Digests
) -> list[ModulePair]:
    """Return the pairs of modules that share bytes with each other and with no third module."""
    owners: list[dict[str, LayeredModule]] = []
    for modules in (expected_modules, found_modules):
        members = [(module, member) for module in modules for member in module.members.values()]
        owners.append({info.key: module for module, member in members for info in member.tensors.values()})
    votes = {(owners[0][expected_key], owners[1][found_key]) for expected_key, found_key in digests.unique_pairs()}
    expected_votes, found_votes = (Counter(vote[side] for vote in votes) for side in (0, 1))
    pairs = []
    for expected, found in sorted(votes, key=lambda vote: vote[0].order):
        match = match_modules(expected, found) if expected_votes[expected] == found_votes[found] == 1 else None
        if match is not None and not any(link.operations for link in match.links):
            pairs.append(ModulePair((expected,), (found,), match, EQUAL_BYTES, 1.0, has_equal_bytes=True))
    return pairs


def _reject_unequal_bytes(result: Matching, digests: Digests) -> None:
    """Make pairs with different bytes undecided if the bytes of most other pairs are equal: names may mislead."""
    shares = [_share_of_equal_bytes(pair, digests) for pair in result.pairs]
    if 2 * sum(share == 1 for share in shares) <= sum(share is not None for share in shares):
        return
    accepted = []
    for pair, share in zip(result.pairs, shares, strict=True):
        if share == 0:
            why = "the bytes of the tensor differ, but the bytes of most tensors are equal"
            result.undecided.append(Undecided(pair.expected, pair.found, why, pair))
        else:
            accepted.append(pair)
    result.pairs = accepted


def _share_of_equal_bytes(pair: ModulePair, digests: Digests) -> float | None:
    """Return the share of a pair's tensors that have equal bytes; None if no digests are known."""
    keys = (
        (link.expected[0].tensors[shifted].key, link.found[0].tensors[index].key)
        for link in pair.match.links
        if not link.operations
        for shifted, index in pair.match.index_pairs(link)
    )
    results = [equal for expected, found in keys if (equal := digests.are_equal(expected, found)) is not None]
    return sum(results) / len(results) if results else None


def _count_shapes(modules: Iterable[LayeredModule]) -> Counter[tuple[int, ...]]:
    """Return how often each shape occurs, with sorted sizes, so that a transposed matrix counts as the same."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for module in modules:
        for member in module.members.values():
            shapes.update(tuple(sorted(info.shape)) for info in member.tensors.values())
    return shapes


def _match_stacks(
    expected: Stacks, found: Stacks, known: Iterable[ModulePair]
) -> tuple[list[tuple[str, str]], list[tuple[set[str], set[str]]]]:
    """Return which stacks of layers match by their shapes and names, and groups of stacks that look the same.

    A pair in ``known`` is evidence that the stacks of its modules match.
    """
    votes = Counter((pair.expected[0].stack, pair.found[0].stack) for pair in known)
    expected_shapes, found_shapes = (
        {name: _count_shapes(modules) for name, modules in stacks.items()} for stacks in (expected, found)
    )
    scores: dict[tuple[str, str], float] = {}
    if len(expected) * len(found) <= _MAX_STACK_PAIRS:
        for expected_name, shapes in expected_shapes.items():
            for found_name, other_shapes in found_shapes.items():
                score = _share_of_common_elements(shapes, other_shapes)
                if score >= _MIN_OVERLAP or expected_name == found_name or votes[expected_name, found_name]:
                    by_name = 0.2 * word_overlap(split_words(expected_name), split_words(found_name))
                    by_name += expected_name == found_name
                    scores[expected_name, found_name] = score + by_name + 2 * (votes[expected_name, found_name] > 0)
    pairs: list[tuple[str, str]] = []
    tied: list[tuple[set[str], set[str]]] = []
    while scores:
        best = max(scores, key=lambda pair: scores[pair])
        rivals = [
            score for pair, score in scores.items() if pair != best and (pair[0] == best[0] or pair[1] == best[1])
        ]
        if all(score <= scores[best] - _MIN_MARGIN for score in rivals):
            pairs.append(best)
            expected_names, found_names = {best[0]}, {best[1]}
        else:
            expected_names, found_names = {best[0]}, {best[1]}
            for expected_name, found_name in scores:  # every stack that shares a candidate with these is undecided too
                if expected_name in expected_names or found_name in found_names:
                    expected_names.add(expected_name)
                    found_names.add(found_name)
            tied.append((expected_names, found_names))
        scores = {
            pair: score
            for pair, score in scores.items()
            if pair[0] not in expected_names and pair[1] not in found_names
        }
    return pairs, tied


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
    shapes = [link.found[0].tensors[index].shape for _, index in match.index_pairs(link)]
    return all(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)


def _transpose_squares(result: Matching) -> None:
    """Transpose square matrices if all other matrices of the same name are transposed: their shape shows nothing.

    If only some matrices of the same name are transposed, the pairs of the square matrices become undecided.
    """
    transposed_kinds = _transposed_kinds(result.pairs)
    for number, pair in enumerate(result.pairs):
        links: list[TensorLink] = []
        is_mixed = is_changed = False
        for link in pair.match.links:
            leaves = link.expected[0].leaf, link.found[0].leaf
            stack = pair.found[0].stack
            siblings = transposed_kinds.get((stack, *leaves)) or transposed_kinds.get((None, *leaves)) or {False}
            is_open = not link.operations and not pair.has_equal_bytes and _is_square(link, pair.match)
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
            shapes = [info.shape for info in link.found[0].tensors.values()]
            if all(len(shape) == 2 for shape in shapes) and not _is_square(link, pair.match):
                for stack in {pair.found[0].stack, None}:
                    kinds[stack, link.expected[0].leaf, link.found[0].leaf].add(_TRANSPOSE in link.operations)
    return kinds


def _adds_positions(module: LayeredModule) -> bool:
    """Return whether a module adds position embeddings or biases, so that queries and keys are not rotated."""
    words = {word for text in module.path.texts for word in split_words(text)}
    return bool(words & {"wpe", "pos", "relative", "rel", "alibi"}) and not words & {"rotary", "rope"}


def _reject_rotary(result: Matching) -> None:
    """Make queries and keys undecided if another implementation may store the rows in another order."""
    accepted = []
    for pair in result.pairs:
        roles = {module.role for module in (*pair.expected, *pair.found)}
        is_same_code = [module.path_in_layer for module in pair.expected] == [
            module.path_in_layer for module in pair.found
        ]
        if is_same_code or pair.has_equal_bytes or not roles & _ROTATED_ROLES:
            accepted.append(pair)
        else:
            result.undecided.append(Undecided(pair.expected, pair.found, _ROTARY, pair))
    result.pairs = accepted
