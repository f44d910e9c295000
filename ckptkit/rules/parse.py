"""Parsers of rules: options of the command line, and the tables of rule files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, TypeGuard, cast, get_args

from ckptkit.core.arguments import require_flags, require_strings, require_type
from ckptkit.core.patterns import Template, parse_pattern, parse_rename, parse_template
from ckptkit.core.text import quoted
from ckptkit.core.toml_lines import toml_lines
from ckptkit.errors import RuleError
from ckptkit.rules.model import OnCollision, Rule, Rules, Stage
from ckptkit.rules.variables import NO_VARIABLES, Settings

if TYPE_CHECKING:
    from ckptkit.tensor_ops.operation import Operation

__all__ = ["FILE_KEYS", "are_strings", "parse_rules", "rule_lines", "rules_from_table"]

FILE_KEYS = frozenset({"keep", "strip", "rule", "stage", "vars"})
_MAX_STAGES = 50
_COLLISIONS: tuple[str, ...] = get_args(OnCollision)


def parse_rules(
    *,
    rename: Iterable[str] = (),
    keep: Iterable[str] = (),
    drop: Iterable[str] = (),
    strip: Iterable[str] = (),
    file: Mapping[str, object] | None = None,
    allow_unused: bool = False,
    lines: Sequence[int] = (),
    settings: Settings = NO_VARIABLES,
) -> Rules:
    """Return the rules of a command line, followed by the rules of a parsed rule file.

    The options apply in the order keep, drop, strip, rename; the stages of the file follow. ``lines`` holds the line
    of each rule of the file, for messages, and ``settings`` the values of its variables. Raises ``RuleError`` for a
    rule that is not valid.

    Example:
        >>> rules = ckptkit.parse_rules(drop=["fc3.*"], rename=["fc1.*=first.*"])
        >>> result = ckptkit.diff("fixtures/lenet_10class.pth", "fixtures/lenet_10class.safetensors", rules)
        >>> [info.key for info in result.missing]
        ['fc1.weight', 'fc1.bias', 'fc3.weight', 'fc3.bias']
    """
    rename, keep, drop, strip = (
        require_strings(given, name, "a str or several str")
        for name, given in (("rename", rename), ("keep", keep), ("drop", drop), ("strip", strip))
    )
    require_type(file, Mapping | None, "file", "a mapping with the content of a rule file")
    require_flags(allow_unused=allow_unused)
    stages: list[Stage] = []
    drops = tuple(Rule((parse_pattern(text),)) for text in drop)
    renames = tuple(Rule((template.pattern,), ((template,),)) for template in map(parse_rename, rename))
    kept, stripped = tuple(map(parse_pattern, keep)), _prefixes(list(strip), "strip")
    given = [Stage(kept, drops), Stage((), renames, stripped)] if stripped else [Stage(kept, drops + renames)]
    stages.extend(stage for stage in given if stage != Stage())
    if file is not None:
        stages.extend(rules_from_table(file, lines=lines, settings=settings))
    return Rules(tuple(stages), allow_unused)


def rule_lines(text: str) -> tuple[int, ...]:
    """Return the line, counted from 1, on which each ``[[rule]]`` of a TOML file begins, in the order of the stages."""
    lines = toml_lines(text)
    # A [[rule]] belongs to the first stage wherever it is in the file; a [[stage.rule]] does not.
    first = [line for path, line in lines.items() if len(path) == 2 and path[0] == "rule"]
    staged = [line for path, line in lines.items() if len(path) == 4 and (path[0], path[2]) == ("stage", "rule")]
    return (*first, *staged)


def rules_from_table(
    table: Mapping[str, object], *, lines: Sequence[int] = (), settings: Settings = NO_VARIABLES
) -> tuple[Stage, ...]:
    """Return the stages of a rule file: ``keep``, ``strip`` and ``[[rule]]`` are the first, then each ``[[stage]]``.

    Raises ``RuleError`` for a rule that is not valid, naming its line or its number, counted from 1.
    """
    _refuse_unknown(table, FILE_KEYS, "a rule file")
    variables = settings.resolve(table.get("vars", {}))
    tables: list[tuple[str, Mapping[str, object]]] = [
        ("", {name: value for name, value in table.items() if name not in ("stage", "vars")})
    ]
    for number, inner in enumerate(_tables(table, "stage"), start=1):
        _refuse_unknown(inner, {"keep", "strip", "rule"}, f"[[stage]] {number}")
        tables.append((f"[[stage]] {number}, ", inner))
    if len(tables) > _MAX_STAGES:
        raise RuleError(f"there are {len(tables) - 1:,} stages, and at most {_MAX_STAGES - 1} are allowed")
    count = sum(len(_tables(inner, "rule")) for _, inner in tables)
    at = iter(lines if len(lines) == count else ())  # rules that are inline tables have no header
    stages = [_stage(inner, where, at, variables) for where, inner in tables]
    return tuple(stage for stage in stages if stage != Stage())


def _stage(table: Mapping[str, object], where: str, lines: Iterable[int], variables: Mapping[str, int]) -> Stage:
    keep = table.get("keep", [])
    keep = [keep] if isinstance(keep, str) else keep
    if not isinstance(keep, list) or not are_strings(keep):
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


def _rule(table: Mapping[str, object], where: str, variables: Mapping[str, int]) -> Rule:
    _refuse_unknown(table, {"from", "to", "op", "drop", "optional", "on_collision"}, "the rule")
    drop, optional = table.get("drop", False), table.get("optional", False)
    on_collision = table.get("on_collision", "error")
    if not isinstance(drop, bool) or not isinstance(optional, bool):
        raise RuleError("drop and optional must be true or false")
    if on_collision not in _COLLISIONS:
        raise RuleError(f"on_collision must be one of {', '.join(_COLLISIONS)}")
    sources = tuple(parse_pattern(text) for text in _texts(table, "from"))
    if not sources:
        raise RuleError('the rule needs a pattern: from = "..."')
    targets = _texts(table, "to")
    if drop == bool(targets):
        raise RuleError('the rule needs either to = "..." or drop = true')
    templates: tuple[tuple[Template, ...], ...] = tuple(
        tuple(parse_template(text, source) for text in targets) for source in sources
    )
    operations: tuple[Operation, ...] = ()
    if "op" in table:
        from ckptkit.tensor_ops.registry import parse_operations

        operations = parse_operations(table["op"], variables)
        _check_operations(operations, targets, on_collision, is_regex=any(source.is_regex for source in sources))
    return Rule(sources, templates if targets else (), operations, optional, cast("OnCollision", on_collision), where)


def _check_operations(
    operations: Sequence[Operation], targets: Sequence[str], on_collision: object, *, is_regex: bool
) -> None:
    if not targets:
        raise RuleError("op and drop exclude each other", hint="leave out one of them")
    if on_collision != "error":
        raise RuleError("op and on_collision exclude each other", hint="leave out one of them")
    if is_regex:
        raise RuleError("op cannot have a re: pattern", hint="use captures: {i:int} is an index, {name} a segment")
    if operations[-1].outputs != len(targets):
        raise RuleError(
            f"{operations[-1].name} has {operations[-1].outputs} outputs, and to has {len(targets)} names",
            hint="give one name for each output",
        )


def _texts(table: Mapping[str, object], name: str) -> list[str]:
    value = table.get(name, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not are_strings(texts):
        raise RuleError(f"{name} must be a string or a list of strings")
    return texts


def _tables(table: Mapping[str, object], name: str) -> Sequence[Mapping[str, object]]:
    inner = table.get(name, [])
    if not isinstance(inner, list) or not all(isinstance(item, Mapping) for item in inner):
        raise RuleError(f"{name} must be a list of tables, written [[{name}]]")
    return inner


def are_strings(values: list[object]) -> TypeGuard[list[str]]:
    """Return whether every value is a string."""
    return all(isinstance(value, str) for value in values)


def _refuse_unknown(table: Mapping[str, object], known: AbstractSet[str], where: str) -> None:
    unknown = sorted(map(str, set(table) - known))
    if unknown:
        ways = {"rename": 'a rename is a [[rule]] with from = "OLD.*" and to = "NEW.*"'}
        hint = (ways if "rule" in known else {}).get(unknown[0], f"known: {', '.join(sorted(known))}")
        raise RuleError(f"{where} has the unknown key {quoted(unknown[0])}", hint=hint)
