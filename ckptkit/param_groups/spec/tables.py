"""Parse the tables of a spec: one ``[[group]]``, one ``[[modifier]]``, and the tables of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.core.findings.ignoring import parse_ignore
from ckptkit.core.patterns import Pattern, parse_pattern
from ckptkit.core.text import kind_of, nearest, quoted
from ckptkit.errors import GroupsError, RuleError
from ckptkit.param_groups.conditions import Layers, parse_condition
from ckptkit.param_groups.spec.fields import GroupRule, Modifier, number_fault

__all__ = ["EXAMPLE", "LAYERS", "LAYER_KEYS", "class_name", "ignore_list", "parse_group", "parse_modifier"]

_GROUP_KEYS = ("name", "params", "match", "rest", "optional", "optimizer", "freeze", "override")
_MODIFIER_KEYS = ("name", "params", "match", "optional", "layers", "layer_decay", "min_scale")
LAYER_KEYS = ("layers", "layer_decay", "min_scale")
_MULTIPLE = "_mult"  # lr_mult = 10 multiplies lr
_MULTIPLES = ("lr_mult", "weight_decay_mult")
# At this likeness, none of the options of torch.optim and of common recipes is taken for a misspelled field.
_ALIKE, _ALIKE_END = 0.85, 0.75
EXAMPLE = 'for example [[group]] with params = "head.*" and lr = 0.01, then one with rest = true'
LAYERS = 'layers = [["embed.*"], "blocks.{i:int}.*", ["norm.*", "head.*"]]'


def ignore_list(given: Any) -> tuple[str, ...]:
    """Return the texts of an ignore list, checked."""
    try:
        return tuple(entry.text for entry in parse_ignore(given, "ignore"))
    except RuleError as error:
        raise GroupsError(error.reason, hint=error.hint) from None


def parse_group(table: Mapping[str, Any] | GroupRule, number: int) -> GroupRule:
    """Return the rule that a ``[[group]]`` table describes; messages call one without a name by ``number``.

    Raises ``GroupsError`` for an unknown key, a wrong pattern or a wrong factor.
    """
    if isinstance(table, GroupRule):
        return table
    where, name = _where(table, "group", number)
    for key in ("rest", "optional", "freeze", "override"):
        _flag(table, key, where)
    rest = table.get("rest", False)
    if rest and "params" in table:
        raise GroupsError(f"{where} has both params and rest = true", hint="keep one of them")
    if not rest and "params" not in table and "match" not in table:
        raise GroupsError(
            f"{where} has none of params, match and rest = true",
            hint='write params = "head.*", or rest = true for every parameter that no earlier group owns',
        )
    patterns = _patterns(table["params"], where) if "params" in table else ()
    options, multiples = _options(table, _GROUP_KEYS, where)
    return GroupRule(
        name or (patterns[0].text if patterns else "rest" if rest else f"group {number}"),
        patterns,
        options,
        rest,
        table.get("optional", False),
        parse_condition(table["match"], where) if "match" in table else None,
        multiples,
        class_name(table, where),
        table.get("freeze", False),
        table.get("override", False),
    )


def parse_modifier(table: Mapping[str, Any] | Modifier, number: int) -> Modifier:
    """Return the modifier that a ``[[modifier]]`` table describes, as ``parse_group`` does for a rule."""
    if isinstance(table, Modifier):
        return table
    where, name = _where(table, "modifier", number)
    _flag(table, "optional", where)
    options, multiples = _options(table, _MODIFIER_KEYS, where)
    return Modifier(
        name or f"modifier {number}",
        _patterns(table["params"], where) if "params" in table else (),
        options,
        table.get("optional", False),
        parse_condition(table["match"], where) if "match" in table else None,
        multiples,
        _layers(table, where),
    )


def _where(table: object, kind: str, number: int) -> tuple[str, str | None]:
    where = f"[[{kind}]] {number}"
    if not isinstance(table, Mapping):
        raise GroupsError(f"{where} is {kind_of(table)}, not a table", hint=EXAMPLE)
    name = table.get("name")
    if name is None:
        return where, None
    if not (isinstance(name, str) and name):
        raise GroupsError(f"{where}: name is {kind_of(name)}, not a name", hint='write name = "head"')
    return f"[[{kind}]] {quoted(name)}", name


def _flag(table: Mapping[str, Any], key: str, where: str) -> None:
    if not isinstance(table.get(key, False), bool):
        raise GroupsError(
            f"{where}: {key} is {kind_of(table[key])}, not true or false", hint=f"write {key} = true, or leave it out"
        )


def class_name(table: Mapping[str, Any], where: str) -> str | None:
    """Return the optimizer class that a table names, or None; raise ``GroupsError`` where it is not a name."""
    name = table.get("optimizer")
    if name is not None and not (isinstance(name, str) and name):
        raise GroupsError(
            f"{where}: optimizer is {kind_of(name)}, not the name of a class", hint='write optimizer = "AdamW"'
        )
    return name


def _patterns(given: object, where: str) -> tuple[Pattern, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise GroupsError(
            f"{where}: params is {kind_of(given)}, not a pattern or a list of patterns",
            hint='params takes names, not tensors: params = "head.*"',
        )
    if not texts:
        raise GroupsError(
            f"{where}: params is an empty list", hint='write the names that the group owns: params = "head.*"'
        )
    try:
        return tuple(map(parse_pattern, texts))
    except RuleError as error:
        raise GroupsError(f"{where}: {error.reason}", hint=error.hint) from None


def _options(table: Mapping[str, Any], own: Sequence[str], where: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the options that a table sets, and the factors of its ``_mult`` options."""
    options = {key: value for key, value in table.items() if key not in own}
    multiples = {
        key.removesuffix(_MULTIPLE): options.pop(key)
        for key in list(options)
        if str(key).endswith(_MULTIPLE) and key != _MULTIPLE
    }
    for key, factor in multiples.items():
        fault = number_fault(factor)
        if fault is not None:
            raise GroupsError(
                f"{where}: {key}{_MULTIPLE} {fault}", hint=f"write a finite number, 0 or more: {key}{_MULTIPLE} = 10"
            )
        if key in options:
            raise GroupsError(f"{where} has both {key} and {key}{_MULTIPLE}", hint="keep one of them")
    for key in options:
        intended = _intended_field(str(key), own)
        if intended is not None:
            raise GroupsError(f"{where}: there is no {quoted(str(key))}", hint=f"did you mean {quoted(intended)}?")
    return options, multiples


def _intended_field(key: str, own: Sequence[str]) -> str | None:
    """Return the field that ``key`` probably misspells, or None for what may be an option of an optimizer."""
    option, _, end = key.rpartition("_")
    if option and nearest(end, (_MULTIPLE[1:],), _ALIKE_END):
        return f"{option}{_MULTIPLE}"
    return nearest(key, (*own, *_MULTIPLES), _ALIKE)


def _layers(table: Mapping[str, Any], where: str) -> Layers | None:
    if "layers" not in table:
        for key in LAYER_KEYS[1:]:
            if key in table:
                raise GroupsError(
                    f"{where} has {key} but no layers", hint=f"list the layers from input to output: {LAYERS}"
                )
        return None
    levels = table["layers"]
    if isinstance(levels, str) or not isinstance(levels, list | tuple) or not levels:
        raise GroupsError(f"{where}: layers is {kind_of(levels)}, not a list of patterns", hint=f"write {LAYERS}")
    if "layer_decay" not in table:
        raise GroupsError(f"{where} has layers but no layer_decay", hint="write layer_decay = 0.75")
    for key in LAYER_KEYS[1:]:
        fault = number_fault(table.get(key, 0))
        if fault is not None:
            raise GroupsError(f"{where}: {key} {fault}", hint=f"write a number, 0 or more: {key} = 0.75")
    return Layers(
        tuple(_patterns(level, f"{where}, layers") for level in levels),
        float(table["layer_decay"]),
        float(table.get("min_scale", 0)),
    )
