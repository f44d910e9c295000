"""From what users write to rules: strings of a command line, and the tables of a rule file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.core.patterns import Template, parse_pattern, parse_rename, parse_template
from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import RuleError
from ckptkit.rules.model import Rule, Rules, Stage
from ckptkit.rules.variables import NO_VARIABLES, Settings

if TYPE_CHECKING:
    from ckptkit.tensor_ops.operation import Operation

__all__ = ["as_rules", "parse_rules", "rule_lines", "rules_from_table"]

_MOST_STAGES = 50
_COLLISIONS = ("error", "first", "last", "equal")
_RULE_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*(?P<staged>stage[ \t]*\.[ \t]*)?rule[ \t]*\]\]", re.MULTILINE)


def parse_rules(
    *,
    rename: Iterable[str] = (),
    keep: Iterable[str] = (),
    drop: Iterable[str] = (),
    strip: Iterable[str] = (),
    file: Mapping[str, Any] | None = None,
    allow_unused: bool = False,
    lines: Sequence[int] = (),
    settings: Settings = NO_VARIABLES,
) -> Rules:
    """Return the rules of a command line, followed by those of a parsed rule file.

    Keeping comes first, then dropping, then stripping, then renaming; the file's stages follow as passes of their own
    where the command line has rules too. ``lines`` are those of the file's rules, for messages, and
    ``settings`` what its variables are set to. Raises ``RuleError``.
    """
    stages: list[Stage] = []
    drops = tuple(Rule((parse_pattern(text),)) for text in drop)
    renames = tuple(Rule((template.pattern,), ((template,),)) for template in map(parse_rename, rename))
    kept, stripped = tuple(map(parse_pattern, keep)), _prefixes(list(strip), "strip")
    passes = [Stage(kept, drops), Stage((), renames, stripped)] if stripped else [Stage(kept, drops + renames)]
    stages.extend(stage for stage in passes if stage != Stage())
    if file is not None:
        stages.extend(rules_from_table(file, lines=lines, settings=settings))
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
    given: Any = rules
    renames = list(given) if isinstance(given, Iterable) else [given]
    if wrong := [item for item in renames if not isinstance(item, str)]:
        raise RuleError(f"a rule is {kind_of(wrong[0])}", hint='pass a list of renames: rules=["OLD=NEW"]')
    return parse_rules(rename=renames)


def rule_lines(text: str) -> tuple[int, ...]:
    """Return the line, counted from 1, on which each ``[[rule]]`` of a TOML file begins, in the order of the passes."""
    # Rules of the file itself are the first pass, below a [[stage]] too.
    headers = sorted(_RULE_HEADER.finditer(text), key=lambda header: header["staged"] is not None)
    return tuple(text.count("\n", 0, header.start()) + 1 for header in headers)


def rules_from_table(
    table: Mapping[str, Any], *, lines: Sequence[int] = (), settings: Settings = NO_VARIABLES
) -> tuple[Stage, ...]:
    """Return the passes that a rule file describes: ``keep``, ``strip``, ``[[rule]]``, then each ``[[stage]]``.

    Raises ``RuleError`` naming the rule by its line, or by its number, counted from 1.
    """
    _known(table, {"keep", "strip", "rule", "stage", "vars"}, "a rule file")
    variables = settings.resolve(table.get("vars", {}))
    passes: list[tuple[str, Mapping[str, Any]]] = [
        ("", {name: value for name, value in table.items() if name not in ("stage", "vars")})
    ]
    for number, inner in enumerate(_tables(table, "stage"), start=1):
        _known(inner, {"keep", "strip", "rule"}, f"[[stage]] {number}")
        passes.append((f"[[stage]] {number}, ", inner))
    if len(passes) > _MOST_STAGES:
        raise RuleError(f"there are {len(passes) - 1:,} stages, and at most {_MOST_STAGES - 1} are taken")
    count = sum(len(_tables(inner, "rule")) for _, inner in passes)
    at = iter(lines if len(lines) == count else ())  # rules written as inline tables have no header of their own
    stages = [_stage(inner, where, at, variables) for where, inner in passes]
    return tuple(stage for stage in stages if stage != Stage())


def _stage(table: Mapping[str, Any], where: str, lines: Iterable[int], variables: Mapping[str, int]) -> Stage:
    keep = table.get("keep", [])
    keep = [keep] if isinstance(keep, str) else keep
    if not isinstance(keep, list) or not all(isinstance(text, str) for text in keep):
        raise RuleError(f"{where}keep must be a pattern or a list of patterns")
    rules = []
    for number, inner in enumerate(_tables(table, "rule"), start=1):
        line = next(iter(lines), None)
        place = f"{where}[[rule]] {number}" if line is None else f"line {line}"
        try:
            rules.append(_rule(inner, place, variables))
        except RuleError as error:
            raise RuleError(f"{place}: {error.reason}", hint=error.hint) from None
    strip = table.get("strip", [])
    strip = [strip] if isinstance(strip, str) else strip
    return Stage(tuple(map(parse_pattern, keep)), tuple(rules), _prefixes(strip, f"{where}strip"))


def _prefixes(strip: object, where: str) -> tuple[str, ...]:
    if not isinstance(strip, list) or not all(isinstance(text, str) and text for text in strip):
        raise RuleError(f'{where} must be "auto", a prefix, or a list of prefixes')
    return tuple(strip)


def _rule(table: Mapping[str, Any], where: str, variables: Mapping[str, int]) -> Rule:
    _known(table, {"from", "to", "op", "drop", "optional", "on_collision"}, "the rule")
    drop, optional = table.get("drop", False), table.get("optional", False)
    on_collision = table.get("on_collision", "error")
    if not isinstance(drop, bool) or not isinstance(optional, bool):
        raise RuleError("drop and optional are true or false")
    if on_collision not in _COLLISIONS:
        raise RuleError(f"on_collision is one of {', '.join(_COLLISIONS)}")
    sources = tuple(parse_pattern(text) for text in _texts(table, "from"))
    if not sources:
        raise RuleError('there is no pattern: from = "..."')
    targets = _texts(table, "to")
    if drop == bool(targets):
        raise RuleError('it needs either to = "..." or drop = true')
    templates: tuple[tuple[Template, ...], ...] = tuple(
        tuple(parse_template(text, source) for text in targets) for source in sources
    )
    operations: tuple[Operation, ...] = ()
    if "op" in table:
        from ckptkit.tensor_ops.registry import parse_operations

        operations = parse_operations(table["op"], variables)
        _check_operations(operations, targets, on_collision, is_regex=any(source.is_regex for source in sources))
    return Rule(sources, templates if targets else (), operations, optional, on_collision, where)


def _check_operations(
    operations: Sequence[Operation], targets: Sequence[str], on_collision: str, *, is_regex: bool
) -> None:
    if not targets:
        raise RuleError("op makes something of what is dropped", hint="leave out either op or drop")
    if on_collision != "error":
        raise RuleError("on_collision chooses between names, and op makes new tensors", hint="leave out one of them")
    if is_regex:
        raise RuleError("op takes no re: pattern", hint="write captures: {i:int} is an index, {name} a segment")
    if operations[-1].outputs != len(targets):
        raise RuleError(
            f"{operations[-1].name} makes {operations[-1].outputs} of it, and to has {len(targets)} names",
            hint="give as many names as there are outputs",
        )


def _texts(table: Mapping[str, Any], name: str) -> list[str]:
    value = table.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RuleError(f"{name} is a string, or a list of strings")
    return texts


def _tables(table: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    inner = table.get(name, [])
    if not isinstance(inner, list) or not all(isinstance(item, Mapping) for item in inner):
        raise RuleError(f"{name} must be a list of tables, written [[{name}]]")
    return inner


def _known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise RuleError(f"{where} has the unknown key {quoted(unknown[0])}", hint=f"known: {', '.join(sorted(known))}")
