"""Find what each expected tensor is made from: by equal bytes, by known layouts, then by names, shapes and order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from ckptkit.align.digests import Digests
from ckptkit.align.evidence import COUNTERS, match_modules
from ckptkit.align.experts import expert_rules
from ckptkit.align.layouts import LayoutNames, gguf_arrangement, peft_names
from ckptkit.align.matching import Matching, match_checkpoints
from ckptkit.align.model import Alignment, Ambiguity
from ckptkit.align.modules import LayeredModule
from ckptkit.align.pairing import ModulePair, Undecided
from ckptkit.align.prefixes import apply_common_prefix
from ckptkit.align.quantized import QuantizedSides
from ckptkit.align.writing.forms import Decision, renames_for, verified_rules
from ckptkit.align.writing.to_rules import Suggestion, fitting_presets, suggestions_for
from ckptkit.comparison.roles import are_opposite, role_of, split_leaf, split_words
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import is_float
from ckptkit.rules.model import Rules

__all__ = ["find_rules"]

EQUAL_BYTES = "equal bytes"
_MAX_CANDIDATES = 16


def find_rules(expected: Checkpoint, found: Checkpoint, digests: Digests, given: Rules) -> Alignment:
    """Return the alignment of two checkpoints; ``given`` are the rules that made the found names."""
    decisions = [Decision(digests.decided_pairs(), EQUAL_BYTES, 1.0)]
    layout = peft_names(*_rest(expected, found, decisions[0].keys))
    decisions.append(Decision(layout.pairs, layout.why, 0.95))
    pairs = {key: given for decision in decisions for key, given in decision.keys.items()}
    rest = _rest(expected, found, pairs)
    made, proofs = expert_rules(*rest, digests)
    filled = {*pairs, *(key for rule in made for key in rule.keys), *(key for keys, _ in layout.tied for key in keys)}
    used = {*pairs.values(), *(key for rule in made for keys in rule.keys.values() for key in keys)}
    used |= {key for _, keys in layout.tied for key in keys}
    open_expected = {key: info for key, info in rest[0].items() if key not in filled}
    prefix, open_found = apply_common_prefix(
        open_expected, {key: info for key, info in rest[1].items() if key not in used}
    )
    sides = QuantizedSides(expected, found)
    arrangement = gguf_arrangement(expected, found)
    matching = match_checkpoints(open_expected, open_found, digests, decisions[0].keys, arrangement)
    matching = sides.without_wrong_pairs(matching)
    decisions.append(_alone_of_their_shape(matching, filled, used, sides))
    same, rules = verified_rules(matching, decisions, made, (expected, found), prefix)
    tied = [_tied(layout, *keys, expected, found) for keys in layout.tied]
    values = _Values(digests, proofs)
    rules = tuple(map(values.add, rules))
    values.add_same(same)
    return replace(
        _alignment(matching, sides, same, rules, tied),
        equal=tuple(key for key, equal in values.results.items() if equal) if values.are_known else None,
        different=tuple(key for key, equal in values.results.items() if not equal),
        given=given,
    )


def _rest(
    expected: Mapping[str, TensorInfo], found: Mapping[str, TensorInfo], pairs: Mapping[str, str]
) -> tuple[Mapping[str, TensorInfo], Mapping[str, TensorInfo]]:
    if not pairs:
        return expected, found
    used = set(pairs.values())
    return (
        {key: info for key, info in expected.items() if key not in pairs},
        {key: info for key, info in found.items() if key not in used},
    )


def _alone_of_their_shape(matching: Matching, filled: set[str], used: set[str], sides: QuantizedSides) -> Decision:
    """Return the pairs of open tensors whose shape no other tensor has on their side, if no name contradicts."""
    alone = []
    for side, done in ((sides.expected, filled), (sides.found, used)):
        counts = Counter(info.shape for info in side.values())
        alone.append({info.shape: key for key, info in side.items() if counts[info.shape] == 1 and key not in done})
    keys = {
        key: alone[1][shape]
        for shape, key in alone[0].items()
        if shape in alone[1]
        and 0 not in shape
        and _may_be_one(sides.expected[key], sides.found[alone[1][shape]])
        and sides.are_alike(sides.expected[key], sides.found[alone[1][shape]])
    }
    paired = _paired(matching, 0, keys.keys()), _paired(matching, 1, frozenset(keys.values()))
    keys = {key: given for key, given in keys.items() if key not in paired[0] and given not in paired[1]}
    for undecided in matching.undecided if keys else ():
        if undecided.pair is not None:  # likely, but evidence is against it
            refused = {info.key for info in _tensors(undecided.found)}
            for info in _tensors(undecided.expected):
                if keys.get(info.key) in refused:
                    del keys[info.key]
    return Decision(keys, "the only tensors of this shape", 0.7)


def _paired(matching: Matching, side: int, keys: AbstractSet[str]) -> set[str]:
    """Return which of these keys are paired on one side, or are unequal to a tensor of the same name."""
    paired = {info.key for modules in matching.unequal for info in _tensors([modules[side]])} if keys else set()
    for pair in matching.pairs if keys else ():
        for link in pair.match.links:
            for member in (link.expected, link.found)[side]:
                if keys.isdisjoint(info.key for info in member.tensors.values()):
                    continue
                paired.update(member.tensors[indices[side]].key for indices in pair.match.index_pairs(link))
    return paired & keys


def _may_be_one(*infos: TensorInfo) -> bool:
    """Return whether neither the spelling of roles and kinds nor the dtypes say that two tensors differ."""
    kinds, roles, words = [], [], []
    for key in (info.key for info in infos):
        cut = max(key.rfind("."), key.rfind("/")) + 1
        leaf = split_leaf(key[cut:])
        path = (key[:cut] + leaf[0] if leaf else key).strip("./")
        kinds.append(leaf[1] if leaf else "")
        words.append(split_words(path))
        roles.append(next((role for in_layer in (True, False) if (role := role_of(path, in_layer=in_layer)[0])), ""))
    are_floats = {is_float(info.dtype) for info in infos}
    if len(are_floats) > 1 or are_opposite(*words) or len({kind in COUNTERS for kind in kinds}) > 1:
        return False
    return all("" in pair or pair[0] == pair[1] for pair in (kinds, roles))


def _tied(
    layout: LayoutNames,
    expected_keys: Iterable[str],
    found_keys: Iterable[str],
    expected: Checkpoint,
    found: Checkpoint,
) -> Ambiguity:
    expected_infos = tuple(expected[key] for key in expected_keys)
    found_infos = tuple(found[key] for key in found_keys)
    why = f"several places fit equally by {layout.why}"
    candidates = [
        rule
        for wanted in expected_infos
        for given in found_infos
        for rule in renames_for(Decision({wanted.key: given.key}, why, 0.0), expected, found)
    ]
    return Ambiguity(expected_infos, found_infos, why, tuple(candidates))


class _Values:
    """What is known about the bytes of the filled tensors."""

    def __init__(self, digests: Digests, proofs: Mapping[str, bool]) -> None:
        self._digests = digests
        self._proofs = proofs
        self.are_known = digests.sides is not None
        self.results: dict[str, bool] = {}

    def add(self, rule: Suggestion) -> Suggestion:
        """Record which tensors of a rule have equal bytes, and return the rule with that evidence."""
        if not self.are_known:
            return rule
        results = dict(self._compare(rule))
        self.results |= results
        if not results or rule.why == EQUAL_BYTES:
            return rule
        is_proved = len(results) == len(rule.keys) and all(results.values())
        equal, count = sum(results.values()), len(rule.keys)
        if is_proved:
            return replace(rule, why=f"{rule.why}; {EQUAL_BYTES} in all", confidence=1.0)
        other = len(results) - equal
        said = [f"{EQUAL_BYTES} in {equal:,} of {count:,}"] if equal else []
        said += [f"other values in {other:,} of {count:,}"] if other else []
        return replace(rule, why=f"{rule.why}; {', '.join(said)}")

    def add_same(self, keys: Iterable[str]) -> None:
        """Record which tensors with the same name have equal bytes."""
        self.results |= {key: equal for key in keys if (equal := self._digests.are_equal(key, key)) is not None}

    def _compare(self, rule: Suggestion) -> Iterator[tuple[str, bool]]:
        for key, sources in rule.keys.items():
            equal = self._proofs.get(key)
            if not rule.operations:
                equal = self._digests.are_equal(key, sources[0])
            elif equal is None and rule.operations[0].name == "concat":
                equal = self._digests.are_joined((key,), sources)
            elif equal is None and rule.operations[0].name == "split":
                parts = tuple(other for other, given in rule.keys.items() if given == sources)
                equal = self._digests.are_joined(parts, sources)
            if equal is not None:
                yield key, equal


def _alignment(
    matching: Matching,
    sides: QuantizedSides,
    same: tuple[str, ...],
    suggestions: tuple[Suggestion, ...],
    tied: list[Ambiguity],
) -> Alignment:
    expected, found = sides.expected, sides.found
    filled = {*same, *(key for suggestion in suggestions for key in suggestion.keys)}
    used = set(same)
    for suggestion in suggestions:
        used.update(*suggestion.keys.values())
    ambiguous = list(tied)
    for undecided in matching.undecided:
        ambiguity = _ambiguity(undecided, filled, used, sides, matching.found)
        if ambiguity is not None:
            ambiguous.append(ambiguity)
    unequal = [pair for modules in matching.unequal for pair in _unequal_tensors(*modules) if pair[0].key not in filled]
    listed = {info.key for ambiguity in ambiguous for info in ambiguity.expected} | {info.key for info, _ in unequal}
    listed_found = {info.key for ambiguity in ambiguous for info in ambiguity.found} | {info.key for _, info in unequal}
    missing = tuple(info for key, info in expected.items() if key not in filled and key not in listed)
    return Alignment(
        expected,
        found,
        same,
        suggestions,
        tuple(ambiguous),
        tuple(unequal),
        missing,
        tuple(info for key, info in found.items() if key not in used and key not in listed_found),
        fitting_presets(expected, found) if (ambiguous or missing) and not sides else (),
        sides.note,
    )


def _unequal_tensors(expected: LayeredModule, found: LayeredModule) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """Yield the tensors of two modules that have the same name and different shapes."""
    for kind, member in expected.members.items():
        others = found.members[kind].tensors if kind in found.members else {}
        for index, info in member.tensors.items():
            if index in others and others[index].shape != info.shape:
                yield info, others[index]


def _ambiguity(
    undecided: Undecided, filled: set[str], used: set[str], sides: QuantizedSides, all_found: Iterable[LayeredModule]
) -> Ambiguity | None:
    """Return what is open of undecided modules, or None; ``all_found`` are all found modules."""
    expected, found = (
        tuple(info for info in _tensors(modules) if info.key not in done)
        for modules, done in ((undecided.expected, filled), (undecided.found, used))
    )
    if not expected or not found:
        return None
    candidates = [undecided.pair] if undecided.pair else _all_pairs(undecided)
    pairs = [pair for pair in map(sides.without_wrong_links, candidates) if pair is not None] if sides else candidates
    if candidates and not pairs:
        return None
    return Ambiguity(expected, found, undecided.why, tuple(suggestions_for(pairs, all_found)))


def _tensors(modules: Iterable[LayeredModule]) -> Iterator[TensorInfo]:
    for module in modules:
        for member in module.members.values():
            yield from member.tensors.values()


def _all_pairs(undecided: Undecided) -> list[ModulePair]:
    """Return every possible pair of the undecided modules; empty if there are more than 16."""
    if len(undecided.expected) * len(undecided.found) > _MAX_CANDIDATES:
        return []
    return [
        ModulePair((expected,), (found,), match, undecided.why, 0.0)
        for expected in undecided.expected
        for found in undecided.found
        if (match := match_modules(expected, found)) is not None
    ]
