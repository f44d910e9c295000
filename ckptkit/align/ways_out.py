"""Say which options decide where tensors fit several places equally; each option was tried, and decides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.align.model import Alignment, Ambiguity
from ckptkit.align.writing.renames import is_plain_text
from ckptkit.comparison.roles import split_leaf
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.patterns import parse_pattern
from ckptkit.core.text import listed, shell_word
from ckptkit.errors import RuleError
from ckptkit.rules.model import Rules, Stage
from ckptkit.rules.parse import parse_rules

__all__ = ["with_hints"]

_MAX_SEGMENTS = 32  # a hostile key can have a million
_MAX_HINTS = 3
_MAX_TRIES, _MAX_TENSORS = 8, 40_000  # of both sides, in all tries together; the first try can have more
_MAX_WAYS, _MAX_RENAMES = 3, 4
_Segments = tuple[str, ...]
_Way = tuple[tuple[str, str], ...]  # options with their values


@dataclass(frozen=True, slots=True)
class _Side:
    """Keys of one side that fit equally, in branches: the keys that have the same first segments."""

    branches: Mapping[_Segments, Sequence[str]]

    @classmethod
    def of(cls, keys: Iterable[str], count: int) -> _Side:
        """Return the keys in branches; numbers divide only keys that are more than ``count``, those of the other side.

        All branches have equally many keys. The weight and the bias of one module are not branches.
        """
        split = {key: tuple(key.split(".", _MAX_SEGMENTS)) for key in keys}
        depth = _common(split.values())
        branches: dict[_Segments, list[str]] = defaultdict(list)
        for key, segments in split.items():
            branches[segments[: depth + 1]].append(key)
        sizes = set(map(len, branches.values()))
        are_layers = all(name[-1].isdigit() for name in branches) and sizes != {count}
        is_module = all(
            (split_leaf(segments[-1]) or "?")[0] == "" == "".join(segments[depth + 1 :]) for segments in split.values()
        )
        is_one = len(sizes) > 1 or len(branches) == 1 or are_layers or is_module
        return cls({(): list(split)} if is_one else branches)

    @property
    def is_fork(self) -> bool:
        return len(self.branches) > 1

    @property
    def patterns(self) -> list[str]:
        """A pattern for each branch."""
        return [
            keys[0] if keys[0].count(".") == len(name) - 1 else f"{'.'.join(name)}.*"
            for name, keys in self.branches.items()
        ]


def _common(keys: Iterable[_Segments]) -> int:
    """Return how many segments all keys begin with; the last segment of a key does not count."""
    keys = list(keys)
    shortest, longest = min(keys), max(keys)
    most = min(map(len, keys)) - 1
    return next((at for at in range(most) if shortest[at] != longest[at]), most)


def with_hints(result: Alignment, try_rules: Callable[[Rules], Alignment], *, may_read: bool) -> Alignment:
    """Return the alignment with hints for its ambiguous tensors, and for those that are missing under another name.

    ``try_rules`` returns the alignment after other rules for the found keys. ``may_read`` says whether both sides have
    bytes that were not compared.
    """
    attempts = _Attempts(result, try_rules)
    hints: list[str] = []
    for group in _alike(result.ambiguous):
        hint = _hint(group, attempts) if len(hints) < _MAX_HINTS else ""
        hints += [hint] if hint else []
    if may_read and (any(map(_may_be_equal, result.ambiguous)) or _kinds(result.missing) & _kinds(result.unexpected)):
        hints.append("--digests decides where both have tensors of the same values")
    return replace(result, hints=tuple(dict.fromkeys(hints)))


def _may_be_equal(ambiguity: Ambiguity) -> bool:
    """Return whether both sides have tensors of one dtype and shape, or as many elements of one dtype in all."""
    dtypes = {info.dtype for infos in (ambiguity.expected, ambiguity.found) for info in infos}
    counts = {sum(info.elements for info in infos) for infos in (ambiguity.expected, ambiguity.found)}
    are_alike = bool(_kinds(ambiguity.expected) & _kinds(ambiguity.found))
    return are_alike or (len(dtypes) == len(counts) == 1)


def _kinds(infos: Iterable[TensorInfo]) -> set[tuple[str, tuple[int, ...]]]:
    return {(info.dtype, info.shape) for info in infos}


@dataclass(frozen=True, slots=True)
class _Group:
    """Ambiguities about the same branches."""

    expected: _Side
    found: _Side
    ambiguities: Sequence[Ambiguity]


def _alike(ambiguities: Iterable[Ambiguity]) -> Iterator[_Group]:
    """Yield the ambiguities where places fit equally, joined where they are about the same branches."""
    groups: dict[object, list[Ambiguity]] = defaultdict(list)
    for number, ambiguity in enumerate(ambiguities):
        if any(candidate.confidence for candidate in ambiguity.candidates):
            continue  # a likely pair that nothing proves
        expected, found = _sides([ambiguity])
        forks = tuple(frozenset(side.branches) if side.is_fork else frozenset() for side in (expected, found))
        groups[forks if any(forks) else number].append(ambiguity)
    for group in groups.values():
        yield _Group(*_sides(group), group)


def _sides(ambiguities: Sequence[Ambiguity]) -> tuple[_Side, _Side]:
    expected = dict.fromkeys(info.key for one in ambiguities for info in one.expected)
    found = dict.fromkeys(info.key for one in ambiguities for info in one.found)
    return _Side.of(expected, len(found)), _Side.of(found, len(expected))


class _Attempts:
    """Tries of options, up to a limit."""

    def __init__(self, result: Alignment, try_rules: Callable[[Rules], Alignment]) -> None:
        self._before = result
        self._filled = _filled(result)
        self._try_rules = try_rules
        count = len(result.expected) + len(result.found)
        self._left = min(max(_MAX_TENSORS // max(count, 1), 1), _MAX_TRIES)

    def first_that_decides(self, ways: Iterable[_Way]) -> _Way | None:
        """Return the first way that fills more tensors, with their shapes, leaves fewer ambiguous, and loses none."""
        return next(filter(self._decides, ways), None)

    def _decides(self, way: _Way) -> bool:
        rules = _with_way(self._before.given, way)
        if rules is None or self._left == 0:
            return False
        self._left -= 1
        try:
            after = self._try_rules(rules)
        except RuleError:
            return False
        are_fewer = _ambiguous(after) < _ambiguous(self._before)
        return are_fewer and _filled(after) > self._filled and len(after.unequal) <= len(self._before.unequal)


def _filled(result: Alignment) -> set[str]:
    return {*result.same, *(key for rule in result.suggestions for key in rule.keys)}


def _ambiguous(result: Alignment) -> int:
    return sum(len(one.expected) for one in result.ambiguous)


def _with_way(given: Rules, way: _Way) -> Rules | None:
    """Return the rules of a command line with more options; None where the given rules change names."""
    options: dict[str, list[str]] = defaultdict(list)
    for name, value in way:
        options[name].append(value)
    try:
        (own,) = parse_rules(**options).stages  # type: ignore[arg-type]
    except RuleError:
        return None
    if not given.stages:
        return Rules((own,))
    first = given.stages[0]
    if len(given.stages) > 1 or first.strip or first.made is not None or (first.keep and own.keep):
        return None
    if not all(rule.drops for rule in first.rules):
        return None
    return replace(given, stages=(Stage(first.keep or own.keep, (*first.rules, *own.rules)),))


def _hint(group: _Group, attempts: _Attempts) -> str:
    expected, found = group.expected, group.found
    if len(found.branches) > len(expected.branches):
        choices, ways = found, [list(_ways_to_choose(found, at)) for at in range(len(found.branches))]
    elif expected.is_fork:
        choices, ways = expected, list(_ways_to_rename(expected, found))
    else:
        return _hint_for_one(group.ambiguities[0], attempts)
    decided = [way for options in ways[:_MAX_WAYS] if (way := attempts.first_that_decides(options)) is not None]
    if not decided:
        return ""
    return f"{listed(choices.patterns, 4)} fit equally: {', or '.join(map(_as_options, decided))}"


def _ways_to_choose(found: _Side, at: int) -> Iterator[_Way]:
    """Yield the ways that leave one of the found branches."""
    patterns = found.patterns
    if all(map(_is_written, patterns)):
        yield (("keep", patterns[at]),)
        yield tuple(("drop", pattern) for number, pattern in enumerate(patterns) if number != at)


def _ways_to_rename(expected: _Side, found: _Side) -> Iterator[list[_Way]]:
    """Yield, for each order of the expected branches, the ways that name the found branches in that order."""
    branches = list(expected.branches.values())
    for start in range(len(branches)):
        renames = [
            list(_renames(given, wanted))
            for given, wanted in zip(found.branches.values(), branches[start:] + branches[:start], strict=False)
        ]
        if all(renames):
            yield [tuple(option for rename in way for option in rename) for way in zip(*renames, strict=False)]


def _renames(found: Sequence[str], expected: Sequence[str]) -> Iterator[_Way]:
    """Yield one rename of all found keys of a branch, then a rename for each of their next segments."""
    heads = []
    for keys in (found, expected):
        split = [key.split(".", _MAX_SEGMENTS) for key in keys]
        depth = _common(map(tuple, split))
        heads.append("".join(f"{segment}." for segment in split[0][:depth]))
    ours, theirs = (
        {key.removeprefix(head) for key in keys} for keys, head in zip((found, expected), heads, strict=True)
    )
    if len(ours) == len(theirs) == 1:
        yield from (
            (("rename", f"{found[0]}={expected[0]}"),) for _ in range(all(map(is_plain_text, (*found, *expected))))
        )
        return
    if not all(map(is_plain_text, heads)):
        return
    yield (("rename", f"{heads[0]}*={heads[1]}*"),)
    parts = dict.fromkeys(tail.partition(".")[0] for tail in (key.removeprefix(heads[0]) for key in found))
    if (
        ours == theirs
        and len(parts) <= _MAX_RENAMES
        and all(map(is_plain_text, parts))
        and parts.keys().isdisjoint(ours)
    ):
        yield tuple(("rename", f"{heads[0]}{part}.*={heads[1]}{part}.*") for part in parts)


def _hint_for_one(ambiguity: Ambiguity, attempts: _Attempts) -> str:
    """Return the rename that the first candidate says."""
    plain = [one for one in ambiguity.candidates if len(one.sources) == len(one.targets) == 1 and not one.operations]
    ways = [(("rename", f"{one.sources[0]}={one.targets[0]}"),) for one in plain if _is_written(one.sources[0])]
    way = attempts.first_that_decides(ways[:1])
    if way is None:
        return ""
    return f"{listed(plain[0].sources)} could be {listed(plain[0].targets)}: {_as_options(way)}"


def _is_written(pattern: str) -> bool:
    """Return whether a text is a pattern that an option can have."""
    try:
        parse_pattern(pattern)
        pattern.encode()
    except (RuleError, UnicodeEncodeError):
        return False
    return "=" not in pattern and not pattern.startswith("re:")


def _as_options(way: _Way) -> str:
    return " ".join(f"--{name} {shell_word(value)}" for name, value in way)
