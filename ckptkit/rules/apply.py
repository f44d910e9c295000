"""From the keys that are there to the keys that shall be, in one simultaneous pass for each stage."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.patterns import KeyMatch, Pattern, literal, matches_any, parse_pattern
from ckptkit.core.text import plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.rules.model import Derivation, KeyMap, Rule, Rules, Stage, with_rule
from ckptkit.wrappers.explain import AUTO, Wrapping, explain_wrappers, strip_prefix

__all__ = ["apply_rules", "strip_stages"]


def strip_stages(how: str, keys: Collection[str], beside: Collection[str]) -> tuple[list[Stage], list[str]]:
    """Return the passes that undo ``how``: ``auto`` for what the table explains, else one prefix; and what to say.

    ``beside`` names what the keys' file holds besides. Raises ``RuleError`` where a prefix is not on every key.
    """
    if how != AUTO:
        wrapping = strip_prefix(how, keys)
        return [_stage(wrapping, f"--strip {shell_word(how)}")], [f"--strip: {wrapping}"]
    explanation = explain_wrappers(keys, beside)
    notes = [f"--strip auto: {wrapping}" for wrapping in explanation.wrappings]
    notes = notes or [f"--strip auto: no wrapper that is known here is on {plural(len(keys), 'key')}"]
    notes += [f"--strip auto: {note}" for note in explanation.notes]
    return [_stage(wrapping, "--strip auto") for wrapping in explanation.wrappings], notes


def _stage(wrapping: Wrapping, where: str) -> Stage:
    return Stage(rules=tuple(_rules(wrapping, where)))


def _rules(wrapping: Wrapping, where: str) -> Iterator[Rule]:
    for key in wrapping.drops:
        yield Rule((parse_pattern(literal(key)),), where=where)
    for template in wrapping.renames:
        yield Rule((template.pattern,), ((template,),), where=where)


_MOST_SOURCES = 100_000  # passes that take apart and join in turns double them each time


def apply_rules(rules: Rules, keys: Iterable[str]) -> KeyMap:
    """Return what the rules make of the keys; nothing is renamed by accident.

    Of a Checkpoint, what lies beside its tensors can tell which wrapper their names come of.
    Raises ``RuleError`` for two keys with one new name, an empty new name, a rule or a kept pattern that matches
    nothing (unless it is optional, or unused rules are allowed), and an operation that lacks one of its inputs.
    """
    if not rules.stages:
        return KeyMap({key: key for key in keys})
    state = {key: Derivation((key,)) for key in keys}
    dropped: dict[str, str] = {}
    notes: list[str] = []
    beside = [entry.path for entry in keys.entries] if isinstance(keys, Checkpoint) else []
    for stage in rules.stages:
        passes = [stage] if not stage.strip else [Stage(stage.keep)] if stage.keep else []
        for one in passes:
            state = _Pass(one, dropped, notes).over(state, allow_unused=rules.allow_unused)
        for how in stage.strip:
            undoing, said = strip_stages(how, state, beside)
            notes.extend(said)
            for one in undoing:
                state = _Pass(one, dropped, notes).over(state, allow_unused=rules.allow_unused)
        if stage.strip and stage.rules:
            state = _Pass(Stage((), stage.rules), dropped, notes).over(state, allow_unused=rules.allow_unused)
    return KeyMap.of(state, dropped, notes)


@dataclass(frozen=True, slots=True)
class _Claim:
    """Who wants a new name: what the name was before this pass, and the rule that gives it the new one."""

    name: str
    made: Derivation
    rule: Rule | None

    @property
    def label(self) -> str:
        """The key of the input where it still is one tensor of it, else the name that an earlier pass gave it."""
        return self.made.sources[0] if self.made.recipe is None else self.name


@dataclass(frozen=True, slots=True)
class _Member:
    """A tensor that goes into an operation: by which pattern of the rule, at which place, and how it is made."""

    which: int
    index: tuple[int, ...]
    name: str
    made: Derivation


@dataclass(slots=True)
class _Pass:
    """One pass over all names."""

    stage: Stage
    dropped: dict[str, str]
    notes: list[str]
    claims: dict[str, _Claim] = field(default_factory=dict)
    groups: dict[tuple[int, tuple[str, ...]], list[_Member]] = field(default_factory=dict)
    counted: dict[tuple[int, tuple[str, ...]], tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def over(self, state: Mapping[str, Derivation], *, allow_unused: bool) -> dict[str, Derivation]:
        """Return the names after this pass, in the order of those before it."""
        keep, rules = self.stage.keep, self.stage.rules
        hits = [0] * len(rules)
        table = _table(rules)
        for name, made in state.items():
            claim = _Claim(name, made, None)
            if keep and not matches_any(keep, name):
                self.leave_out(claim, "fits no --keep")
                continue
            found = _first_match(table, name)
            if found is None:
                self.claim(name, claim)
                continue
            index, which, match = found
            hits[index] += 1
            self.obey(index, which, match, claim)
        for (index, names), members in self.groups.items():
            self.finish(index, names, members)
        _refuse_unused(self.stage, state, hits, self.notes, allow_unused=allow_unused)
        return {name: claim.made for name, claim in self.claims.items()}

    def obey(self, index: int, which: int, match: re.Match[str] | KeyMatch, claim: _Claim) -> None:
        rule = self.stage.rules[index]
        if rule.drops:
            self.leave_out(claim, str(rule))
            return
        names = tuple(template.expand(match) for template in rule.templates[which])
        if "" in names and claim.name:  # a checkpoint that is one bare tensor has the key ''
            raise RuleError(f"{rule} leaves {quoted(claim.label)} without a name")
        if not rule.operations:
            for name in names:
                self.claim(name, _Claim(claim.name, with_rule(claim.made, rule), rule))
            return
        members = self.groups.setdefault((index, names), [])
        if not members:  # the names keep the place of the first tensor that goes into them
            for name in names:
                self.claim(name, _Claim(claim.name, claim.made, rule))
        members.append(_Member(which, _numbers(rule, which, match), claim.name, claim.made))

    def claim(self, name: str, newcomer: _Claim) -> None:
        """Give ``name`` to the newcomer, unless who has it keeps it, as their rules say."""
        holder = self.claims.get(name)
        if holder is None:
            self.claims[name] = newcomer
            return
        policies = {rule.on_collision for rule in (holder.rule, newcomer.rule) if rule is not None} - {"error"}
        operated = any(claim.rule is not None and claim.rule.operations for claim in (holder, newcomer))
        if len(policies) != 1 or operated:
            rules = [f"by {claim.rule}" for claim in (holder, newcomer) if claim.rule is not None and claim.rule.where]
            raise RuleError(
                f"{quoted(holder.label)} and {quoted(newcomer.label)} would both be called {quoted(name)}"
                + (f", {' and '.join(dict.fromkeys(rules))}" if rules else ""),
                hint='drop one of them, or choose in a rule file: on_collision = "first", "last" or "equal"',
            )
        (policy,) = policies
        winner, loser = (newcomer, holder) if policy == "last" else (holder, newcomer)
        if policy == "equal":
            if winner.made.recipe is not None or loser.made.recipe is not None:
                raise RuleError(f"{quoted(name)} would be made by operations, and cannot be proved equal before that")
            equals = dict.fromkeys((*winner.made.equals, *loser.made.sources, *loser.made.equals))
            winner = replace(winner, made=replace(winner.made, equals=tuple(equals)))
            self.leave_out(loser, f"has to equal {quoted(winner.label)}, which takes the name {quoted(name)}")
        else:
            self.leave_out(loser, f"{quoted(name)} is taken by {quoted(winner.label)}")
        if policy == "last":
            del self.claims[name]  # the order is that of the keys that stay
        self.claims[name] = winner

    def leave_out(self, claim: _Claim, reason: str) -> None:
        """Note for each tensor of the input that a name stands for why it is not taken by that name."""
        if claim.made.recipe is not None:
            reason = f"made into {quoted(claim.name)}: {reason}"
        for source in dict.fromkeys(claim.made.sources):
            before = self.dropped.get(source)
            self.dropped[source] = reason if before is None else f"{before}; {reason}"

    def finish(self, index: int, names: Sequence[str], members: Sequence[_Member]) -> None:
        """Give what the rule's operations make of a whole group of tensors to the names that wait for it."""
        from ckptkit.tensor_ops.recipes import compose

        rule = self.stage.rules[index]
        inputs: list[_Member] = []
        for which in range(len(rule.sources)):
            mine = _in_order(rule, which, names, members)
            self.refuse_uneven(index, which, names[0], mine)
            inputs += mine
        sources = tuple(source for member in inputs for source in member.made.sources)
        unproved = next((member for member in inputs if member.made.equals), None)
        if unproved is not None:
            raise RuleError(
                f"{rule} makes another tensor of {quoted(unproved.name)}, which has to be proved equal before that",
                hint='do it in two runs, or choose on_collision = "first" or "last"',
            )
        if len(sources) > _MOST_SOURCES:
            raise RuleError(f"{rule}: {quoted(names[0])} would be made of more than {_MOST_SOURCES:,} tensors")
        said = ", ".join(dict.fromkeys([*(member.made.rule for member in inputs if member.made.rule), str(rule)]))
        recipes = compose(
            [member.made.recipe for member in inputs], [len(member.made.sources) for member in inputs], rule.operations
        )
        for name, recipe in zip(names, recipes, strict=True):
            self.claims[name] = replace(self.claims[name], made=Derivation(sources, recipe, said))

    def refuse_uneven(self, index: int, which: int, name: str, members: Sequence[_Member]) -> None:
        """Raise ``RuleError`` where the rule gathers fewer here than elsewhere: it would be the last ones that lack."""
        rule = self.stage.rules[index]
        captures = tuple(capture for capture in rule.gathered if capture in rule.sources[which].captures)
        sizes = _sizes([member.index for member in members])
        others, other = self.counted.setdefault((index, captures), (sizes, name))
        if sizes == others:
            return
        here, there = (
            " x ".join(f"{count} {{{capture}}}" for capture, count in zip(captures, counts, strict=True))
            for counts in (sizes, others)
        )
        if name == other:
            reason = (
                f"{quoted(name)} would be made of {there}, and of {here} that fit {quoted(rule.sources[which].text)}"
            )
            hint = "where the numbers differ on purpose, give the captures names that differ"
        else:
            reason = f"{quoted(name)} would be made of {here}, and {quoted(other)} of {there}"
            hint = "where the numbers differ on purpose, write a rule for each"
        raise RuleError(f"{rule}: {reason}: a part is missing", hint=hint)


_Table = Sequence[tuple[str, int, int, Pattern]]  # a text that a key must contain, rule, which of its patterns, pattern


def _table(rules: Sequence[Rule]) -> _Table:
    patterns = [
        (index, which, pattern) for index, rule in enumerate(rules) for which, pattern in enumerate(rule.sources)
    ]
    common = Counter(text for _, _, pattern in patterns for text in set(pattern.literals))

    def telling(pattern: Pattern) -> str:
        return min(filter(None, pattern.literals), key=lambda text: (common[text], -len(text)), default="")

    return [(telling(pattern), index, which, pattern) for index, which, pattern in patterns]


def _first_match(table: _Table, name: str) -> tuple[int, int, re.Match[str] | KeyMatch] | None:
    for text, index, which, pattern in table:
        if text in name:  # of hundreds of rules nearly all end here, in a tenth of the time of a regex
            match = pattern.match(name)
            if match is not None:
                return index, which, match
    return None


def _numbers(rule: Rule, which: int, match: re.Match[str] | KeyMatch) -> tuple[int, ...]:
    """Return the values of the captures that the rule gathers over."""
    numbers = []
    for name in rule.gathered:
        if name not in rule.sources[which].captures:
            continue
        if not rule.sources[which].captures[name]:
            raise RuleError(
                f"{rule} gathers over {{{name}}}, which is in no new name and is no index",
                hint=f"write {{{name}:int}}, or use {{{name}}} in to",
            )
        numbers.append(int(match[name][:18]))
    return tuple(numbers)


def _in_order(rule: Rule, which: int, names: Sequence[str], members: Sequence[_Member]) -> list[_Member]:
    """Return what fits one pattern of the rule, sorted by index; raises ``RuleError`` for a hole."""
    pattern = rule.sources[which]
    mine = sorted((member for member in members if member.which == which), key=lambda member: member.index)
    if not mine:
        raise RuleError(
            f"{rule}: {quoted(names[0])} is to be made of {quoted(members[0].name)} and of what fits "
            f"{quoted(pattern.text)}, which is not there"
        )
    places = [member.index for member in mine]
    if len(set(places)) < len(mine):
        other = next(later for first, later in pairwise(mine) if first.index == later.index)
        raise RuleError(
            f"{rule}: {quoted(mine[0].name)} and {quoted(other.name)} would have the same place in {quoted(names[0])}",
            hint="tell them apart by an index that to leaves out, such as {i:int}",
        )
    hole = _hole(places)
    if hole is not None:
        gathered = [name for name in rule.gathered if name in pattern.captures]
        at = ", ".join(f"{name} = {value}" for name, value in zip(gathered, hole, strict=True))
        raise RuleError(
            f"{rule}: {quoted(names[0])} lacks one of its parts: there is none with {at}, and there are "
            f"{plural(len(mine), 'other')}"
        )
    return mine


def _sizes(places: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return how many indexes a grid has along each axis, by its highest."""
    return tuple(max(place[axis] for place in places) + 1 for axis in range(len(places[0])))


def _hole(places: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the first index that is missing in a grid of indexes, or None where it is complete."""
    sizes = _sizes(places)
    if math.prod(sizes) == len(places):
        return None
    there = set(places)
    number = 0
    while True:  # at most as often as there are places: an index may have any size, and most of its grid is missing
        rest, place = number, []
        for size in reversed(sizes):
            rest, at = divmod(rest, size)
            place.append(at)
        if tuple(reversed(place)) not in there:
            return tuple(reversed(place))
        number += 1


def _refuse_unused(
    stage: Stage, names: Iterable[str], hits: Sequence[int], notes: list[str], *, allow_unused: bool
) -> None:
    names = list(names)
    kept = [name for name in names if not stage.keep or matches_any(stage.keep, name)]
    unused = [
        (f"--keep {shell_word(pattern.text)} matches none of {plural(len(names), 'key')}", False)
        for pattern in stage.keep
        if not any(pattern.match(name) for name in names)
    ]
    for index, rule in enumerate(stage.rules):
        if hits[index] == 0:
            shadow = _shadow(stage.rules, index, kept)
            reason = (
                f"matches none of {plural(len(kept), 'key')}"
                if shadow is None
                else f"is shadowed: every key that it fits is taken by {shadow} before it"
            )
            unused.append((f"{rule} {reason}", rule.optional))
    for message, optional in unused:
        if not optional and not allow_unused:
            raise RuleError(message, hint="correct it, or pass --allow-unused")
        notes.append(message)


def _shadow(rules: Sequence[Rule], index: int, names: Iterable[str]) -> Rule | None:
    mine = _table(rules[index : index + 1])
    name = next((name for name in names if _first_match(mine, name)), None)
    found = None if name is None else _first_match(_table(rules[:index]), name)
    return None if found is None else rules[found[0]]
