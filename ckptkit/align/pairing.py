"""Pair found modules with expected modules by name, spelling, shape and order; the most certain method is first.

All other modules are listed as undecided, with their candidates, because nobody would notice a wrong guess.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from ckptkit.align.evidence import ModuleMatch, TensorLink, index_shift, match_modules
from ckptkit.align.modules import LayeredModule
from ckptkit.comparison.roles import FUSED_ROLES, are_opposite, word_overlap
from ckptkit.tensor_ops.operation import Operation
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["ModulePair", "Scope", "Undecided"]

_MAX_CANDIDATES = 100_000  # pairs of modules in one scope
_MIN_LIKENESS, _MIN_MARGIN = 0.3, 0.12
_MIN_SEQUENCE = 4  # so many modules are not in the same order by chance
_INCOMPLETE_PENALTY = 0.15


@dataclass(frozen=True, slots=True)
class ModulePair:
    """Found modules that become expected modules: usually one of each, but several if a projection is fused."""

    expected: tuple[LayeredModule, ...]
    found: tuple[LayeredModule, ...]
    match: ModuleMatch
    why: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Undecided:
    """Modules that could be paired in several ways, or a likely ``pair`` that no shape can prove."""

    expected: tuple[LayeredModule, ...]
    found: tuple[LayeredModule, ...]
    why: str
    pair: ModulePair | None = None


_Candidate = tuple[LayeredModule, LayeredModule, ModuleMatch]


@dataclass(slots=True)
class Scope:
    """The modules of one stack of layers on both sides, or the modules outside of layers.

    ``expected`` and ``found`` hold the modules that are not paired yet.
    """

    expected: list[LayeredModule]
    found: list[LayeredModule]
    layer_shift: int | None = None
    in_order: bool = False  # both sides list modules in the order of the model, not sorted by name
    pairs: list[ModulePair] = field(default_factory=list)
    undecided: list[Undecided] = field(default_factory=list)
    unequal: list[tuple[LayeredModule, LayeredModule]] = field(default_factory=list)

    def pair_all(self) -> None:
        """Pair the modules; list other modules as undecided, or as unequal if only their shapes differ."""
        self._pair_by_key(lambda module: module.path.texts, "same name", 1.0, is_exact=True)
        layered = [pair for pair in self.unequal if pair[0].stack is not None]
        if layered:  # only some of the layers may differ
            self.unequal = [pair for pair in self.unequal if pair[0].stack is None]
            self.expected += [single for expected, _ in layered for single in expected.split()]
            self.found += [single for _, found in layered for single in found.split()]
            self._pair_by_key(lambda module: module.path.texts, "same name", 1.0, is_exact=True)
        self._pair_by_key(_path_in_layer_key, "same name in its layer", 0.95, is_exact=True)
        self._pair_by_key(_words_key, "same words", 0.92)
        self._pair_by_key(lambda module: module.role or None, "known spellings: {role}", 0.9)
        self._pair_fused()
        self._pair_unnamed()
        # An index inside of a layer may be a name on the other side: mlp.0 and mlp.2 are fc1 and fc2.
        if self.layer_shift is not None and any(len(module.path.texts) > 2 for module in (*self.expected, *self.found)):
            self.expected = [single for module in self.expected for single in module.split(1)]
            self.found = [single for module in self.found for single in module.split(1)]
            self._pair_unnamed()
        self._list_undecided()

    def _pair_unnamed(self) -> None:
        while self._pair_by_likeness() or self._pair_by_shape() or self._pair_by_neighbours() or self._pair_sequence():
            pass

    def _add(self, pairs: Sequence[ModulePair]) -> bool:
        self.pairs += pairs
        self._remove([module for pair in pairs for module in (*pair.expected, *pair.found)])
        return bool(pairs)

    def _remove(self, modules: Iterable[LayeredModule]) -> None:
        removed = {id(module) for module in modules}
        self.expected = [module for module in self.expected if id(module) not in removed]
        self.found = [module for module in self.found if id(module) not in removed]

    def _pair_by_key(
        self, key: Callable[[LayeredModule], Hashable], why: str, confidence: float, *, is_exact: bool = False
    ) -> None:
        """Pair modules of equal keys that no other module has, unless their names are opposite.

        ``{role}`` in ``why`` becomes the role.
        With ``is_exact``, modules with equal keys and different shapes are listed as ``unequal``.
        """
        expected_groups, found_groups = (_group_by(key, modules) for modules in (self.expected, self.found))
        pairs, unequal = [], []
        for value, expected_modules in expected_groups.items():
            found_modules = found_groups.get(value, [])
            if len(expected_modules) != 1 or len(found_modules) != 1:
                continue
            expected, found = expected_modules[0], found_modules[0]
            match = match_modules(expected, found, self.layer_shift)
            if match is None and is_exact:
                unequal.append((expected, found))
                match = match_modules(expected, found, self.layer_shift, partly=True)
            if match is not None and not are_opposite(expected.words, found.words):
                reason = why.format(role=expected.role.replace("_", " "))
                pairs.append(ModulePair((expected,), (found,), match, reason, confidence))
        self.unequal += unequal
        self._remove([module for pair in unequal for module in pair])
        self._add(pairs)

    def _pair_fused(self) -> None:
        for fused_role, roles in FUSED_ROLES.items():
            for splits in (True, False):
                fused_side, parts_side = (self.found, self.expected) if splits else (self.expected, self.found)
                fused = [module for module in fused_side if module.role == fused_role]
                by_role = [[module for module in parts_side if module.role == role] for role in roles]
                if len(fused) != 1 or any(len(modules) != 1 for modules in by_role):
                    continue
                parts = tuple(modules[0] for modules in by_role)
                match = _match_fused(fused[0], parts, self.layer_shift, splits=splits)
                if match is not None:
                    order = "in the order of the fused name, which no shape shows"
                    why = f"{', '.join(roles)} {'split' if splits else 'fused'}, {order}"
                    expected, found = (parts, (fused[0],)) if splits else ((fused[0],), parts)
                    self._add([ModulePair(expected, found, match, why, 0.85)])

    def _candidates(self) -> list[_Candidate]:
        """Return all pairs of modules with the same tensors, shapes and layers, and without different roles."""
        found_groups = _group_by(_shape_key, self.found)
        if sum(len(found_groups.get(_shape_key(module), ())) for module in self.expected) > _MAX_CANDIDATES:
            return []
        candidates = []
        for expected in self.expected:
            for found in found_groups.get(_shape_key(expected), ()):
                if not (expected.role and found.role and expected.role != found.role):
                    match = match_modules(expected, found, self.layer_shift)
                    if match is not None:
                        candidates.append((expected, found, match))
        return candidates

    def _close_candidates(self) -> list[_Candidate]:
        """Return the candidates with the same tensors; transposed ones only if a pair found by name is transposed."""
        may_transpose = any(link.operations for pair in self.pairs for link in pair.match.links)
        return [
            (expected, found, match)
            for expected, found, match in self._candidates()
            if match.is_complete
            and (may_transpose or not any(link.operations for link in match.links))
            and (
                _has_matrix(expected)
                or _are_related(expected, found)
                or not _leaves(expected).isdisjoint(_leaves(found))
            )
            and not are_opposite(expected.words, found.words)
        ]

    def _pair_by_likeness(self) -> bool:
        scored: list[tuple[float, _Candidate]] = []
        scores_of: dict[int, list[float]] = defaultdict(list)
        for expected, found, match in self._candidates():
            score = _likeness(expected, found) - (0 if match.is_complete else _INCOMPLETE_PENALTY)
            scored.append((score, (expected, found, match)))
            scores_of[id(expected)].append(score)
            scores_of[id(found)].append(score)
        for scores in scores_of.values():
            scores.sort(reverse=True)
        pairs = []
        for score, (expected, found, match) in scored:
            is_clear = all(
                scores_of[id(module)][0] == score and (scores_of[id(module)][1:] or [-1.0])[0] <= score - _MIN_MARGIN
                for module in (expected, found)
            )
            is_likely = is_clear and score >= _MIN_LIKENESS and _are_related(expected, found)
            if is_likely and not are_opposite(expected.words, found.words):
                why = "the most similar name among the modules of this shape"
                pairs.append(ModulePair((expected,), (found,), match, why, 0.75))
        return self._add(pairs)

    def _pair_by_shape(self) -> bool:
        # Outside of layers two shapes can be equal by chance: a head of two classes, and two token types.
        return self._add(
            [
                ModulePair((expected,), (found,), match, "the only modules of this shape", 0.8)
                for expected, found, match in _only_candidates(self._close_candidates())
                if expected.stack is not None or _are_related(expected, found)
            ]
        )

    def _pair_by_neighbours(self) -> bool:
        """Pair modules that are alone between the same two paired modules, if both sides are in order."""
        anchors = [(pair.expected[0].order, pair.found[0].order) for pair in self.pairs if len(pair.found) == 1]
        anchors.sort()
        if not self.in_order or len(anchors) < 2 or anchors != sorted(anchors, key=lambda pair: pair[1]):
            return False
        starts = [[pair[side] for pair in anchors] for side in (0, 1)]
        gaps: dict[tuple[int, int], list[_Candidate]] = defaultdict(list)
        for expected, found, match in self._close_candidates():
            if expected.stack is not None:
                gaps[bisect(starts[0], expected.order), bisect(starts[1], found.order)].append((expected, found, match))
        pairs = []
        for (expected_gap, found_gap), candidates in gaps.items():
            expected, found, match = candidates[0]
            if expected_gap == found_gap and len(candidates) == 1 and 0 < expected_gap < len(anchors):
                pairs.append(ModulePair((expected,), (found,), match, "between the same neighbours", 0.6))
        return self._add(pairs)

    def _pair_sequence(self) -> bool:
        """Pair modules outside of layers if several matrices with unique shapes come in the same order."""
        matrices = [item for item in self._close_candidates() if _has_matrix(item[0]) and item[0].stack is None]
        unique = sorted(_only_candidates(matrices), key=lambda item: item[0].order)
        orders = [found.order for _, found, _ in unique]
        if not self.in_order or len(unique) < _MIN_SEQUENCE or orders != sorted(orders):
            return False
        why = f"the only modules of this shape, and {len(unique)} such modules come in the same order"
        return self._add([ModulePair((expected,), (found,), match, why, 0.6) for expected, found, match in unique])

    def _list_undecided(self) -> None:
        candidates_of: dict[int, tuple[LayeredModule, list[LayeredModule]]] = {}
        for expected, found, _ in self._candidates():
            candidates_of.setdefault(id(expected), (expected, []))[1].append(found)
        groups: dict[tuple[int, ...], tuple[list[LayeredModule], list[LayeredModule]]] = {}
        for expected, found_modules in candidates_of.values():
            groups.setdefault(tuple(map(id, found_modules)), ([], found_modules))[0].append(expected)
        for expected_modules, found_modules in groups.values():
            why = "the names do not decide between equal shapes"
            if len(expected_modules) == len(found_modules) == 1:
                why = "the shapes agree, but the names do not"
            self.undecided.append(Undecided(tuple(expected_modules), tuple(found_modules), why))


def _group_by(
    key: Callable[[LayeredModule], Hashable], modules: Iterable[LayeredModule]
) -> dict[Hashable, list[LayeredModule]]:
    groups: dict[Hashable, list[LayeredModule]] = defaultdict(list)
    for module in modules:
        value = key(module)
        if value is not None:
            groups[value].append(module)
    return groups


def _only_candidates(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return the candidates with two modules that no other candidate has."""
    expected_counts = Counter(id(expected) for expected, _, _ in candidates)
    found_counts = Counter(id(found) for _, found, _ in candidates)
    return [item for item in candidates if expected_counts[id(item[0])] == found_counts[id(item[1])] == 1]


def _path_in_layer_key(module: LayeredModule) -> Hashable:
    return (module.path_in_layer, len(module.path.texts)) if module.path_in_layer else None


def _words_key(module: LayeredModule) -> Hashable:
    return (module.words, len(module.path.texts)) if module.words else None


def _shape_key(module: LayeredModule) -> Hashable:
    return len(module.path.texts), *sorted(next(iter(module.main.tensors.values())).shape)


def _likeness(first: LayeredModule, second: LayeredModule) -> float:
    """Return how similar two names are, between 0 and 1; a shared role counts as a shared word."""
    if all(word.removesuffix(" again").isdigit() for word in first.distinct_words & second.distinct_words):
        overlap = 0.0  # a shared number alone is a position in a list, and lists count in different ways
    else:
        overlap = word_overlap(first.distinct_words, second.distinct_words)
    return (
        max(overlap, word_overlap(first.meaning, second.meaning))
        if first.role and first.role == second.role
        else overlap
    )


def _are_related(first: LayeredModule, second: LayeredModule) -> bool:
    return _likeness(first, second) > 0


def _has_matrix(module: LayeredModule) -> bool:
    """Return whether a module has a matrix; most vectors have the width of the model, so their shape says little."""
    return any(len(info.shape) > 1 for member in module.members.values() for info in member.tensors.values())


def _leaves(module: LayeredModule) -> set[str]:
    return {member.leaf for member in module.members.values()}


def _match_fused(
    fused: LayeredModule, parts: Sequence[LayeredModule], layer_shift: int | None, *, splits: bool
) -> ModuleMatch | None:
    """Return the match of a fused module with its parts, which are concatenated along dim 0 of each tensor.

    With ``splits`` the fused module was found and the parts are expected. None if the shapes do not add up.
    """
    kinds = [kind for kind in fused.members if all(kind in module.members for module in parts)]
    if not kinds or any(len(module.path.texts) != len(fused.path.texts) for module in parts):
        return None
    expected, found = (parts[0], fused) if splits else (fused, parts[0])
    shift = index_shift(expected.indices, found.indices, layer_shift)
    links = []
    for kind in kinds:
        whole, pieces = fused.members[kind], tuple(module.members[kind] for module in parts)
        if any(piece.tensors.keys() != pieces[0].tensors.keys() for piece in pieces):
            return None
        link = TensorLink(pieces, (whole,)) if splits else TensorLink((whole,), pieces)
        sizes = set()
        for expected_index, found_index in ModuleMatch(shift).index_pairs(link):
            whole_index, piece_index = (found_index, expected_index) if splits else (expected_index, found_index)
            total = whole.tensors[whole_index].shape
            shapes = [piece.tensors[piece_index].shape for piece in pieces]
            if any(len(shape) != len(total) or not shape or shape[1:] != total[1:] for shape in shapes):
                return None
            if sum(shape[0] for shape in shapes) != total[0]:
                return None
            sizes.add(tuple(shape[0] for shape in shapes))
        if len(sizes) != 1:
            return None
        operation = _fuse_or_split(sizes.pop(), splits=splits)
        links.append(TensorLink(link.expected, link.found, (operation,)))
    return ModuleMatch(shift, tuple(links))


def _fuse_or_split(sizes: Sequence[int], *, splits: bool) -> Operation:
    if not splits:
        return parse_operation({"concat": {"dim": 0}})
    if len(set(sizes)) == 1:
        return parse_operation({"split": {"dim": 0, "parts": len(sizes)}})
    return parse_operation({"split": {"dim": 0, "sizes": list(sizes)}})
