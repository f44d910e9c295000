"""Two checkpoints side by side: layers with layers, then module by module; and what no shape can show."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.align.evidence import Contents, Fit, Link, best_shift, fit
from ckptkit.align.modules import Index, Module, likeness, modules_of, words_of
from ckptkit.align.pairing import Doubt, Pair, Scope
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["BYTES", "Matching", "match"]

BYTES = "equal bytes"

_SAME_LAYERS, _CLEARLY = 0.3, 0.05
_TRANSPOSE = parse_operation("transpose")
_EMBEDDINGS = ("word_embedding", "position_embedding", "type_embedding")
_ROTATED = frozenset({"query", "key", "qkv"})
_ROPE = "where positions are rotated in, its rows may be in another order (rope_permute), which no shape shows"


@dataclass(slots=True)
class Matching:
    """What was paired, what is doubtful, and what has one name and two shapes."""

    pairs: list[Pair] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    unequal: list[tuple[Module, Module]] = field(default_factory=list)


def match(expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo], contents: Contents) -> Matching:
    """Return which modules of ``found`` are which of ``expected``; their ``contents`` decide first, where known."""
    in_order = not (_sorted(expected) or _sorted(found))
    left, right = modules_of(expected), modules_of(found)
    rotates = not any(map(_adds_positions, (*left, *right)))
    made = Matching()
    made.pairs += _same_contents(left, right, contents)
    left, right = _without(left, right, made.pairs)
    blocks_left, blocks_right = _layers(left), _layers(right)
    outside = Scope(
        [module for module in left if module.layers is None],
        [module for module in right if module.layers is None],
        in_order=in_order,
    )
    scopes = [outside]
    paired, tied = _same_layers(blocks_left, blocks_right, made.pairs)
    for lefts, rights in tied:
        sides = [
            tuple(module for name in names for module in blocks.pop(name))
            for blocks, names in ((blocks_left, sorted(lefts)), (blocks_right, sorted(rights)))
        ]
        made.doubts.append(Doubt(sides[0], sides[1], "in layers that are alike: nothing tells which are which"))
    for one, other in paired:
        shift = best_shift(_first(blocks_left[one]), _first(blocks_right[other]))
        scopes.append(Scope(blocks_left.pop(one), blocks_right.pop(other), shift, in_order))
    for scope in scopes:
        scope.settle()
    for scope in [scope for scope in scopes[1:] if not scope.pairs and not scope.doubts]:
        scopes.remove(scope)  # no layers of one kind after all
        blocks_left[f"{len(blocks_left)}"], blocks_right[f"{len(blocks_right)}"] = scope.left, scope.right
    # What fits as no layer may still fit one by one: the steps of a Sequential, say.
    single = Scope(
        outside.left + [one for block in blocks_left.values() for module in block for one in module.apart()],
        outside.right + [one for block in blocks_right.values() for module in block for one in module.apart()],
        in_order=in_order,
    )
    outside.doubts = []  # said again by the other
    single.settle()
    for scope in (*scopes, single):
        made.pairs += scope.pairs
        made.doubts += scope.doubts
        made.unequal += scope.unequal
    _turn_squares(made)
    if rotates:
        _doubt_rotations(made)
    _doubt_others(made, contents)
    return made


def _sorted(keys: Iterable[str]) -> bool:
    """Return whether keys are in order of their text, which says nothing about the order of a model."""
    keys = list(keys)
    return len(keys) > 2 and keys == sorted(keys)


def _first(modules: Iterable[Module]) -> set[int]:
    return {index[0] for module in modules for index in module.indices}


def _layers(modules: Iterable[Module]) -> dict[str, list[Module]]:
    layers: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        if module.layers is not None:
            layers[module.layers].append(module)
    return dict(layers)


def _without(
    left: Iterable[Module], right: Iterable[Module], pairs: Iterable[Pair]
) -> tuple[list[Module], list[Module]]:
    gone = {id(module) for pair in pairs for module in (*pair.expected, *pair.found)}
    return [one for one in left if id(one) not in gone], [one for one in right if id(one) not in gone]


def _same_contents(left: Sequence[Module], right: Sequence[Module], contents: Contents) -> list[Pair]:
    """Return the modules whose tensors have equal bytes, and never two of one side."""
    owners: list[dict[str, Module]] = []
    for modules in (left, right):
        members = [(module, member) for module in modules for member in module.members.values()]
        owners.append({info.key: module for module, member in members for info in member.tensors.values()})
    votes = {(owners[0][one], owners[1][other]) for one, other in contents.alone()}
    lefts, rights = (Counter(pair[side] for pair in votes) for side in (0, 1))
    pairs = []
    for one, other in sorted(votes, key=lambda pair: pair[0].order):
        how = fit(one, other) if lefts[one] == rights[other] == 1 else None
        if how is not None and not any(link.operations for link in how.links):
            pairs.append(Pair((one,), (other,), how, BYTES, 1.0))
    return pairs


def _doubt_others(made: Matching, contents: Contents) -> None:
    """Keep apart what differs in its bytes, where most of what else is paired does not: then the names may mislead."""
    told = [_equal(pair, contents) for pair in made.pairs]
    if 2 * sum(share == 1 for share in told) <= sum(share is not None for share in told):
        return
    kept = []
    for pair, share in zip(made.pairs, told, strict=True):
        if share == 0:
            made.doubts.append(
                Doubt(pair.expected, pair.found, "its bytes differ, where those of most are equal", pair)
            )
        else:
            kept.append(pair)
    made.pairs = kept


def _equal(pair: Pair, contents: Contents) -> float | None:
    """Return the share of a pair's tensors that have equal bytes; None where none is comparable."""
    told = [
        equal
        for link in pair.fit.links
        if not link.operations
        for moved, index in pair.fit.pairs(link)
        if (equal := contents.equal(link.expected[0].tensors[moved].key, link.found[0].tensors[index].key)) is not None
    ]
    return sum(told) / len(told) if told else None


def _profile(modules: Iterable[Module]) -> Counter[tuple[int, ...]]:
    shapes: Counter[tuple[int, ...]] = Counter()
    for module in modules:
        for member in module.members.values():
            shapes.update(tuple(sorted(info.shape)) for info in member.tensors.values())
    return shapes


def _same_layers(
    left: Mapping[str, list[Module]], right: Mapping[str, list[Module]], known: Iterable[Pair]
) -> tuple[list[tuple[str, str]], list[tuple[set[str], set[str]]]]:
    """Return the layers that are the same by what they hold, or by their names where that does not decide; and ties.

    Pairs that are ``known`` already speak for the layers that they are in.
    """
    votes = Counter((pair.expected[0].layers, pair.found[0].layers) for pair in known)
    profiles = [{name: _profile(modules) for name, modules in side.items()} for side in (left, right)]
    scores: dict[tuple[str, str], float] = {}
    if len(left) * len(right) <= 10_000:
        for one, shapes in profiles[0].items():
            for other, shapes_too in profiles[1].items():
                score = _overlap(shapes, shapes_too)
                if score >= _SAME_LAYERS or one == other or votes[one, other]:
                    named = 0.2 * likeness(words_of(one), words_of(other)) + (one == other)
                    scores[one, other] = score + named + 2 * (votes[one, other] > 0)
    paired: list[tuple[str, str]] = []
    tied: list[tuple[set[str], set[str]]] = []
    while scores:
        pair = max(scores, key=lambda pair: scores[pair])
        rivals = [
            score for other, score in scores.items() if other != pair and (other[0] == pair[0] or other[1] == pair[1])
        ]
        if all(score <= scores[pair] - _CLEARLY for score in rivals):
            paired.append(pair)
            scores = {other: score for other, score in scores.items() if other[0] != pair[0] and other[1] != pair[1]}
        else:
            lefts, rights = ({pair[side]} for side in (0, 1))
            for one, other in scores:  # all that have to do with it are as undecided
                if one in lefts or other in rights:
                    lefts.add(one)
                    rights.add(other)
            tied.append((lefts, rights))
            scores = {it: score for it, score in scores.items() if it[0] not in lefts and it[1] not in rights}
    return paired, tied


def _overlap(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> float:
    def size(shapes: Counter[tuple[int, ...]]) -> int:
        total = 0
        for shape, count in shapes.items():
            elements = count
            for length in shape:
                elements *= length
            total += elements
        return total

    return size(one & other) / max(size(one), size(other), 1)


def _is_square(link: Link, how: Fit) -> bool:
    shapes = [link.found[0].tensors[index].shape for _, index in how.pairs(link)]
    return all(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)


def _any(link: Link) -> Index:
    return next(iter(link.found[0].tensors))


def _turn_squares(made: Matching) -> None:
    """Let square matrices be transposed where all others of their kind are: their shape alone cannot tell.

    Where some are and some are not, those that would have to be transposed are more likely to be others.
    """
    seen: dict[tuple[str | None, str, str], set[bool]] = defaultdict(set)
    for pair in made.pairs:
        if pair.expected[0].part in _EMBEDDINGS or len(pair.found) != 1 or len(pair.expected) != 1:
            continue
        for link in pair.fit.links:
            shapes = [info.shape for info in link.found[0].tensors.values()]
            if all(len(shape) == 2 for shape in shapes) and not _is_square(link, pair.fit):
                turned = _TRANSPOSE in link.operations
                for layers in {pair.found[0].layers, None}:
                    seen[layers, link.expected[0].leaf, link.found[0].leaf].add(turned)
    for number, pair in enumerate(made.pairs):
        links: list[Link] = []
        mixed = turned = False
        for link in pair.fit.links:
            names = link.expected[0].leaf, link.found[0].leaf
            siblings = seen.get((pair.found[0].layers, *names)) or seen.get((None, *names)) or {False}
            squares = not link.operations and pair.why != BYTES and _is_square(link, pair.fit)
            fused = len(link.found) + len(link.expected) > 2 and len(link.found[0].tensors[_any(link)].shape) == 2
            mixed |= (squares or _TRANSPOSE in link.operations) and len(siblings) > 1
            mixed |= fused and True in siblings
            turn = squares and siblings == {True}
            turned |= turn
            note = "square, and transposed as all of its kind are"
            links.append(replace(link, operations=(_TRANSPOSE,), note=note) if turn else link)
        if mixed:
            made.doubts.append(Doubt(pair.expected, pair.found, "transposed or not: those like it do not agree", pair))
        elif turned:
            made.pairs[number] = replace(
                pair, fit=replace(pair.fit, links=tuple(links)), confidence=pair.confidence * 0.9
            )
    undecided = {id(doubt.pair) for doubt in made.doubts if doubt.pair is not None}
    made.pairs = [pair for pair in made.pairs if id(pair) not in undecided]


def _adds_positions(module: Module) -> bool:
    """Return whether a module adds positions, or biases by them: then nothing rotates queries and keys."""
    words = {word for text in module.path.texts for word in words_of(text)}
    return bool(words & {"wpe", "pos", "relative", "rel", "alibi"}) and not words & {"rotary", "rope"}


def _doubt_rotations(made: Matching) -> None:
    """Keep apart the queries and keys of another implementation, where positions may be rotated in."""
    kept = []
    for pair in made.pairs:
        parts = {module.part for module in (*pair.expected, *pair.found)}
        same = [module.rest for module in pair.expected] == [module.rest for module in pair.found]
        if same or pair.why == BYTES or not parts & _ROTATED:
            kept.append(pair)
        else:
            made.doubts.append(Doubt(pair.expected, pair.found, _ROPE, pair))
    made.pairs = kept
