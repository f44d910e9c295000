"""``suggest_rules``: find the rules that turn the keys of one checkpoint into the keys of another, with evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ckptkit.align.evidence import Digests, match_modules, read_digests
from ckptkit.align.matching import EQUAL_BYTES, Matching, match_checkpoints
from ckptkit.align.modules import LayeredModule, group_into_modules
from ckptkit.align.pairing import ModulePair, Undecided
from ckptkit.align.quantized import QuantizedSides
from ckptkit.align.to_rules import Prefix, Suggestion, fitting_presets, rule_file, rule_table, suggestions_for
from ckptkit.comparison import count_prefixes
from ckptkit.core.arguments import require_flags, require_progress
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.patterns import literal
from ckptkit.core.progress import Progress
from ckptkit.core.result import Result
from ckptkit.core.text import plural
from ckptkit.errors import RuleError
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.load import as_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.positions import PositionNames, name_positions

__all__ = ["Alignment", "Ambiguity", "Suggestion", "suggest_rules"]

_MAX_CANDIDATES = 16
_PREFIX_CONFIDENCE = 0.98
_POSITION_CONFIDENCE = 0.9
SourcesByKey = dict[str, tuple[str, ...]]  # expected key -> found keys


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """Tensors that could be matched in several ways, or in one way that nothing proves.

    Attributes:
        expected: The expected tensors.
        found: The found tensors that could become the expected tensors.
        why: Why no rule was written.
        candidates: The rules that are possible.
    """

    expected: tuple[TensorInfo, ...]
    found: tuple[TensorInfo, ...]
    why: str
    candidates: tuple[Suggestion, ...]


@dataclass(frozen=True, repr=False)
class Alignment(Result):
    """The rules that rename the found keys to the expected keys, and the tensors without a rule.

    Attributes:
        expected: The checkpoint with the expected keys.
        found: The checkpoint with the keys that the rules rename.
        same: Keys that need no rule.
        suggestions: The suggested rules.
        ambiguous: Tensors that could be matched in several ways.
        unequal: Expected and found tensors with the same name and different shapes.
        missing: Expected tensors that no found tensor fits.
        unexpected: Found tensors that fit no expected tensor.
        presets: The names of the presets that fill every expected key.
        note: A sentence about weights that are quantised on one side only, or an empty string.

    Example:
        >>> alignment = ckptkit.suggest_rules("fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt")
        >>> alignment
        <Alignment: 0 with the same name, 1 rule, 0 ambiguous, 0 missing>
        >>> ckptkit.diff("fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt", alignment.rules).different
        False
    """

    _truth: ClassVar[str] = "ask for .complete"

    expected: Checkpoint
    found: Checkpoint
    same: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]
    ambiguous: tuple[Ambiguity, ...]
    unequal: tuple[tuple[TensorInfo, TensorInfo], ...]
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[TensorInfo, ...]
    presets: tuple[str, ...] = field(default=())
    note: str = ""

    @property
    def share(self) -> float:
        """The share of the expected elements that are filled, between 0 and 1; 1 if nothing is expected."""
        wanted = sum(info.elements for info in self.expected.values())
        filled = sum(self.expected[key].elements for key in self.same)
        filled += sum(suggestion.elements for suggestion in self.suggestions)
        return filled / wanted if wanted else 1.0

    @property
    def complete(self) -> bool:
        """Whether every expected key keeps its name or is filled by a rule."""
        return not self.missing and not self.ambiguous and not self.unequal

    @property
    def in_short(self) -> str:
        """The most important numbers, on one line."""
        counts = (
            f"{plural(len(self.suggestions), 'rule')}, {len(self.ambiguous)} ambiguous, {len(self.missing)} missing"
        )
        return f"{len(self.same)} with the same name, {counts}"

    @property
    def rules(self) -> Rules:
        """The suggestions as rules, for example for ``load_into(model, found, alignment.rules)``."""
        return as_rules(rule_table(self.suggestions))

    def toml(self) -> str:
        """Return the rules as the text of a rule file, with the candidates of ambiguous tensors in comments."""
        count = len(self.same) + sum(len(suggestion.keys) for suggestion in self.suggestions)
        title = [
            f"From {self.found.path} to {self.expected.path}.",
            f"{count:,} of {plural(len(self.expected), 'tensor')} found, {len(self.same):,} under the same name.",
        ]
        undecided = [
            (f"{plural(len(ambiguity.expected), 'tensor')}: {ambiguity.why}", ambiguity.candidates)
            for ambiguity in self.ambiguous
        ]
        return rule_file(title, self.suggestions, undecided)


def suggest_rules(
    expected: CheckpointLike, found: CheckpointLike, *, digests: bool = False, progress: Progress | None = None
) -> Alignment:
    """Return rules that rename the keys of ``found`` to the keys of ``expected``, each with its evidence.

    Rules follow from the names, the shapes and the order of the keys. A tensor that fits in several ways is ambiguous
    and gets no rule. A part of a quantised weight becomes only the same part of another quantised weight.

    Args:
        expected: A path, a Module, a Checkpoint, or a mapping of tensors or of ``TensorInfo``. What is opened here is
            closed at the end; the Checkpoints in the result then still have keys, dtypes and shapes, but no bytes.
        found: The checkpoint to rename, in any of these forms.
        digests: Compare the bytes of the tensors first.
        progress: Called with the number of bytes after each chunk that is read for the digests.

    Raises:
        ModelError: One side is not a state_dict.
        PlanError: Digests are asked for, but one side is a description without bytes.
        PathError: A path cannot be read.
        FormatError: The bytes of a file cannot be read.

    Example:
        >>> suggest_rules("fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt").complete
        True
    """
    require_flags(digests=digests)
    require_progress(progress)
    with opened(expected, "expected") as expected_side, opened(found, "found") as found_side:
        return _suggest(expected_side, found_side, digests=digests, progress=progress)


def _suggest(expected: Checkpoint, found: Checkpoint, *, digests: bool, progress: Progress | None) -> Alignment:
    named = name_positions(found, expected)
    if named is not None:
        return _by_position(named, expected, found)
    known_digests = read_digests(expected, found, progress) if digests else Digests()
    prefix, found_infos = _apply_common_prefix(expected, found)
    sides = QuantizedSides(expected, found)
    matching = sides.without_wrong_pairs(match_checkpoints(expected, found_infos, known_digests))
    same, suggestions = _verified_rules(matching, expected, found, found_infos, prefix)
    return _alignment(matching, sides, same, tuple(_add_digests(rule, known_digests) for rule in suggestions))


def _by_position(named: PositionNames, expected: Checkpoint, found: Checkpoint) -> Alignment:
    """Return a rule for each numbered tensor, which names alone could not give."""
    filled = {name for names in named.names.values() for name in names}
    return Alignment(
        expected,
        found,
        (),
        tuple(
            Suggestion(
                (literal(key),),
                tuple(map(literal, names)),
                (),
                named.rule,
                _POSITION_CONFIDENCE,
                dict.fromkeys(names, (key,)),
                sum(expected[name].elements for name in names),
            )
            for key, names in named.names.items()
        ),
        (),
        (),
        tuple(info for key, info in expected.items() if key not in filled),
        tuple(found[key] for key in named.dropped),
        note=named.note,
    )


def _add_digests(suggestion: Suggestion, digests: Digests) -> Suggestion:
    """Return the suggestion with equal bytes as further evidence."""
    if suggestion.operations or suggestion.has_equal_bytes:
        return suggestion
    results = [
        equal for key, (source, *_) in suggestion.keys.items() if (equal := digests.are_equal(key, source)) is not None
    ]
    if not any(results):
        return suggestion
    is_proved = len(results) == len(suggestion.keys) and all(results)
    count = "all" if is_proved else f"{sum(results):,} of {len(suggestion.keys):,}"
    confidence = 1.0 if is_proved else suggestion.confidence
    return replace(suggestion, why=f"{suggestion.why}; {EQUAL_BYTES} in {count}", confidence=confidence)


def _apply_common_prefix(expected: Checkpoint, found: Checkpoint) -> tuple[Prefix | None, Mapping[str, TensorInfo]]:
    """Return the prefix that explains most differences, and the found tensors by their keys with that prefix changed.

    Without such a prefix, return None and the found tensors as they are.
    """
    missing = {key: info.shape for key, info in expected.items() if key not in found}
    unexpected = {key: info.shape for key, info in found.items() if key not in expected}
    removed, added = count_prefixes(missing, unexpected)
    options = [(count, Prefix(text)) for text, count in removed.items()]
    options += [(count, Prefix(text, is_added=True)) for text, count in added.items()]
    best, prefix = max(options, key=lambda option: option[0], default=(0, Prefix()))
    if best == 0 or 2 * best < min(len(missing), len(unexpected)):
        return None, found
    changed = {prefix.apply(key) if key in unexpected else key: info for key, info in found.items()}
    return (prefix, changed) if len(changed) == len(found) else (None, found)


def _verified_rules(
    matching: Matching,
    expected: Checkpoint,
    found: Checkpoint,
    found_infos: Mapping[str, TensorInfo],
    prefix: Prefix | None,
) -> tuple[tuple[str, ...], tuple[Suggestion, ...]]:
    """Return the keys that need no rule, and the rules for all other keys in the shortest form that works.

    Both are empty if no form of the rules fills the intended keys.
    """
    plain = suggestions_for(matching.pairs, (), is_plain=True)
    same = [key for pair in matching.pairs for key in _same_keys(pair)]
    intended: SourcesByKey = {key: (key,) for key in same}
    for suggestion in plain:
        intended |= suggestion.keys
    # The rules may also fill a key that is found with another shape; the key is still reported as unequal.
    ignored = {
        info.key
        for module, _ in matching.unequal
        for member in module.members.values()
        for info in member.tensors.values()
    }
    modules = group_into_modules(found_infos)
    for suggestions in _rule_forms(matching.pairs, modules, prefix):
        if _do_as_intended(suggestions, intended, ignored, expected, found):
            return tuple(same), tuple(suggestions)
    return (), ()


def _rule_forms(
    pairs: Sequence[ModulePair], modules: Sequence[LayeredModule], prefix: Prefix | None
) -> Iterator[list[Suggestion]]:
    """Yield the same rules in several forms, the shortest first."""
    if prefix is not None:
        yield _with_prefix_rule(pairs, modules, prefix)
    yield suggestions_for(pairs, modules)
    yield suggestions_for(pairs, modules, is_plain=True)


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


def _alignment(
    matching: Matching, sides: QuantizedSides, same: tuple[str, ...], suggestions: tuple[Suggestion, ...]
) -> Alignment:
    expected, found = sides.expected, sides.found
    filled = {*same, *(key for suggestion in suggestions for key in suggestion.keys)}
    used = set(same)
    for suggestion in suggestions:
        used.update(*suggestion.keys.values())
    ambiguous = []
    for undecided in matching.undecided:
        ambiguity = _ambiguity(undecided, filled, used, sides)
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


def _ambiguity(undecided: Undecided, filled: set[str], used: set[str], sides: QuantizedSides) -> Ambiguity | None:
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
    return Ambiguity(expected, found, undecided.why, tuple(suggestions_for(pairs, ())))


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
