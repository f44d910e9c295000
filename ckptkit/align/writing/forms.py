"""Choose the shortest form of the rules that fills exactly the intended keys, by applying each form to all keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.align.matching import Matching
from ckptkit.align.modules import LayeredModule
from ckptkit.align.pairing import ModulePair
from ckptkit.align.prefixes import Prefix
from ckptkit.align.writing.renames import covering_patterns, short_renames
from ckptkit.align.writing.rule_files import rule_table
from ckptkit.align.writing.to_rules import Suggestion, suggestions_for
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.load import as_rules

__all__ = ["Decision", "renames_for", "verified_rules"]

_PREFIX_CONFIDENCE = 0.98
SourcesByKey = dict[str, tuple[str, ...]]  # expected key -> found keys


@dataclass(frozen=True, slots=True)
class Decision:
    """Pairs of single tensors, by expected key, that one kind of evidence decides."""

    keys: Mapping[str, str]
    why: str
    confidence: float


def renames_for(decision: Decision, expected: Mapping[str, TensorInfo], found: Iterable[str]) -> list[Suggestion]:
    """Return the rules of a decision; each matches the found keys of its pairs and no other key of ``found``."""
    return [
        Suggestion(
            (rename.source,),
            (rename.target,),
            (),
            decision.why,
            decision.confidence,
            {key: (given,) for key, given in rename.keys.items()},
            sum(expected[key].elements for key in rename.keys),
        )
        for rename in short_renames(decision.keys, tuple(found))
    ]


def verified_rules(
    matching: Matching,
    decisions: Sequence[Decision],
    made: Sequence[Suggestion],
    sides: tuple[Checkpoint, Checkpoint],
    prefix: Prefix | None,
) -> tuple[tuple[str, ...], tuple[Suggestion, ...]]:
    """Return the keys that need no rule, and the rules for all other keys in the shortest form that works.

    ``made`` are finished rules. The found tensors that ``matching`` is about have ``prefix`` changed already. Both
    results are empty if no form of the rules fills the intended keys.
    """
    expected, found = sides
    fixed = [rule for decision in decisions for rule in renames_for(decision, expected, found)]
    fixed += made
    same = [key for decision in decisions for key, given in decision.keys.items() if key == given]
    same += [key for pair in matching.pairs for key in _same_keys(pair)]
    plain = suggestions_for(matching.pairs, (), is_plain=True)
    intended: SourcesByKey = {key: (key,) for key in same}
    for suggestion in (*fixed, *plain):
        intended |= suggestion.keys
    drops = _drops(intended, found)
    # The rules may also fill a key that is found with another shape; the key is still reported as unequal.
    ignored = {
        info.key
        for module, _ in matching.unequal
        for member in module.members.values()
        for info in member.tensors.values()
    }
    for suggestions in _rule_forms(matching.pairs, matching.found, prefix, plain, sides):
        rules = [*drops, *fixed, *suggestions]
        if _do_as_intended(rules, intended, ignored, expected, found):
            return tuple(same), tuple(rules)
    return (), ()


def _drops(intended: SourcesByKey, found: Mapping[str, TensorInfo]) -> list[Suggestion]:
    """Return rules that drop the found tensors without a use whose names are the new names of other tensors."""
    used = {source for sources in intended.values() for source in sources}
    taken = [key for key in found if key in intended and intended[key] != (key,) and key not in used]
    why = "not used, and another tensor gets its name"
    patterns = covering_patterns(taken, tuple(found)) if taken else []
    return [Suggestion((pattern,), (), (), why, 1.0, {}, 0) for pattern in patterns]


def _rule_forms(
    pairs: Sequence[ModulePair],
    modules: Sequence[LayeredModule],
    prefix: Prefix | None,
    plain: list[Suggestion],
    sides: tuple[Checkpoint, Checkpoint],
) -> Iterator[list[Suggestion]]:
    """Yield the same rules in several forms, the shortest first; the last form matches only the keys of its pairs."""
    if prefix is not None:
        yield _with_prefix_rule(pairs, modules, prefix)
    yield suggestions_for(pairs, modules)
    yield plain
    by_evidence: dict[tuple[str, float], dict[str, str]] = defaultdict(dict)
    others = []
    for rule in plain:
        if rule.operations:
            others.append(rule)
        else:
            by_evidence[rule.why, rule.confidence] |= {key: source for key, (source,) in rule.keys.items()}
    decisions = [Decision(keys, *evidence) for evidence, keys in by_evidence.items()]
    yield [*(rule for decision in decisions for rule in renames_for(decision, *sides)), *others]


def _same_keys(pair: ModulePair) -> Iterator[str]:
    """Yield the keys of a pair that need no rule."""
    for link in pair.match.links:
        if link.operations or len(link.expected) != 1 or len(link.found) != 1:
            continue
        for shifted, index in pair.match.index_pairs(link):
            key = link.expected[0].tensors[shifted].key
            if key == link.found[0].tensors[index].key:
                yield key


def _with_prefix_rule(
    pairs: Iterable[ModulePair], modules: Sequence[LayeredModule], prefix: Prefix
) -> list[Suggestion]:
    """Return the rules; the last rule adds or removes the prefix of all tensors that no other rule renames."""
    others: list[ModulePair] = []
    keys: SourcesByKey = {}
    elements = 0
    for pair in pairs:
        is_one_name = len(pair.found) == len(pair.expected) == 1 and pair.expected[0].path == pair.found[0].path
        links = []
        for link in pair.match.links:
            is_same_name = is_one_name and link.expected[0].name == link.found[0].name
            if not is_same_name or link.operations or any(pair.match.shift):
                links.append(link)
                continue
            for shifted, index in pair.match.index_pairs(link):
                expected, found = link.expected[0].tensors[shifted], link.found[0].tensors[index]
                if expected.key != found.key:
                    keys[expected.key] = (found.key,)
                    elements += expected.elements
        if links:
            others.append(replace(pair, match=replace(pair.match, links=tuple(links))))
    old, new = prefix.rule
    why = f"one prefix {'added to' if prefix.is_added else 'removed from'} all tensors"
    last = Suggestion((old,), (new,), (), why, _PREFIX_CONFIDENCE, keys, elements)
    return [*suggestions_for(others, modules), last]


def _do_as_intended(
    suggestions: Sequence[Suggestion],
    intended: SourcesByKey,
    ignored: set[str],
    expected: Checkpoint,
    found: Checkpoint,
) -> bool:
    """Return whether the rules fill every key from its intended sources, and no other expected key."""
    try:
        key_map = apply_rules(as_rules(rule_table(suggestions)), found)
        outputs, infos = key_map.outputs(), key_map.describe(found)
    except RuleError:
        return False
    for key in expected:
        output = outputs.get(key)
        if key in intended:
            if output is None or output.sources != intended[key] or infos[key].shape != expected[key].shape:
                return False
        elif output is not None and key not in ignored and output.sources != (key,):
            return False
    return True
