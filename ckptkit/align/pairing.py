"""Which module of found is which of those expected: by content, name, spelling, shape and order, surest first.

What none of these decides stays undecided, and is listed with what it could be: a wrong guess would be silent.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from ckptkit.align.evidence import Fit, Link, fit, shift_between
from ckptkit.align.modules import FUSED, Module, likeness
from ckptkit.tensor_ops.operation import Operation
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["Doubt", "Pair", "Scope"]

_MOST = 100_000  # comparisons of likeness in one scope
_LEAST_LIKE, _MARGIN = 0.3, 0.12
_SEQUENCE = 4  # one order of four is no accident


@dataclass(frozen=True, slots=True)
class Pair:
    """Modules of found, one or several, that are those expected, with the reason."""

    expected: tuple[Module, ...]
    found: tuple[Module, ...]
    fit: Fit
    why: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Doubt:
    """Modules of which each could be each, or a pair that may hide what no shape shows."""

    expected: tuple[Module, ...]
    found: tuple[Module, ...]
    why: str
    pair: Pair | None = None


@dataclass(slots=True)
class Scope:
    """The modules of one kind of layer on both sides, or those outside of layers; paired ones leave it."""

    left: list[Module]
    right: list[Module]
    layer_shift: int | None = None
    in_order: bool = False  # whether both sides list modules as they were built, and not by their names
    pairs: list[Pair] = field(default_factory=list)
    doubts: list[Doubt] = field(default_factory=list)
    unequal: list[tuple[Module, Module]] = field(default_factory=list)

    def settle(self) -> None:
        """Pair what can be paired."""
        self._by_key(lambda module: module.path.texts, "same name", 1.0, equal=True)
        layered = [pair for pair in self.unequal if pair[0].layers is not None]
        if layered:  # some of the layers may differ, and others not
            self.unequal = [pair for pair in self.unequal if pair[0].layers is None]
            self.left += [single for one, _ in layered for single in one.apart()]
            self.right += [single for _, other in layered for single in other.apart()]
            self._by_key(lambda module: module.path.texts, "same name", 1.0, equal=True)
        self._by_key(lambda module: _placed(module, module.rest), "same name in its layer", 0.95, equal=True)
        self._by_key(lambda module: _placed(module, module.words), "same words", 0.92)
        self._by_key(lambda module: module.part or None, "known spellings", 0.9)
        self._fused()
        self._unnamed()
        # An index inside of a layer may be a name on the other side: mlp.0 and mlp.2 are fc1 and fc2.
        if self.layer_shift is not None and any(len(one.path.texts) > 2 for one in (*self.left, *self.right)):
            self.left, self.right = ([one for module in side for one in module.apart(1)] for side in self._sides())
            self._unnamed()
        self._doubtful()

    def _sides(self) -> tuple[list[Module], list[Module]]:
        return self.left, self.right

    def _unnamed(self) -> None:
        while self._by_likeness() or self._by_shape() or self._by_order() or self._in_sequence():
            pass

    def _take(self, pairs: Sequence[Pair]) -> bool:
        self.pairs += pairs
        self._leave(
            [module for pair in pairs for module in pair.expected], [module for pair in pairs for module in pair.found]
        )
        return bool(pairs)

    def _leave(self, left: Iterable[Module], right: Iterable[Module]) -> None:
        gone = {id(module) for module in (*left, *right)}
        self.left = [module for module in self.left if id(module) not in gone]
        self.right = [module for module in self.right if id(module) not in gone]

    def _by_key(self, key: Callable[[Module], Hashable], why: str, confidence: float, *, equal: bool = False) -> None:
        sides: list[dict[Hashable, list[Module]]] = []
        for modules in (self.left, self.right):
            by_key = defaultdict(list)
            for module in modules:
                if key(module) is not None:
                    by_key[key(module)].append(module)
            sides.append(by_key)
        made, unequal = [], []
        for name, lefts in sides[0].items():
            rights = sides[1].get(name, [])
            if len(lefts) != 1 or len(rights) != 1:
                continue
            how = fit(lefts[0], rights[0], self.layer_shift)
            if how is None and equal:
                unequal.append((lefts[0], rights[0]))
                how = fit(lefts[0], rights[0], self.layer_shift, partly=True)
            if how is not None:
                said = f"{why}: {lefts[0].part.replace('_', ' ')}" if why == "known spellings" else why
                made.append(Pair((lefts[0],), (rights[0],), how, said, confidence))
        self.pairs += made
        self.unequal += unequal
        self._leave(
            [*(pair.expected[0] for pair in made), *(left for left, _ in unequal)],
            [*(pair.found[0] for pair in made), *(right for _, right in unequal)],
        )

    def _fused(self) -> None:
        for name, parts in FUSED.items():
            for splits in (True, False):
                wholes, pieces = (self.right, self.left) if splits else (self.left, self.right)
                whole = [module for module in wholes if module.part == name]
                several = [[module for module in pieces if module.part == part] for part in parts]
                if len(whole) != 1 or any(len(modules) != 1 for modules in several):
                    continue
                apart = tuple(modules[0] for modules in several)
                how = _fuse(whole[0], apart, self.layer_shift, splits=splits)
                if how is not None:
                    what = "taken apart" if splits else "fused"
                    why = f"{', '.join(parts)} {what}, in the order that its name says"
                    one, other = (apart, (whole[0],)) if splits else ((whole[0],), apart)
                    self._take([Pair(one, other, how, why, 0.85)])

    def _candidates(self) -> list[tuple[Module, Module, Fit]]:
        """Return everything that could be a pair by kinds, shapes and layers, and is no contradiction by spelling."""
        shelves: dict[Hashable, list[Module]] = defaultdict(list)
        for module in self.right:
            shelves[_shelf(module)].append(module)
        if sum(len(shelves.get(_shelf(module), ())) for module in self.left) > _MOST:
            return []
        found = []
        for left in self.left:
            for right in shelves.get(_shelf(left), ()):
                if not (left.part and right.part and left.part != right.part):
                    how = fit(left, right, self.layer_shift)
                    if how is not None:
                        found.append((left, right, how))
        return found

    def _straight(self) -> list[tuple[Module, Module, Fit]]:
        """Return the candidates that are alike in every tensor; transposed ones only where names told of others."""
        turned = any(link.operations for pair in self.pairs for link in pair.fit.links)
        return [
            (left, right, how)
            for left, right, how in self._candidates()
            if how.whole
            and (turned or not any(link.operations for link in how.links))
            and (_is_matrix(left) or _related(left, right) or not _leaves(left).isdisjoint(_leaves(right)))
        ]

    def _by_likeness(self) -> bool:
        scored: dict[tuple[int, int], tuple[float, Module, Module, Fit]] = {}
        of: dict[int, list[float]] = defaultdict(list)
        for left, right, how in self._candidates():
            score = _likeness(left, right) - (0 if how.whole else 0.15)
            scored[id(left), id(right)] = (score, left, right, how)
            of[id(left)].append(score)
            of[id(right)].append(score)
        for scores in of.values():
            scores.sort(reverse=True)
        sure_ones = []
        for score, left, right, how in scored.values():
            sure = all(
                of[id(module)][0] == score and (of[id(module)][1:] or [-1.0])[0] <= score - _MARGIN
                for module in (left, right)
            )
            if sure and score >= _LEAST_LIKE and _related(left, right):
                sure_ones.append(Pair((left,), (right,), how, "the most alike in name, of those of its shape", 0.75))
        return self._take(sure_ones)

    def _by_shape(self) -> bool:
        found = self._straight()
        lefts = Counter(id(left) for left, _, _ in found)
        rights = Counter(id(right) for _, right, _ in found)
        lone = []
        for left, right, how in found:
            # Outside of layers two tensors can have one shape by chance: a head of two classes, and two token types.
            if lefts[id(left)] == rights[id(right)] == 1 and (left.layers is not None or _related(left, right)):
                lone.append(Pair((left,), (right,), how, "the only ones of their shape", 0.8))
        return self._take(lone)

    def _by_order(self) -> bool:
        anchors = [(pair.expected[0].order, pair.found[0].order) for pair in self.pairs if len(pair.found) == 1]
        anchors.sort()
        if not self.in_order or len(anchors) < 2 or anchors != sorted(anchors, key=lambda pair: pair[1]):
            return False
        starts = [[pair[side] for pair in anchors] for side in (0, 1)]
        gaps: dict[tuple[int, int], list[tuple[Module, Module, Fit]]] = defaultdict(list)
        for left, right, how in self._straight():
            if left.layers is not None:
                gaps[bisect(starts[0], left.order), bisect(starts[1], right.order)].append((left, right, how))
        lone = []
        for (before, also), items in gaps.items():
            left, right, how = items[0]
            if before == also and len(items) == 1 and 0 < before < len(anchors):
                lone.append(Pair((left,), (right,), how, "between the same neighbours", 0.6))
        return self._take(lone)

    def _in_sequence(self) -> bool:
        """Pair what has other names and no layers, where several matrices of shapes of their own come in one order."""
        found = [item for item in self._straight() if _is_matrix(item[0]) and item[0].layers is None]
        lefts = Counter(id(left) for left, _, _ in found)
        rights = Counter(id(right) for _, right, _ in found)
        lone = [item for item in found if lefts[id(item[0])] == rights[id(item[1])] == 1]
        lone.sort(key=lambda item: item[0].order)
        orders = [right.order for _, right, _ in lone]
        if not self.in_order or len(lone) < _SEQUENCE or orders != sorted(orders):
            return False
        why = f"the only ones of their shape, and {len(lone)} such come in the same order"
        return self._take([Pair((left,), (right,), how, why, 0.6) for left, right, how in lone])

    def _doubtful(self) -> None:
        groups: dict[tuple[int, ...], tuple[list[Module], list[Module]]] = {}
        of: dict[int, tuple[Module, list[Module]]] = {}
        for left, right, _ in self._candidates():
            of.setdefault(id(left), (left, []))[1].append(right)
        for left, rights in of.values():
            groups.setdefault(tuple(map(id, rights)), ([], rights))[0].append(left)
        for lefts, rights in groups.values():
            alone = len(lefts) == len(rights) == 1
            why = "of one shape, and nothing in their names" if alone else "of one shape: their names do not decide"
            self.doubts.append(Doubt(tuple(lefts), tuple(rights), why))


def _placed(module: Module, name: Hashable) -> Hashable:
    return (name, len(module.path.texts)) if name not in ("", ()) else None


def _likeness(left: Module, right: Module) -> float:
    """Return how alike two names are, those of one part of a model by what they have in front of it."""
    if all(word.isdigit() for word in set(left.words).intersection(right.words)):
        spelled = 0.0  # a number alone is a place in a list, and lists begin and count as they like
    else:
        spelled = likeness(left.words, right.words)
    return max(spelled, likeness(left.meaning, right.meaning)) if left.part and left.part == right.part else spelled


def _related(left: Module, right: Module) -> bool:
    return _likeness(left, right) > 0


def _is_matrix(module: Module) -> bool:
    """Return whether its shape says something: every second tensor of a model is a vector of its width."""
    return any(len(info.shape) > 1 for member in module.members.values() for info in member.tensors.values())


def _leaves(module: Module) -> set[str]:
    return {member.leaf for member in module.members.values()}


def _shelf(module: Module) -> Hashable:
    member = module.main
    return len(module.path.texts), *sorted(next(iter(member.tensors.values())).shape)


def _fuse(whole: Module, apart: Sequence[Module], layer_shift: int | None, *, splits: bool) -> Fit | None:
    """Return how one module is several side by side, along the first dim of each of their tensors."""
    kinds = [kind for kind in whole.members if all(kind in module.members for module in apart)]
    if not kinds or any(len(module.path.texts) != len(whole.path.texts) for module in apart):
        return None
    one, other = (apart[0], whole) if splits else (whole, apart[0])
    lead = shift_between(one.indices, other.indices, layer_shift)
    links = []
    for kind in kinds:
        pieces = tuple(module.members[kind] for module in apart)
        if any(piece.tensors.keys() != pieces[0].tensors.keys() for piece in pieces):
            return None
        link = Link(pieces, (whole.members[kind],)) if splits else Link((whole.members[kind],), pieces)
        draft = Fit(lead, (link,))
        sizes = set()
        for moved, index in draft.pairs(link):
            at, piece_at = (index, moved) if splits else (moved, index)
            total = whole.members[kind].tensors[at].shape
            shapes = [piece.tensors[piece_at].shape for piece in pieces]
            if any(len(shape) != len(total) or not shape or shape[1:] != total[1:] for shape in shapes):
                return None
            if sum(shape[0] for shape in shapes) != total[0]:
                return None
            sizes.add(tuple(shape[0] for shape in shapes))
        if len(sizes) != 1:
            return None
        (size,) = sizes
        links.append(Link(link.expected, link.found, (_operation(size, splits=splits),)))
    return Fit(lead, tuple(links))


def _operation(sizes: Sequence[int], *, splits: bool) -> Operation:
    if not splits:
        return parse_operation({"concat": {"dim": 0}})
    if len(set(sizes)) == 1:
        return parse_operation({"split": {"dim": 0, "parts": len(sizes)}})
    return parse_operation({"split": {"dim": 0, "sizes": list(sizes)}})
