"""Which keys of one checkpoint are which of another: rules with evidence, and what is not decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.align.evidence import Contents, digests_of
from ckptkit.align.matching import BYTES, Matching, match
from ckptkit.align.modules import Module, modules_of
from ckptkit.align.pairing import Doubt, Pair
from ckptkit.align.to_rules import Prefix, Suggestion, fitting_presets, rule_table, rule_text, suggestions_of
from ckptkit.comparison import count_prefixes
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.progress import Progress
from ckptkit.core.text import plural
from ckptkit.core.torch_bridge import StateDictLike, as_checkpoint
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Rules
from ckptkit.rules.parse import as_rules

__all__ = ["Alignment", "Ambiguity", "Suggestion", "suggest_rules"]

_MOST_CANDIDATES = 16
Shown = Mapping[str, TensorInfo]  # keys as they are compared; each tensor has its own


@dataclass(frozen=True, slots=True)
class Ambiguity:
    """Tensors of which each could be each: ``candidates`` are the rules that would fit, none of them proved."""

    expected: tuple[TensorInfo, ...]
    found: tuple[TensorInfo, ...]
    why: str
    candidates: tuple[Suggestion, ...]


@dataclass(frozen=True)
class Alignment:
    """The result of a search: suggestions that make ``found`` what is expected, and what they leave open.

    ``same`` are keys that need no rule. ``unequal`` have one name and two shapes. ``missing`` are expected and
    ``unexpected`` found, and nothing fits them. ``presets`` are those that fill every key expected.
    """

    expected: Checkpoint
    found: Checkpoint
    same: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]
    ambiguous: tuple[Ambiguity, ...]
    unequal: tuple[tuple[TensorInfo, TensorInfo], ...]
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[TensorInfo, ...]
    presets: tuple[str, ...] = field(default=())

    @property
    def share(self) -> float:
        """Share of the expected elements that ``same`` and the rules fill, between 0 and 1; 1 where there is none."""
        wanted = sum(info.elements for info in self.expected.values())
        filled = sum(self.expected[key].elements for key in self.same) + sum(one.elements for one in self.suggestions)
        return filled / wanted if wanted else 1.0

    @property
    def complete(self) -> bool:
        """Whether every key expected is filled by rules that are certain enough to be written."""
        return not self.missing and not self.ambiguous and not self.unequal

    @property
    def rules(self) -> Rules:
        """The suggestions as every function takes them: ``load_into(model, found, alignment.rules)``."""
        return as_rules(rule_table(self.suggestions))

    def toml(self) -> str:
        """Return the rules as the text of a rule file, what is ambiguous in comments."""
        count = len(self.same) + sum(len(one.keys) for one in self.suggestions)
        title = [
            f"From {self.found.path} to {self.expected.path}.",
            f"{count:,} of {plural(len(self.expected), 'tensor')} explained, {len(self.same):,} by the name they have.",
        ]
        doubts = [(_doubtful(one), list(one.candidates)) for one in self.ambiguous]
        return rule_text(title, self.suggestions, doubts)


def _doubtful(one: Ambiguity) -> str:
    return f"{plural(len(one.expected), 'tensor')}: {one.why}"


def suggest_rules(
    expected: StateDictLike, found: StateDictLike, *, digests: bool = False, progress: Progress | None = None
) -> Alignment:
    """Return the rules by which the keys of ``found`` become those ``expected``, each with its evidence.

    Either side is a Module, a Checkpoint, or a mapping of tensors or of ``TensorInfo``. Names, shapes and the order of
    keys decide; with ``digests`` the bytes of both do first, and ``progress`` is told how many were read. What they do
    not decide is ambiguous, and never a rule. Raises ``ModelError`` for what is no checkpoint, ``PlanError``
    where digests are asked of a mere description.
    """
    left, right = as_checkpoint(expected, "expected"), as_checkpoint(found, "found")
    contents = digests_of(left, right, progress) if digests else Contents()
    prefix, shown = _without_prefix(left, right)
    made = match(left, shown, contents)
    same, rules = _proved(made, left, right, shown, prefix)
    return _alignment(made, left, right, same, tuple(_with_bytes(one, contents) for one in rules))


def _with_bytes(one: Suggestion, contents: Contents) -> Suggestion:
    """Return the rule with what the bytes of its tensors say."""
    if one.operations or one.why == BYTES:
        return one
    told = [equal for key, (taken, *_) in one.keys.items() if (equal := contents.equal(key, taken)) is not None]
    if not any(told):
        return one
    count = "all" if len(told) == len(one.keys) and all(told) else f"{sum(told):,} of {len(one.keys):,}"
    confidence = 1.0 if count == "all" else one.confidence
    return replace(one, why=f"{one.why}; {BYTES} in {count}", confidence=confidence)


def _without_prefix(left: Checkpoint, right: Checkpoint) -> tuple[Prefix | None, Shown]:
    """Return a prefix that explains most of what differs, and the keys of found as they would be without it."""
    missing = {key: info.shape for key, info in left.items() if key not in right}
    unexpected = {key: info.shape for key, info in right.items() if key not in left}
    strip, add = count_prefixes(missing, unexpected)
    options = [(count, Prefix(text)) for text, count in strip.items()]
    options += [(count, Prefix(text, added=True)) for text, count in add.items()]
    best, prefix = max(options, key=lambda option: option[0], default=(0, Prefix()))
    if best == 0 or 2 * best < min(len(missing), len(unexpected)):
        return None, right
    shown = {_seen(key, prefix) if key in unexpected else key: info for key, info in right.items()}
    return (prefix, shown) if len(shown) == len(right) else (None, right)


def _seen(key: str, prefix: Prefix) -> str:
    return f"{prefix.text}{key}" if prefix.added else key.removeprefix(prefix.text)


Intended = dict[str, tuple[str, ...]]


def _proved(
    made: Matching, left: Checkpoint, right: Checkpoint, shown: Shown, prefix: Prefix | None
) -> tuple[tuple[str, ...], tuple[Suggestion, ...]]:
    """Return the keys that need no rule and the rules for all others, shortest form first that does what is meant."""
    filled = {key: taken for one in suggestions_of(made.pairs, (), plainly=True) for key, taken in one.keys.items()}
    kept = [key for pair in made.pairs for key in _kept(pair)]
    meant: Intended = {**{key: (key,) for key in kept}, **filled}
    free = {info.key for one, _ in made.unequal for member in one.members.values() for info in member.tensors.values()}
    seen = modules_of(shown)
    for form in ("prefix", "short", "plain"):
        if form == "prefix" and prefix is None:
            continue
        rules = (
            _prefixed(made.pairs, seen, prefix)
            if form == "prefix" and prefix
            else suggestions_of(made.pairs, seen, plainly=form == "plain")
        )
        if _does(rules, meant, free, left, right):
            return tuple(kept), tuple(rules)
    return (), ()


def _kept(pair: Pair) -> Iterable[str]:
    for link in pair.fit.links:
        if link.operations or len(link.expected) != 1 or len(link.found) != 1:
            continue
        for moved, index in pair.fit.pairs(link):
            key = link.expected[0].tensors[moved].key
            if key == link.found[0].tensors[index].key:
                yield key


def _prefixed(pairs: Iterable[Pair], seen: Sequence[Module], prefix: Prefix) -> list[Suggestion]:
    """Return rules of which the last is the prefix, for all that has no other."""
    others: list[Pair] = []
    keys: Intended = {}
    elements = 0
    for pair in pairs:
        plain = len(pair.found) == len(pair.expected) == 1 and pair.expected[0].path == pair.found[0].path
        links = []
        for link in pair.fit.links:
            if not plain or link.operations or any(pair.fit.shift) or link.expected[0].name != link.found[0].name:
                links.append(link)
                continue
            for moved, index in pair.fit.pairs(link):
                info, other = link.expected[0].tensors[moved], link.found[0].tensors[index]
                if info.key != other.key:
                    keys[info.key] = (other.key,)
                    elements += info.elements
        if links:
            others.append(replace(pair, fit=replace(pair.fit, links=tuple(links))))
    old, new = prefix.rule
    what = "added to" if prefix.added else "taken off"
    last = Suggestion((old,), (new,), (), f"one prefix {what} all of them", 0.98, keys, elements)
    return [*suggestions_of(others, seen), last]


def _does(rules: Sequence[Suggestion], meant: Intended, free: set[str], left: Checkpoint, right: Checkpoint) -> bool:
    """Return whether rules fill every key as it is meant, and no other key expected."""
    try:
        key_map = apply_rules(as_rules(rule_table(rules)), right)
        made, infos = key_map.outputs(), key_map.describe(right)
    except RuleError:
        return False
    for key in left:
        how = made.get(key)
        if key in meant:
            if how is None or how.sources != meant[key] or infos[key].shape != left[key].shape:
                return False
        elif how is not None and key not in free and how.sources != (key,):
            return False
    return True


def _alignment(
    made: Matching, left: Checkpoint, right: Checkpoint, same: tuple[str, ...], rules: tuple[Suggestion, ...]
) -> Alignment:
    filled = {*same, *(key for one in rules for key in one.keys)}
    used = {*same, *(key for one in rules for taken in one.keys.values() for key in taken)}
    ambiguous = []
    for doubt in made.doubts:
        one = _ambiguity(doubt, filled, used)
        if one is not None:
            ambiguous.append(one)
    unequal = [
        (info, other.members[kind].tensors[index])
        for one, other in made.unequal
        for kind, member in one.members.items()
        for index, info in member.tensors.items()
        if kind in other.members
        and index in other.members[kind].tensors
        and other.members[kind].tensors[index].shape != info.shape
        and info.key not in filled
    ]
    told = {info.key for one in ambiguous for info in one.expected} | {info.key for info, _ in unequal}
    seen = {info.key for one in ambiguous for info in one.found} | {other.key for _, other in unequal}
    missing = tuple(info for key, info in left.items() if key not in filled and key not in told)
    presets = fitting_presets(left, right) if ambiguous or missing else ()
    return Alignment(
        left,
        right,
        same,
        rules,
        tuple(ambiguous),
        tuple(unequal),
        missing,
        tuple(info for key, info in right.items() if key not in used and key not in seen),
        presets,
    )


def _ambiguity(doubt: Doubt, filled: set[str], used: set[str]) -> Ambiguity | None:
    sides = [
        tuple(info for module in modules for member in module.members.values() for info in member.tensors.values())
        for modules in (doubt.expected, doubt.found)
    ]
    expected = tuple(info for info in sides[0] if info.key not in filled)
    found = tuple(info for info in sides[1] if info.key not in used)
    if not expected or not found:
        return None
    pairs = [doubt.pair] if doubt.pair else _each_with_each(doubt)
    return Ambiguity(expected, found, doubt.why, tuple(suggestions_of(pairs, ())))


def _each_with_each(doubt: Doubt) -> list[Pair]:
    from ckptkit.align.evidence import fit

    made: list[Pair] = []
    if len(doubt.expected) * len(doubt.found) <= _MOST_CANDIDATES:
        for one in doubt.expected:
            for other in doubt.found:
                how = fit(one, other)
                if how is not None:
                    made.append(Pair((one,), (other,), how, doubt.why, 0.0))
    return made
