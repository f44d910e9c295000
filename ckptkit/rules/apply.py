"""Application of rules to keys: each stage is one simultaneous pass over all keys."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ckptkit.core.checkpoint import Checkpoint, Configuration, TensorInfo
from ckptkit.core.patterns import KeyMatch, Pattern, literal, matches_any, parse_pattern, suggest_pattern
from ckptkit.core.text import plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.rules.model import Derivation, KeyMap, Rule, Rules, Stage, with_rule

if TYPE_CHECKING:
    from ckptkit.wrappers.explain import Wrapping

__all__ = ["MOST_NOT_KEPT", "NOT_KEPT", "apply_rules", "renamed_keys"]

NOT_KEPT = "matches no --keep"  # why a key is left out
MOST_NOT_KEPT = 8  # tensors that a report names one by one for this reason: the user asked for others

_MAX_SOURCES = 100_000  # of one operation: stages that split and join in turns double the number each time
# Stages that copy every key double the number of names, and stages that repeat a capture double their length.
_MOST_NAMES, _MOST_CHARACTERS, _MOST_GROWING_STAGES = 50_000, 4_000_000, 6


def renamed_keys(rules: Rules, checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return the new key of each key that the rules keep, for a report on the tensors as they are.

    Raises ``RuleError`` where an operation would compute a tensor, and what ``apply_rules`` raises.
    """
    key_map = apply_rules(rules, checkpoint)
    if key_map.copied_or_computed:
        computed = quoted(next(iter(key_map.copied_or_computed)))
        hint = "write the tensors first: ckpt remap PATH -o OUT --rules FILE"
        raise RuleError(f"an operation would compute {computed}", hint=hint)
    return key_map.renamed


def apply_rules(rules: Rules, keys: Iterable[str], expected: Checkpoint | None = None) -> KeyMap:
    """Return the new key of each key, and the keys that are dropped.

    If ``keys`` is a Checkpoint, its entries that are not tensors help ``strip = "auto"`` to recognise wrappers.
    ``expected`` is the model or checkpoint whose names the keys get, if it is known. The rules of a library depend on
    the configuration of a live model on one of the two sides, and on shapes.

    Raises ``RuleError`` where two keys get the same new name, where a new name is empty, and where an operation lacks
    an input. It is also raised where a rule or a ``keep`` pattern matches nothing, unless the rule is optional or
    unused rules are allowed.
    """
    if not rules.stages:
        return _named_by_position(KeyMap({key: key for key in keys}), keys, expected)
    state = {key: Derivation((key,)) for key in keys}
    dropped: dict[str, str] = {}
    notes: list[str] = []
    limits = _Limits(_MOST_NAMES + 4 * len(state), _MOST_CHARACTERS + 4 * sum(map(len, state)))
    growing = 0

    def run(stage: Stage) -> dict[str, Derivation]:
        nonlocal growing
        after = _Pass(stage, limits, dropped, notes).run(state, allow_unused=rules.allow_unused)
        growing = max(growing + (len(after) > len(state)) - (len(after) < len(state)), 0)
        if growing > _MOST_GROWING_STAGES:
            raise RuleError(
                f"more than {_MOST_GROWING_STAGES} stages make more tensors than they get",
                hint="write one rule with all names",
            )
        return after

    entries = [entry.path for entry in keys.entries] if isinstance(keys, Checkpoint) else []
    for stage in rules.stages:
        if stage.made is not None:
            origin = keys if isinstance(keys, Checkpoint) else None
            made, messages = stage.made.stages(_described(state, keys), _configuration(expected, keys), origin)
            notes.extend(messages)
            for made_stage in made:
                state = run(made_stage)
            continue
        if not stage.strip:
            state = run(stage)
            continue
        if stage.keep:
            state = run(Stage(stage.keep))
        for prefix in stage.strip:
            stages, messages = _strip_stages(prefix, state, entries, expected)
            notes.extend(messages)
            for strip_stage in stages:
                state = run(strip_stage)
        if stage.rules:
            state = run(Stage((), stage.rules))
    return _named_by_position(KeyMap.from_derivations(state, dropped, notes), keys, expected)


def _named_by_position(key_map: KeyMap, keys: Iterable[str], expected: Checkpoint | None) -> KeyMap:
    """Return the map with names of the model in place of numbers, where the tensors are only numbered."""
    if expected is None or not isinstance(keys, Checkpoint) or not key_map.has_numbers_only:
        return key_map
    from ckptkit.rules.positions import name_positions

    named = name_positions(key_map.describe(keys), expected)
    if named is None:
        return key_map
    outputs = key_map.outputs()
    state: dict[str, Derivation] = {}
    for number, names in named.names.items():
        derivation = outputs[number]
        rule = f"{derivation.rule}, {named.rule}" if derivation.rule else named.rule
        state |= dict.fromkeys(names, replace(derivation, rule=rule))
    dropped = {old: named.dropped[new] for new in named.dropped for old in outputs[new].sources}
    return KeyMap.from_derivations(state, {**key_map.dropped, **dropped}, [*key_map.notes, named.note])


def _configuration(*sides: object) -> Configuration | None:
    """Return the configuration of the first side that is a live model with one."""
    return next((side.configuration for side in sides if isinstance(side, Checkpoint) and side.configuration), None)


def _described(state: Mapping[str, Derivation], keys: Iterable[str]) -> dict[str, TensorInfo | None]:
    """Return the description of each tensor of a stage by its name; None where only the names are known."""
    if not isinstance(keys, Mapping):
        return dict.fromkeys(state)
    return {name: derivation.describe(name, keys) for name, derivation in state.items()}


def _strip_stages(
    prefix: str, keys: Collection[str], entries: Collection[str], expected: Checkpoint | None
) -> tuple[list[Stage], list[str]]:
    """Return the stages that remove a prefix, or with ``auto`` the marks of known wrappers, and notes for the user.

    ``entries`` names the entries of the file that are not tensors, and ``expected`` has the keys of the model. Raises
    ``RuleError`` where a key lacks the prefix.
    """
    from ckptkit.wrappers.explain import AUTO, explain_wrappers, strip_prefix

    if prefix != AUTO:
        wrapping = strip_prefix(prefix, keys)
        return [_strip_stage(wrapping, f"--strip {shell_word(prefix)}")], [f"--strip: {wrapping}"]
    explanation = explain_wrappers(keys, entries, expected)
    notes = [f"--strip auto: {wrapping}" for wrapping in explanation.wrappings]
    notes = notes or [f"--strip auto: none of {plural(len(keys), 'key')} has the mark of a known wrapper"]
    notes += [f"--strip auto: {note}" for note in explanation.notes]
    return [_strip_stage(wrapping, "--strip auto") for wrapping in explanation.wrappings], notes


def _strip_stage(wrapping: Wrapping, where: str) -> Stage:
    drops = (Rule((parse_pattern(literal(key)),), where=where) for key in wrapping.drops)
    renames = (Rule((template.pattern,), ((template,),), where=where) for template in wrapping.renames)
    return Stage(rules=(*drops, *renames))


class _Claim(NamedTuple):
    """A key that gets a new name in this pass: its name before the pass, and the rule that renames it."""

    name: str
    derivation: Derivation
    rule: Rule | None

    @property
    def label(self) -> str:
        """The key of the input, or the name that an earlier pass gave to the output of an operation."""
        return self.derivation.sources[0] if self.derivation.recipe is None else self.name


@dataclass(frozen=True, slots=True)
class _Member:
    """An input of an operation: the number of the matching pattern, the index in the key, and the derivation."""

    pattern_number: int
    index: tuple[int, ...]
    name: str
    derivation: Derivation


class _Limits(NamedTuple):
    """The most names after a stage, and the most characters of all these names together."""

    names: int
    characters: int


@dataclass(slots=True)
class _Pass:
    """One pass of a stage over all names.

    ``claims`` maps each new name to the key that gets the name. ``groups`` holds the inputs of each operation, by the
    number of the rule and the new names. ``sizes`` holds the number of inputs that a rule gathered first.
    """

    stage: Stage
    limits: _Limits
    dropped: dict[str, str]
    notes: list[str]
    characters: int = 0
    claims: dict[str, _Claim] = field(default_factory=dict)
    groups: dict[tuple[int, tuple[str, ...]], list[_Member]] = field(default_factory=dict)
    sizes: dict[tuple[int, tuple[str, ...]], tuple[tuple[int, ...], str]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)

    def run(self, state: Mapping[str, Derivation], *, allow_unused: bool) -> dict[str, Derivation]:
        """Return the names after this pass, in the order of the names before it."""
        keep, rules = self.stage.keep, self.stage.rules
        hits = [0] * len(rules)
        table = _pattern_table(rules)
        for name, derivation in state.items():
            if keep and not matches_any(keep, name):
                self.leave_out(_Claim(name, derivation, None), NOT_KEPT)
                continue
            found = _first_match(table, name)
            if found is None:
                self.claim(name, _Claim(name, derivation, None))
                continue
            rule_number, pattern_number, match = found
            hits[rule_number] += 1
            self.apply_rule(rule_number, pattern_number, match, name, derivation)
        for (rule_number, names), members in self.groups.items():
            self.apply_operations(rule_number, names, members)
        _refuse_unused(self.stage, state, hits, self.notes, allow_unused=allow_unused)
        return {name: claim.derivation for name, claim in self.claims.items()}

    def apply_rule(
        self, rule_number: int, pattern_number: int, match: re.Match[str] | KeyMatch, name: str, derivation: Derivation
    ) -> None:
        rule = self.stage.rules[rule_number]
        if rule.drops:
            self.leave_out(_Claim(name, derivation, rule), self.text_of(rule_number))
            return
        names = tuple([template.expand(match) for template in rule.templates[pattern_number]])
        if "" in names and name:  # a checkpoint that is one bare tensor has the key ''
            raise RuleError(f"{rule} leaves {quoted(_Claim(name, derivation, rule).label)} without a name")
        if not rule.operations:
            claim = _Claim(name, with_rule(derivation, self.text_of(rule_number)), rule)
            for new in names:
                self.claim(new, claim)
            return
        members = self.groups.setdefault((rule_number, names), [])
        if not members:  # the outputs are placed where the first input was
            for new in names:
                self.claim(new, _Claim(name, derivation, rule))
        members.append(_Member(pattern_number, _indices(rule, pattern_number, match), name, derivation))

    def text_of(self, rule_number: int) -> str:
        """Return the text of a rule, which is made once for all its keys."""
        text = self.texts.get(rule_number)
        if text is None:
            text = self.texts[rule_number] = str(self.stage.rules[rule_number])
        return text

    def claim(self, name: str, newcomer: _Claim) -> None:
        """Give ``name`` to the newcomer; if another key has the name already, the rules decide."""
        holder = self.claims.get(name)
        if holder is None:
            self.characters += len(name)
            if len(self.claims) >= self.limits.names:
                raise RuleError(f"the rules make more than {self.limits.names:,} tensors")
            if self.characters > self.limits.characters:
                raise RuleError(f"the rules make names of more than {self.limits.characters:,} characters together")
            self.claims[name] = newcomer
            return
        policies = {rule.on_collision for rule in (holder.rule, newcomer.rule) if rule is not None} - {"error"}
        has_operation = any(claim.rule is not None and claim.rule.operations for claim in (holder, newcomer))
        if len(policies) != 1 or has_operation:
            rules = [f"by {claim.rule}" for claim in (holder, newcomer) if claim.rule is not None and claim.rule.where]
            raise RuleError(
                f"{quoted(holder.label)} and {quoted(newcomer.label)} would both be called {quoted(name)}"
                + (f", {' and '.join(dict.fromkeys(rules))}" if rules else ""),
                hint='drop one of them, or choose in a rule file: on_collision = "first", "last" or "equal"',
            )
        (policy,) = policies
        winner, loser = (newcomer, holder) if policy == "last" else (holder, newcomer)
        if policy == "equal":
            if winner.derivation.recipe is not None or loser.derivation.recipe is not None:
                raise RuleError(
                    f'{quoted(name)} would be made by operations, and on_collision = "equal" compares only inputs'
                )
            equals = dict.fromkeys((*winner.derivation.equals, *loser.derivation.sources, *loser.derivation.equals))
            winner = winner._replace(derivation=replace(winner.derivation, equals=tuple(equals)))
            self.leave_out(loser, f"must equal {quoted(winner.label)}, which gets the name {quoted(name)}")
        else:
            self.leave_out(loser, f"{quoted(winner.label)} gets the name {quoted(name)}")
        if policy == "last":
            del self.claims[name]  # the new keys have the order of the keys that win
        self.claims[name] = winner

    def leave_out(self, claim: _Claim, reason: str) -> None:
        """Record why the output leaves out each source of a claim."""
        if claim.derivation.recipe is not None:
            reason = f"made into {quoted(claim.name)}: {reason}"
        for source in dict.fromkeys(claim.derivation.sources):
            before = self.dropped.get(source)
            self.dropped[source] = reason if before is None else f"{before}; {reason}"

    def apply_operations(self, rule_number: int, names: Sequence[str], members: Sequence[_Member]) -> None:
        """Set the derivation of each new name of a group to an output of the rule's operations."""
        from ckptkit.tensor_ops.recipes import compose

        rule = self.stage.rules[rule_number]
        inputs: list[_Member] = []
        for pattern_number in range(len(rule.sources)):
            ordered = _in_order(rule, pattern_number, names, members)
            self.refuse_uneven(rule_number, pattern_number, names[0], ordered)
            inputs += ordered
        sources = tuple(source for member in inputs for source in member.derivation.sources)
        uncompared = next((member for member in inputs if member.derivation.equals), None)
        if uncompared is not None:
            raise RuleError(
                f"{rule} changes {quoted(uncompared.name)}, but its bytes must be compared first",
                hint='do it in two runs, or choose on_collision = "first" or "last"',
            )
        if len(sources) > _MAX_SOURCES:
            raise RuleError(f"{rule}: {quoted(names[0])} would be made of more than {_MAX_SOURCES:,} tensors")
        earlier = (member.derivation.rule for member in inputs if member.derivation.rule)
        all_rules = ", ".join(dict.fromkeys([*earlier, str(rule)]))
        recipes = compose(
            [member.derivation.recipe for member in inputs],
            [len(member.derivation.sources) for member in inputs],
            rule.operations,
        )
        for name, recipe in zip(names, recipes, strict=True):
            self.claims[name] = self.claims[name]._replace(derivation=Derivation(sources, recipe, all_rules))

    def refuse_uneven(self, rule_number: int, pattern_number: int, name: str, members: Sequence[_Member]) -> None:
        """Raise ``RuleError`` where the rule gathers another number of tensors than for an earlier new name.

        Then the last indices are missing; ``_in_order`` finds a missing index between others.
        """
        rule = self.stage.rules[rule_number]
        captures = tuple(capture for capture in rule.gathered if capture in rule.sources[pattern_number].captures)
        sizes = _grid_sizes([member.index for member in members])
        first_sizes, first_name = self.sizes.setdefault((rule_number, captures), (sizes, name))
        if sizes == first_sizes:
            return
        here, there = (
            " x ".join(f"{count} {{{capture}}}" for capture, count in zip(captures, counts, strict=True))
            for counts in (sizes, first_sizes)
        )
        if name == first_name:
            reason = (
                f"{quoted(name)} would be made of {there}, and of {here} that match "
                f"{quoted(rule.sources[pattern_number].text)}"
            )
            hint = "where the numbers differ on purpose, give the captures different names"
        else:
            reason = f"{quoted(name)} would be made of {here}, and {quoted(first_name)} of {there}"
            hint = "where the numbers differ on purpose, write a rule for each"
        raise RuleError(f"{rule}: {reason}: a part is missing", hint=hint)


class _PatternTable(NamedTuple):
    """The patterns of rules, in order.

    ``rows`` have a text that each matching key contains, the number of the rule, the number of the pattern, and the
    pattern. ``exact`` has the place of each pattern that matches only one key.
    """

    rows: Sequence[tuple[str, int, int, Pattern]]
    exact: Mapping[str, tuple[int, int, Pattern]]


def _pattern_table(rules: Sequence[Rule]) -> _PatternTable:
    patterns = [
        (rule_number, pattern_number, pattern)
        for rule_number, rule in enumerate(rules)
        for pattern_number, pattern in enumerate(rule.sources)
    ]
    exact: dict[str, tuple[int, int, Pattern]] = {}
    others = []
    for place in patterns:
        if place[2].is_literal:
            exact.setdefault(place[2].text, place)
        else:
            others.append(place)
    common = Counter(text for _, _, pattern in others for text in set(pattern.literals))

    def rarest_text(pattern: Pattern) -> str:
        return min(filter(None, pattern.literals), key=lambda text: (common[text], -len(text)), default="")

    return _PatternTable([(rarest_text(place[2]), *place) for place in others], exact)


def _first_match(table: _PatternTable, name: str) -> tuple[int, int, re.Match[str] | KeyMatch] | None:
    exact = table.exact.get(name)
    for text, rule_number, pattern_number, pattern in table.rows:
        if exact is not None and (rule_number, pattern_number) > exact[:2]:
            break
        if text in name:  # most of several hundred rules fail here, in a tenth of the time of a regex
            match = pattern.match(name)
            if match is not None:
                return rule_number, pattern_number, match
    match = None if exact is None else exact[2].match(name)
    return None if exact is None or match is None else (*exact[:2], match)


def _indices(rule: Rule, pattern_number: int, match: re.Match[str] | KeyMatch) -> tuple[int, ...]:
    """Return the values of the captures that the rule gathers over."""
    indices = []
    for name in rule.gathered:
        if name not in rule.sources[pattern_number].captures:
            continue
        if not rule.sources[pattern_number].captures[name]:
            raise RuleError(
                f"{rule} gathers over {{{name}}}, which is in no new name and is not an index",
                hint=f"write {{{name}:int}}, or use {{{name}}} in to",
            )
        indices.append(int(match[name][:18]))
    return tuple(indices)


def _in_order(rule: Rule, pattern_number: int, names: Sequence[str], members: Sequence[_Member]) -> list[_Member]:
    """Return the members of one pattern, in the order of their indices; raise ``RuleError`` where one is missing."""
    pattern = rule.sources[pattern_number]
    ordered = sorted(
        (member for member in members if member.pattern_number == pattern_number), key=lambda member: member.index
    )
    if not ordered:
        raise RuleError(
            f"{rule}: {quoted(names[0])} would be made of {quoted(members[0].name)} and of a tensor that matches "
            f"{quoted(pattern.text)}, but no tensor does"
        )
    indices = [member.index for member in ordered]
    if len(set(indices)) < len(ordered):
        first, second = next(pair for pair in pairwise(ordered) if pair[0].index == pair[1].index)
        raise RuleError(
            f"{rule}: {quoted(first.name)} and {quoted(second.name)} would have the same place in {quoted(names[0])}",
            hint="distinguish the two tensors by an index that is not in to, such as {i:int}",
        )
    missing = _missing_index(indices)
    if missing is not None:
        gathered = [name for name in rule.gathered if name in pattern.captures]
        at = ", ".join(f"{name} = {value}" for name, value in zip(gathered, missing, strict=True))
        raise RuleError(
            f"{rule}: {quoted(names[0])} lacks a part: no tensor has {at} ({plural(len(ordered), 'tensor')} found)"
        )
    return ordered


def _grid_sizes(indices: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the size of the smallest grid that has all these indices."""
    return tuple(max(index[axis] for index in indices) + 1 for axis in range(len(indices[0])))


def _missing_index(indices: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the first index that is missing in the grid of the indices, or None where the grid is complete."""
    sizes = _grid_sizes(indices)
    if math.prod(sizes) == len(indices):
        return None
    present = set(indices)
    number = 0
    while True:  # this ends after at most len(indices) turns, however large the grid is
        rest, index = number, []
        for size in reversed(sizes):
            rest, at = divmod(rest, size)
            index.append(at)
        if tuple(reversed(index)) not in present:
            return tuple(reversed(index))
        number += 1


def _refuse_unused(
    stage: Stage, names: Iterable[str], hits: Sequence[int], notes: list[str], *, allow_unused: bool
) -> None:
    names = list(names)
    kept = [name for name in names if not stage.keep or matches_any(stage.keep, name)]
    unused: list[tuple[str, Pattern, Rule | None, Rule | None]] = [
        (f"--keep {shell_word(pattern.text)} matches none of {plural(len(names), 'key')}", pattern, None, None)
        for pattern in stage.keep
        if not any(pattern.match(name) for name in names)
    ]
    for rule_number, rule in enumerate(stage.rules):
        if hits[rule_number] == 0:
            shadow = _shadowing_rule(stage.rules, rule_number, kept)
            reason = (
                f"matches none of {plural(len(kept), 'key')}"
                if shadow is None
                else f"is shadowed: the earlier {shadow} matches all its keys"
            )
            unused.append((f"{rule} {reason}", rule.sources[0], rule, shadow))
    for message, pattern, unused_rule, earlier in unused:
        if not (unused_rule and unused_rule.optional) and not allow_unused:
            if earlier is not None:
                way = "correct it" if earlier.drops else "put it before that"
            else:
                way = _old_name(stage.rules, unused_rule, kept) if unused_rule else ""
                if unused_rule and any(pattern.match(name) for name in names):
                    way = "leave it out, because the patterns of keep leave out all that it matches"
                new = unused_rule.new_name if unused_rule else None
                way = way or (suggest_pattern(pattern, names, "the checkpoint", new=new) if names else "correct it")
            way += "" if way.endswith("?") else ";"
            raise RuleError(
                message,
                hint=f"{way} or pass --allow-unused",
                call=f"{way} or allow it with parse_rules(..., allow_unused=True)",
            )
        notes.append(message)


def _old_name(rules: Sequence[Rule], unused: Rule, names: Iterable[str]) -> str:
    """Return the hint for a rule that matches only what another rule makes of a name, or the empty string."""
    table = _pattern_table(rules)
    for name in names:
        if (found := _first_match(table, name)) is None or rules[found[0]].drops:
            continue
        rule_number, pattern_number, match = found
        new = [template.expand(match) for template in rules[rule_number].templates[pattern_number]]
        if any(source.match(each) for source in unused.sources for each in new):
            return f"all rules see the old names, so match {quoted(name)}, in a rule before the one that renames it now"
    return ""


def _shadowing_rule(rules: Sequence[Rule], rule_number: int, names: Iterable[str]) -> Rule | None:
    """Return the earlier rule that matches the first key of a rule, or None."""
    own = _pattern_table(rules[rule_number : rule_number + 1])
    name = next((name for name in names if _first_match(own, name)), None)
    found = None if name is None else _first_match(_pattern_table(rules[:rule_number]), name)
    return None if found is None else rules[found[0]]
