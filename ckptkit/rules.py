"""Ordered rules: from the keys that are there to the keys that shall be, in one simultaneous pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptkit.errors import RuleError
from ckptkit.keys import Pattern, Template, matches_any, parse_pattern, parse_rename, parse_template
from ckptkit.text import plural, quoted, shell_word

__all__ = ["KeyMap", "Rule", "Rules", "Stage", "apply_rules", "as_rules", "parse_rules", "rules_from_table"]

_COLLISIONS = ("error", "first", "last", "equal")


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: a rename where ``template`` is given, else a drop.

    ``on_collision`` says whose value stays where the new name is taken already: ``"first"`` or
    ``"last"`` in the order of the keys, ``"equal"`` where both have the same bytes (proved before anything is
    written), or ``"error"``.
    """

    pattern: Pattern
    template: Template | None = None
    optional: bool = False
    on_collision: str = "error"

    def __str__(self) -> str:
        """Show the rule as it is written on a command line."""
        if self.template is None:
            return f"--drop {shell_word(self.pattern.text)}"
        return f"--rename {shell_word(f'{self.pattern.text}={self.template.text}')}"


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass: a filter of what is kept (empty: everything), then the first rule that fits each key."""

    keep: tuple[Pattern, ...] = ()
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """Passes in order; each sees the names that the one before it made."""

    stages: tuple[Stage, ...] = ()
    allow_unused: bool = False


@dataclass(frozen=True, slots=True)
class KeyMap:
    """What the rules made of a set of keys: old → new, and which rule dropped what."""

    renamed: Mapping[str, str]
    rule_of: Mapping[str, str] = field(default_factory=dict)  # old key -> the rules that spoke, where one did
    dropped: Mapping[str, str] = field(default_factory=dict)  # old key -> the reason
    equals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # old key -> dropped ones that must equal it
    notes: tuple[str, ...] = ()


def parse_rules(
    *,
    rename: Iterable[str] = (),
    keep: Iterable[str] = (),
    drop: Iterable[str] = (),
    file: Mapping[str, Any] | None = None,
    allow_unused: bool = False,
) -> Rules:
    """Return the rules of a command line, followed by those of a parsed rule file.

    Keeping comes first, then dropping, then renaming; the file's stages follow as passes of their own
    where the command line has rules too. Raises ``RuleError``.
    """
    stages = []
    drops = tuple(Rule(parse_pattern(text)) for text in drop)
    renames = tuple(Rule(template.pattern, template) for template in map(parse_rename, rename))
    first = Stage(tuple(map(parse_pattern, keep)), drops + renames)
    if first != Stage():
        stages.append(first)
    if file is not None:
        stages.extend(rules_from_table(file))
    return Rules(tuple(stages), allow_unused)


def as_rules(rules: Rules | Iterable[str] | Mapping[str, Any] | None) -> Rules:
    """Return rules from what a caller of the Python API may pass.

    Renames as ``"OLD=NEW"`` strings, a mapping in the form of a rule file, ``Rules``, or None.
    """
    if isinstance(rules, Rules):
        return rules
    if rules is None:
        return Rules()
    if isinstance(rules, Mapping):
        return parse_rules(file=rules)
    if isinstance(rules, str):
        raise RuleError(f"rules is the string {quoted(rules)}", hint=f"pass a list: rules=[{rules!r}]")
    return parse_rules(rename=rules)


def rules_from_table(table: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return the passes that a rule file describes: ``keep``, ``[[rule]]``, then each ``[[stage]]``.

    Raises ``RuleError`` naming the rule by its number, counted from 1.
    """
    _known(table, {"keep", "rule", "stage"}, "a rule file")
    stages = [_stage({name: value for name, value in table.items() if name != "stage"}, "")]
    for number, inner in enumerate(_tables(table, "stage"), start=1):
        _known(inner, {"keep", "rule"}, f"[[stage]] {number}")
        stages.append(_stage(inner, f"[[stage]] {number}, "))
    return tuple(stage for stage in stages if stage != Stage())


def _stage(table: Mapping[str, Any], where: str) -> Stage:
    keep = table.get("keep", [])
    keep = [keep] if isinstance(keep, str) else keep
    if not isinstance(keep, list) or not all(isinstance(text, str) for text in keep):
        raise RuleError(f"{where}keep must be a pattern or a list of patterns")
    rules = tuple(_rule(inner, f"{where}[[rule]] {number}") for number, inner in enumerate(_tables(table, "rule"), 1))
    return Stage(tuple(map(parse_pattern, keep)), rules)


def _rule(table: Mapping[str, Any], where: str) -> Rule:
    _known(table, {"from", "to", "drop", "optional", "on_collision"}, where)
    source, target, drop = table.get("from"), table.get("to"), table.get("drop", False)
    optional, on_collision = table.get("optional", False), table.get("on_collision", "error")
    if not isinstance(source, str):
        raise RuleError(f'{where} has no pattern: from = "..."')
    if not isinstance(drop, bool) or not isinstance(optional, bool):
        raise RuleError(f"{where}: drop and optional are true or false")
    if on_collision not in _COLLISIONS:
        raise RuleError(f"{where}: on_collision is one of {', '.join(_COLLISIONS)}")
    if drop == (target is not None) or not isinstance(target, str | None):
        raise RuleError(f'{where} needs either to = "..." or drop = true')
    try:
        pattern = parse_pattern(source)
        template = None if target is None else parse_template(target, pattern)
    except RuleError as error:
        raise RuleError(f"{where}: {error.reason}", hint=error.hint) from None
    return Rule(pattern, template, optional, on_collision)


def _tables(table: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    inner = table.get(name, [])
    if not isinstance(inner, list) or not all(isinstance(item, Mapping) for item in inner):
        raise RuleError(f"{name} must be a list of tables, written [[{name}]]")
    return inner


def _known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise RuleError(f"{where} has the unknown key {quoted(unknown[0])}", hint=f"known: {', '.join(sorted(known))}")


def apply_rules(rules: Rules, keys: Iterable[str]) -> KeyMap:
    """Return what the rules make of the keys; nothing is renamed by accident.

    Raises ``RuleError`` for two keys with one new name, an empty new name, and a rule or a kept
    pattern that matches nothing (unless it is optional, or unused rules are allowed).
    """
    renamed = {key: key for key in keys}
    ledger = _Ledger()
    for stage in rules.stages:
        renamed = _pass(stage, renamed, ledger, allow_unused=rules.allow_unused)
    equals = {kept: others for kept, others in ledger.equals.items() if kept in renamed}
    return KeyMap(renamed, ledger.rule_of, ledger.dropped, equals, tuple(ledger.notes))


@dataclass(slots=True)
class _Ledger:
    """What the passes have said so far, by old key."""

    rule_of: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    equals: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _pass(stage: Stage, names: Mapping[str, str], ledger: _Ledger, *, allow_unused: bool) -> dict[str, str]:
    hits = [0] * len(stage.rules)
    made: dict[str, str] = {}
    owner: dict[str, tuple[str, Rule | None]] = {}
    for key, name in names.items():
        if stage.keep and not matches_any(stage.keep, name):
            ledger.dropped[key] = "fits no --keep"
            continue
        new, rule = _first_match(stage.rules, name, hits)
        if rule is not None:
            said = ledger.rule_of.get(key)
            ledger.rule_of[key] = f"{said}, {rule}" if said else str(rule)
        if new is None:
            ledger.dropped[key] = str(rule)
        elif not new and name:  # a checkpoint that is one bare tensor has the key ''
            raise RuleError(f"{rule} leaves {quoted(key)} without a name")
        elif new not in owner or _takes(owner[new], (key, rule), new, ledger, made):
            made[key] = new
            owner[new] = (key, rule)
    _refuse_unused(stage, names.values(), hits, ledger.notes, allow_unused=allow_unused)
    return made


def _first_match(rules: Sequence[Rule], name: str, hits: list[int]) -> tuple[str | None, Rule | None]:
    for index, rule in enumerate(rules):
        match = rule.pattern.match(name)
        if match is not None:
            hits[index] += 1
            return (None if rule.template is None else rule.template.expand(match)), rule
    return name, None


def _takes(
    holder: tuple[str, Rule | None], newcomer: tuple[str, Rule | None], name: str, ledger: _Ledger, made: dict[str, str]
) -> bool:
    """Decide who keeps a name that two keys want, as their rules say; True where it is the newcomer."""
    policies = {rule.on_collision for _, rule in (holder, newcomer) if rule is not None} - {"error"}
    if len(policies) != 1:
        raise RuleError(
            f"{quoted(holder[0])} and {quoted(newcomer[0])} would both be called {quoted(name)}",
            hint='drop one of them, or choose in a rule file: on_collision = "first", "last" or "equal"',
        )
    (policy,) = policies
    winner, loser = (newcomer[0], holder[0]) if policy == "last" else (holder[0], newcomer[0])
    made.pop(loser, None)
    if policy == "equal":
        ledger.equals[winner] = (*ledger.equals.get(winner, ()), loser)
        ledger.dropped[loser] = f"has to equal {quoted(winner)}, which takes the name {quoted(name)}"
    else:
        ledger.dropped[loser] = f"{quoted(name)} is taken by {quoted(winner)}"
    return policy == "last"


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
    for name in names:
        if rules[index].pattern.match(name):
            return next(rule for rule in rules[:index] if rule.pattern.match(name))
    return None
